"""Rows of the tables of differences in docs/migration.md that no other test is about."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import fastdet
from fastdet import ops
from fastdet.models import backbones

SMALL = {"box_representation_size": 8, "min_size": 64, "max_size": 96}


def test_hyperparameters_of_a_backbone_by_name_and_of_a_module():
    assert fastdet.FasterRCNN("small", 2, **SMALL).settings.box_pooling == fastdet.VGG16.box_pooling == "max"
    module = nn.Conv2d(3, 8, 3, 16, 1)
    module.out_channels = 8
    anchors = fastdet.AnchorGenerator(sizes=((32,),))
    given = {**SMALL, "rpn_anchor_generator": anchors, "box_featmap_names": ("0",)}
    settings = fastdet.FasterRCNN(module, 2, **given).settings
    assert settings.box_pooling == fastdet.TORCHVISION.box_pooling == "align"
    assert settings.rpn_nms_thresh == fastdet.TORCHVISION.rpn_nms_thresh
    chosen = fastdet.FasterRCNN("small", 2, settings=fastdet.VGG16.override(**SMALL)).settings
    assert chosen.rpn_pre_nms_top_n_test == fastdet.VGG16.rpn_pre_nms_top_n_test


def test_other_samples_from_the_same_seed():
    label = (torch.arange(1000) % 3 == 0).long()
    torch.manual_seed(0)
    ours = ops.sample(label[None], 64, 32)
    torch.manual_seed(0)
    positive, negative = BalancedPositiveNegativeSampler(64, 0.5)([label])
    theirs = (positive[0] | negative[0]).nonzero()[:, 0]
    assert len(theirs) == int((ours.weight > 0).sum()) == 64
    assert set(theirs.tolist()) != set(ours.index[0].tolist())


def test_trainable_layers_without_pretrained_weights():
    """torchvision trains everything, with a warning; here the number is applied."""
    with pytest.warns(UserWarning, match="Changing trainable_backbone_layers has no effect"):
        theirs = torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, trainable_backbone_layers=1, num_classes=2
        )
    assert theirs.backbone.body.conv1.weight.requires_grad
    ours, _ = backbones.build("resnet18_fpn", trainable_layers=1)
    assert not ours.body.conv1.weight.requires_grad
    assert not ours.body.layer3[0].conv1.weight.requires_grad
    assert ours.body.layer4[0].conv1.weight.requires_grad


def test_eps_is_not_set_by_weights_from_a_file(tmp_path):
    """COCO_V1 was trained with an eps of 0, which a state dict does not tell."""
    model = fastdet.fasterrcnn_resnet50_fpn(weights_backbone=None, num_classes=2)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    loaded = fastdet.fasterrcnn_resnet50_fpn(weights=path, num_classes=2)
    assert {m.eps for m in loaded.modules() if isinstance(m, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d)} == {
        1e-5
    }


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning", "ignore::DeprecationWarning"
)
def test_traces_of_the_other_operations_are_right_for_other_sizes():
    generator = torch.Generator().manual_seed(0)

    def boxes(*shape):
        corner = torch.rand(*shape, 2, generator=generator) * 50
        return torch.cat([corner, corner + 20], -1)

    def matches(candidates, truths):
        return tuple(ops.match(candidates, truths, high=0.5, low=0.3))

    def samples(label):
        return tuple(ops.sample(label, 4, 2, torch.tensor([5])))

    def decoded(deltas, logits, anchors):
        return tuple(ops.decode(deltas, logits, anchors, torch.tensor([[40, 60]]), stride=(8, 8)))

    for function, first, second in (
        (matches, (boxes(20), boxes(2, 3)), (boxes(31), boxes(2, 5))),
        (samples, (torch.arange(12)[None] % 2,), (torch.arange(30)[None] % 3,)),
        (
            decoded,
            (torch.rand(1, 8, 3, 4), torch.rand(1, 2, 3, 4), boxes(2)),
            (torch.rand(1, 8, 6, 2), torch.rand(1, 2, 6, 2), boxes(2)),
        ),
    ):
        traced = torch.jit.trace(function, first, check_trace=False)
        for given in (first, second):
            torch.testing.assert_close(traced(*given), function(*given), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::DeprecationWarning")
def test_the_model_is_not_scripted():
    model = fastdet.FasterRCNN("small", 2, **SMALL)
    for module in (model, nn.Sequential(nn.Identity(), model)):
        with pytest.raises(RuntimeError, match="FasterRCNN: use fastdet"):
            torch.jit.script(module)


def test_corners_far_outside_are_clamped():
    """RoI align at 2^20 cells, RoI max-pool at 10^9: beyond, a box is as one that ends there."""
    features = torch.rand(1, 1, 8, 8)
    for operation, limit in ((ops.roi_align, 2.0**20), (ops.roi_pool, 1e9)):
        beyond = torch.tensor([[0, -1e30, -1e30, 1e30, 1e30], [0, -limit, -limit, limit, limit]])
        pooled = operation(features, beyond, 2)
        assert torch.equal(pooled[0], pooled[1])
        assert pooled.isfinite().all()


def test_arguments_after_num_classes_are_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        fastdet.FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 2, 64)


def test_targets_in_evaluation():
    """torchvision checks them, and has no use for them."""
    model = fastdet.FasterRCNN("small", 2, **SMALL).eval()
    images, targets = [torch.rand(3, 64, 64)], [{"boxes": torch.tensor([[9.0, 9, 9, 20]]), "labels": torch.tensor([1])}]
    torch.testing.assert_close(model(images, targets), model(images))
    with pytest.raises(ValueError, match="target 0: box 0 has no area"):
        model(images, targets, return_losses=True)
    theirs = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    with pytest.raises(AssertionError, match="positive height and width"):
        theirs.eval()(images, targets)
