"""The detector with torchvision's settings beside torchvision's own: same weights, same images, same numbers."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN as TheirFasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator as TheirAnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import fastdet

SIZES, RATIOS = ((16, 24), (32, 48), (64, 96)), ((0.5, 1.0, 2.0),) * 3
NUMBERS = {
    "min_size": 96,
    "max_size": 160,
    "rpn_pre_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_train": 150,
    "rpn_post_nms_top_n_test": 60,
    "box_detections_per_img": 30,
}


class Pyramid(nn.Module):
    """Three levels of features, of which two are pooled."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 8, stride=8)
        self.middle = nn.Conv2d(8, 8, 2, stride=2)
        self.coarse = nn.Conv2d(8, 8, 2, stride=2)

    def forward(self, images):
        fine = self.fine(images)
        middle = self.middle(fine.relu())
        return {"0": fine, "1": middle, "pool": self.coarse(middle.relu())}


def both(theirs_too=None, **changes):
    """torchvision's detector and ours with the same weights; `changes` go to both, `theirs_too` to torchvision's."""
    torch.manual_seed(0)
    numbers = {**NUMBERS, **changes}
    pool = MultiScaleRoIAlign(["0", "1"], 7, 2)
    anchors = TheirAnchorGenerator(SIZES, RATIOS)
    theirs = TheirFasterRCNN(Pyramid(), 5, rpn_anchor_generator=anchors, box_roi_pool=pool, **numbers)
    for name, parameter in theirs.named_parameters():
        if name.endswith("weight") and ("rpn.head" in name or "predictor" in name):
            nn.init.normal_(parameter, std=0.3)
    # With quotas this large every candidate trains, and nothing is left to chance.
    for sampler in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        sampler.batch_size_per_image, sampler.positive_fraction = 100_000, 1.0
    settings = fastdet.TORCHVISION.override(
        rpn_anchor_generator=fastdet.AnchorGenerator(SIZES, RATIOS),
        box_featmap_names=("0", "1"),
        rpn_batch_size_per_image=5000,
        rpn_positive_fraction=1.0,
        box_batch_size_per_image=600,
        box_positive_fraction=1.0,
        **numbers,
    )
    ours = fastdet.FasterRCNN(Pyramid(), 5, settings=settings)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(scope="module")
def scene():
    """Images that are limited by the shorter and by the longer side; the second has no boxes."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 80), (96, 70), (133, 57), (50, 200))]
    targets = []
    for image in images:
        extent = torch.tensor([image.shape[2], image.shape[1]])
        corner = torch.rand(4, 2, generator=generator) * extent * 0.6
        side = 5 + torch.rand(4, 2, generator=generator) * extent * 0.35
        labels = torch.randint(1, 5, (4,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + side], dim=1), "labels": labels})
    targets[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return images, targets


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rpn_score_thresh": 0.6},
        {"box_score_thresh": 0.3, "box_nms_thresh": 0.2, "rpn_nms_thresh": 0.4},
        {"min_size": (64, 128), "max_size": 130},
    ],
    ids=lambda changes: ", ".join(changes) or "as it comes",
)
def test_detections(scene, changes):
    theirs, ours = both(**changes)
    with torch.no_grad():
        expected, found = theirs.eval()(scene[0]), ours.eval()(scene[0])
    assert sum(len(one["boxes"]) for one in expected) > 10
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(other["boxes"], one["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(other["scores"], one["scores"], rtol=0, atol=1e-5)


def test_losses_and_gradients(scene):
    theirs, ours = both()
    expected, found = theirs.train()(scene[0], [dict(target) for target in scene[1]]), ours.train()(*scene)
    assert set(expected) == set(found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    sum(expected.values()).backward()
    sum(found.values()).backward()
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        size = one.grad.abs().max()
        assert size > 0, name
        assert (one.grad - other.grad).abs().max() < 1e-3 * size, name


def test_what_is_too_small_is_dropped_where_torchvision_drops_it(scene):
    """torchvision's thresholds of sides are fixed, so they are moved by hand."""
    theirs, ours = both()
    theirs.rpn.min_size = 25.0
    ours.settings = ours.rpn.settings = ours.settings.override(rpn_min_size=25.0)
    with torch.no_grad():
        expected, found = theirs.eval()(scene[0]), ours.eval()(scene[0])
    plain = both()[0].eval()(scene[0])
    assert not torch.equal(plain[0]["boxes"], expected[0]["boxes"]), "the threshold drops nothing"
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(other["boxes"], one["boxes"], rtol=0, atol=1e-3)
