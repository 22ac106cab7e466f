"""The detector with torchvision's settings beside torchvision's own: same weights, same images, same outputs."""

import pytest
import torch
from torchvision.models.detection import FasterRCNN as TheirFasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator as TheirAnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import fastdet
from tests.helpers.detectors import PYRAMID_SETTINGS, Pyramid
from tests.helpers.parity import (
    EVERYTHING,
    assert_same_detections,
    assert_same_gradients,
    assert_same_losses,
    sample_all_candidates,
    scene,
)
from tests.helpers.weights import randomize_heads

SIZES, RATIOS = ((16, 24), (32, 48), (64, 96)), ((0.5, 1.0, 2.0),) * 3


def both(**changes):
    """torchvision's detector and ours with the same weights; `changes` go to both."""
    torch.manual_seed(0)
    settings_of_both = {**PYRAMID_SETTINGS, **changes}
    pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
    anchors = TheirAnchorGenerator(SIZES, RATIOS)
    theirs = TheirFasterRCNN(Pyramid(), 5, rpn_anchor_generator=anchors, box_roi_pool=pool, **settings_of_both)
    randomize_heads(theirs)
    sample_all_candidates(theirs)
    settings = fastdet.TORCHVISION.override(
        rpn_anchor_generator=fastdet.AnchorGenerator(SIZES, RATIOS),
        box_featmap_names=("0", "1"),
        **EVERYTHING,
        **settings_of_both,
    )
    ours = fastdet.FasterRCNN(Pyramid(), 5, settings=settings)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(scope="module")
def images_and_targets():
    """Limited by the shorter and by the longer side; the second has no boxes."""
    return scene((64, 80), (96, 70), (133, 57), (50, 200))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rpn_score_thresh": 0.6},
        {"box_score_thresh": 0.3, "box_nms_thresh": 0.2, "rpn_nms_thresh": 0.4},
        {"min_size": (64, 128), "max_size": 130},
    ],
    ids=lambda changes: ", ".join(changes) or "default",
)
def test_detections(images_and_targets, changes):
    theirs, ours = both(**changes)
    images = images_and_targets[0]
    with torch.no_grad():
        assert_same_detections(theirs.eval()(images), ours.eval()(images))


def test_losses_and_gradients(images_and_targets):
    theirs, ours = both()
    images, targets = images_and_targets
    expected, found = theirs.train()(images, [dict(target) for target in targets]), ours.train()(images, targets)
    assert_same_losses(expected, found)
    sum(expected.values()).backward()
    sum(found.values()).backward()
    assert_same_gradients(theirs, ours)


def test_what_is_too_small_is_dropped_where_torchvision_drops_it(images_and_targets):
    """torchvision's thresholds of sides are constants, so the test sets its attribute."""
    theirs, ours = both()
    theirs.rpn.min_size = 25.0
    ours.settings = ours.settings.override(rpn_min_size=25.0)
    images = images_and_targets[0]
    with torch.no_grad():
        expected, found = theirs.eval()(images), ours.eval()(images)
    plain = both()[0].eval()(images)
    assert not torch.equal(plain[0]["boxes"], expected[0]["boxes"]), "the threshold drops nothing"
    assert_same_detections(expected, found)
