"""A fused detector finds what the model finds, with fewer layers, and leaves the model as it was."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fastdet
from fastdet import FasterRCNN, fuse
from fastdet.graphs import GraphedTrainer
from fastdet.models.backbones import NAMED
from fastdet.models.layers import ConvReLU2d, FrozenBatchNorm2d
from tests.helpers.detectors import NUM_CLASSES, small_detector, small_scene
from tests.helpers.graphs import MAX_BOXES, SHAPE, detector, sgd
from tests.helpers.parity import assert_same_detections
from tests.helpers.weights import randomize_heads, rescale_heads

BATCHNORM = (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d)


def randomize_statistics(model: nn.Module) -> None:
    """Statistics, weights and biases that matter; in the first state BatchNorm changes almost nothing."""
    for norm in model.modules():
        if isinstance(norm, BATCHNORM) and norm.running_mean is not None:
            for tensor, (low, high) in zip(
                (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data),
                ((-0.5, 0.5), (0.5, 2.0), (0.5, 1.5), (-0.5, 0.5)),
                strict=True,
            ):
                tensor.uniform_(low, high)


def count(model: nn.Module, *types: type) -> int:
    return sum(isinstance(layer, types) for layer in model.modules())


@torch.no_grad()
def assert_same_outputs(part: nn.Module, fused: nn.Module, *inputs: Tensor) -> None:
    """To within 1e-4 of the largest value of each output."""
    expected, found = (each(*inputs) for each in (part.eval(), fused))
    if isinstance(expected, Tensor):
        expected, found = {"": expected}, {"": found}
    assert list(expected) == list(found)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-4 * value.abs().max(), name


@pytest.mark.parametrize(
    ("name", "frozen"),
    [*((name, False) for name in NAMED), ("small", True), ("mobilenet_v2_fpn", True), ("resnet18_fpn", True)],
)
def test_every_backbone(name, frozen):
    model = FasterRCNN(name, NUM_CLASSES, freeze_batchnorm=frozen, box_representation_size=16)
    randomize_statistics(model)
    state, layers = copy.deepcopy(model.state_dict()), [type(layer) for layer in model.modules()]
    fused = fuse(model)
    assert model.training
    assert not fused.training
    assert [type(layer) for layer in model.modules()] == layers
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert_same_outputs(model.backbone, fused.backbone, torch.rand(2, 3, 96, 135))
    assert count(fused, *BATCHNORM) == 0
    assert count(fused, ConvReLU2d) > 0
    assert count(model, ConvReLU2d) == (13 if name == "vgg16" else 0)
    weights = [weight for weight in fused.parameters() if weight.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert not {value.data_ptr() for value in fused.parameters()} & {value.data_ptr() for value in model.parameters()}


@pytest.mark.parametrize("make", [fastdet.fasterrcnn_resnet50_fpn_v2, fastdet.fasterrcnn_mobilenet_v3_large_fpn])
def test_whole_detectors(make):
    torch.manual_seed(0)
    options = {"min_size": 96, "max_size": 160, "box_score_thresh": 0.0, "rpn_score_thresh": 0.0}
    options |= {"rpn_post_nms_top_n_test": 100}
    model = make(weights_backbone=None, num_classes=NUM_CLASSES, **options).eval()
    randomize_statistics(model)
    images, _ = small_scene()
    randomize_heads(model)
    rescale_heads(model, images)
    fused = fuse(model)
    assert count(fused, *BATCHNORM) == 0
    assert_same_detections(model(images), fused(images), pixels=1e-2, scores=1e-4)


def test_a_box_head_of_convolutions():
    model = small_detector(box_num_convs=2, box_score_thresh=0.01)
    randomize_statistics(model)
    fused = fuse(model)
    assert count(model.roi_heads, nn.BatchNorm2d) == 2
    assert count(fused, nn.BatchNorm2d, nn.ReLU) == 1, "the ReLU of the linear layer"
    assert_same_outputs(model.roi_heads.box_head, fused.roi_heads.box_head, torch.randn(5, 4, 3, 3))
    images, _ = small_scene()
    assert_same_detections(model.eval()(images), fused(images))
    assert fused.num_classes == NUM_CLASSES


class Awkward(nn.Module):
    """Convolutions and norms that must not be folded, beside one that must."""

    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.forked, self.plain = (nn.Conv2d(channels, 4, 3, 4) for channels in (3, 3, 3))
        self.last = nn.Conv2d(4, 4, 3, 4, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))
        self.batch_statistics = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.norms[0](self.shared(x)) + self.norms[1](self.shared(x.flip(3)))
        forked = self.forked(x)
        forked = forked + self.norms[2](forked) + F.relu(forked)
        plain = self.batch_statistics(self.plain(x))
        return self.norms[4](F.relu(self.norms[3](self.last(shared + forked + plain))))


def test_what_cannot_be_folded_stays():
    model = small_detector()
    model.backbone = Awkward()
    randomize_statistics(model)
    fused = fuse(model).backbone
    assert count(fused, nn.BatchNorm2d) == 5
    assert type(fused.last) is ConvReLU2d
    assert fused.last.bias is not None
    assert_same_outputs(model.backbone, fused, torch.rand(2, 3, 40, 60))


def test_a_norm_that_two_convolutions_share():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.first(x)) - self.norm(self.second(x))

    model = small_detector()
    model.backbone = Twice()
    randomize_statistics(model)
    assert count(fuse(model).backbone, *BATCHNORM) == 0
    assert_same_outputs(model.backbone, fuse(model).backbone, torch.rand(2, 3, 10, 11))


class InPlace(nn.Module):
    """Changes a tensor that has another name too."""

    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = first = self.norm(self.convolution(x))
        y += 1
        y *= 3
        y -= 0.5
        y /= 2
        return y + first


def test_changes_in_place_stay_so():
    model = small_detector()
    model.backbone = InPlace()
    randomize_statistics(model)
    fused = fuse(model).backbone
    assert count(fused, nn.BatchNorm2d) == 0
    assert_same_outputs(model.backbone, fused, torch.rand(2, 3, 40, 60))


class Branching(nn.Sequential):
    """Its code depends on values, so that it cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else -x


