"""A detector that torchvision trained on photographs of blood cells, in fastdet: the same detections, the same AP."""

import pytest
import torch
import torchvision
from torchvision.models.detection import FasterRCNN as TheirFasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator as TheirAnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import fastdet
from fastdet.data import VOC
from fastdet.engine.evaluate import evaluate
from fastdet.metrics import coco_average_precision
from fastdet.weights.files import read
from tests.helpers.exported import FORMATS, assert_same, laid_out, loaded, write
from tests.helpers.parity import EVERYTHING, assert_same_detections, assert_same_losses, sample_all_candidates

pytestmark = pytest.mark.shared

SETTINGS = {
    "min_size": 320,
    "max_size": 480,
    "rpn_pre_nms_top_n_train": 500,
    "rpn_post_nms_top_n_train": 300,
    "rpn_pre_nms_top_n_test": 500,
    "rpn_post_nms_top_n_test": 300,
    "box_batch_size_per_image": 128,
    "box_detections_per_img": 60,
}


@pytest.fixture(scope="module")
def checkpoint_path(shared_dir):
    return shared_dir / "weights" / "torchvision_mobilenet_v2_fpn_bccd.pth"


def load_ours(path, **overrides):
    anchors = fastdet.AnchorGenerator(((24,), (48,), (96,), (192,)))
    settings = {**SETTINGS, **overrides}
    model = fastdet.FasterRCNN("mobilenet_v2_fpn", 4, freeze_batchnorm=True, rpn_anchor_generator=anchors, **settings)
    fastdet.weights.load(model, path)
    return model


def load_theirs(path):
    body = torchvision.models.mobilenet_v2(norm_layer=FrozenBatchNorm2d).features[:18]
    levels = {"6": "0", "13": "1", "17": "2"}
    model = TheirFasterRCNN(
        BackboneWithFPN(body, levels, [32, 96, 320], 128, extra_blocks=LastLevelMaxPool()),
        None,
        rpn_anchor_generator=TheirAnchorGenerator(((24,), (48,), (96,), (192,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
        box_head=TwoMLPHead(128 * 49, 256),
        box_predictor=FastRCNNPredictor(256, 4),
        **SETTINGS,
    )
    model.load_state_dict(read(path)["model"])
    return model


@pytest.fixture(scope="module")
def held_out(checkpoint_path, shared_dir):
    return VOC(shared_dir / "data" / "BCCD", "test", tuple(read(checkpoint_path)["names"]))


def test_average_precision_is_what_torchvision_reached(checkpoint_path, held_out):
    found = evaluate(load_ours(checkpoint_path).eval(), held_out, held_out.class_names)
    # torchvision was trained and measured on the corners as the files have them, which count pixels from 1.
    shift = torch.tensor([1.0, 1, 0, 0])
    truth = [{**target, "boxes": target["boxes"] + shift} for _, target in held_out]
    coco = coco_average_precision(found.predictions, truth, 4)
    assert (coco.ap, coco.ap50, coco.ap75) == pytest.approx((0.554, 0.905, 0.622), abs=1e-3)
    assert coco.ap50_per_class == pytest.approx([0.852, 0.955, 0.907], abs=1e-3)


@pytest.fixture(scope="module")
def photographs(held_out):
    """Three of several sizes: one is cropped, one shrunk."""
    images = [held_out[i][0] / 255 for i in range(3)]
    targets = [{name: held_out[i][1][name] for name in ("boxes", "labels")} for i in range(3)]
    images[1] = images[1][:, :300]
    targets[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    images[2] = torch.nn.functional.interpolate(images[2][None], scale_factor=0.5, mode="bilinear")[0]
    targets[2] = {**targets[2], "boxes": targets[2]["boxes"] / 2}
    return images, targets


def test_detections_are_torchvisions(checkpoint_path, photographs):
    theirs, ours = load_theirs(checkpoint_path).eval(), load_ours(checkpoint_path).eval()
    with torch.no_grad():
        expected, found = theirs(photographs[0]), ours(photographs[0])
    assert_same_detections(expected, found, pixels=0.05, scores=1e-4, at_least=30)


def test_losses_are_torchvisions(checkpoint_path, photographs):
    everything = {**EVERYTHING, "box_batch_size_per_image": 400}
    theirs, ours = load_theirs(checkpoint_path).train(), load_ours(checkpoint_path, **everything).train()
    sample_all_candidates(theirs)
    images, targets = photographs
    with torch.no_grad():
        assert_same_losses(theirs(images, [dict(target) for target in targets]), ours(images, targets))


def test_one_bucket_makes_detections_independent_of_the_batch(checkpoint_path, photographs):
    """Trained weights, padded batches: what is found in an image stays to 1e-3."""
    model = load_ours(checkpoint_path, size_buckets=((480, 480),)).eval()
    with torch.no_grad():
        alone = [model([image])[0] for image in photographs[0]]
        assert_same_detections(alone, model(photographs[0]), pixels=1e-3, scores=1e-3, at_least=30)


@pytest.mark.parametrize("suffix", FORMATS)
def test_exported_it_finds_the_same_in_ten_photographs(checkpoint_path, held_out, tmp_path, suffix):
    model = load_ours(checkpoint_path, size_buckets=((320, 480),)).eval()
    images = [held_out[i][0] / 255 for i in range(10)]
    with torch.no_grad():
        eager = model(images)
    write(model, tmp_path / f"model{suffix}")
    inputs = laid_out(images, model)
    counts = assert_same(loaded(tmp_path / f"model{suffix}")(*inputs), eager, images, inputs[1])
    assert min(counts) > 0
    assert len(set(counts)) > 1