@pytest.mark.parametrize("reason", ["untraceable", "hook", "hook of a container"])
def test_a_part_that_cannot_be_traced_or_has_hooks_stays(reason):
    model, calls = small_detector(box_score_thresh=0.01).eval(), []
    randomize_statistics(model)
    layers = list(model.backbone)
    model.backbone = Branching(*layers) if reason == "untraceable" else nn.Sequential(nn.Sequential(*layers))
    if reason != "untraceable":
        hooked = model.backbone[0] if reason == "hook of a container" else layers[0]
        hooked.register_forward_hook(lambda *_: calls.append(1))
    fused = fuse(model)
    assert count(fused.backbone, nn.BatchNorm2d) == 1
    images, _ = small_scene()
    expected = model(images)
    calls.clear()
    for a, b in zip(fused(images), expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert len(calls) == (reason != "untraceable")


def test_a_fused_model_cannot_be_trained():
    images, targets = small_scene()
    fused = fuse(detector())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    fused.train()
    with pytest.raises(RuntimeError, match="a fused model cannot be trained"):
        fused(images, targets)
    with pytest.raises(ValueError, match="no trainable parameters"):
        GraphedTrainer(fused, sgd(fused), SHAPE, MAX_BOXES)


def copies(model: FasterRCNN) -> list[Any]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fuse(model)]


def test_copies_and_pickles_and_what_is_fused_again():
    fused = fuse(small_detector(box_score_thresh=0.01))
    images, _ = small_scene()
    expected = fused(images)
    for other in copies(fused):
        for a, b in zip(other(images), expected, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_compiled_model_gives_a_compiled_one():
    model = small_detector(box_score_thresh=0.01).eval()
    randomize_statistics(model)
    assert fuse(model).compiled_step is None
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    fused = fuse(model)
    assert fused.compiled_step is model.compiled_step
    images, _ = small_scene()
    with torch.no_grad():
        assert_same_detections(model(images), fused(images))
