"""With `mask_padding` what is found in an image does not depend on the images beside it in the batch."""

import copy

import pytest
import torch

import fastdet
from fastdet.models import padding
from tests.helpers.parity import assert_same_detections, calibrate, enliven

NUMBERS = {"min_size": 96, "max_size": 224, "rpn_post_nms_top_n_test": 40, "box_detections_per_img": 20}
CASES = {
    "mobilenet_v2_fpn": {},
    "mobilenet_v3_large_fpn": {"rpn_score_thresh": 0.0},
    "resnet18_fpn": {},
    "mobilenet_v2": {"size_divisible": 16, "rpn_min_size": 4.0},
    "small": {"size_divisible": 8, "rpn_min_size": 4.0, "box_pooling": "align"},
}


def detector(name, **changes):
    torch.manual_seed(0)
    anchors = fastdet.AnchorGenerator(((24, 48),), offset=4.0)
    more = {"rpn_anchor_generator": anchors} if name == "small" else {}
    model = fastdet.FasterRCNN(name, 4, **{**NUMBERS, **CASES[name], **more, **changes})
    images = [torch.rand(3, 96, 128), torch.rand(3, 100, 96)]
    calibrate(model, images)
    enliven(model, images)
    return model.eval()


@pytest.fixture(scope="module")
def batch():
    """Sizes whose paddings differ a lot, one a multiple of 32 on both sides; bright, so that padding would show."""
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(3, *size, generator=generator) * 2 for size in ((96, 128), (224, 96), (97, 223), (130, 101))]


def alone_and_together(model, batch):
    with torch.no_grad():
        return [model([image])[0] for image in batch], model(batch)


@pytest.mark.parametrize("name", CASES)
def test_an_image_alone_and_in_a_batch(name, batch):
    alone, together = alone_and_together(detector(name, mask_padding=True), batch)
    # A few thousandths of a pixel are rounding, which weights drawn at random magnify.
    assert_same_detections(alone, together, pixels=5e-3, scores=1e-3, at_least=40)


@pytest.mark.parametrize("name", CASES)
def test_without_the_mask_they_differ(name, batch):
    alone, together = alone_and_together(detector(name), batch)
    with pytest.raises(AssertionError):
        assert_same_detections(alone, together, pixels=1e-3, scores=1e-3, at_least=40)


def test_neither_do_they_depend_on_the_bucket(batch):
    model = detector("mobilenet_v2_fpn", mask_padding=True)
    wide = detector("mobilenet_v2_fpn", mask_padding=True, size_buckets=((256, 256), (320, 512)))
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_same_detections(model(batch), wide(batch), pixels=1e-3, scores=1e-3)


def test_boxes_at_the_far_border_are_pooled_as_alone():
    """Boxes smaller than a cell included: RoI align makes them a cell wide, and what sticks out counts as 0."""
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(1, 4, 6, 8, generator=generator)
    padded = torch.nn.functional.pad(features, (0, 5, 0, 3), value=torch.nan)
    boxes = torch.tensor([[[40.0, 40, 64, 48], [63, 47, 64, 48], [60.5, 1, 63.9, 3], [0, 0, 64, 48], [0, 0, 2, 2]]])
    valid = torch.ones(1, 5, dtype=torch.bool)
    shift = torch.tensor([5.0, 3, 5, 3]) * 8
    moved = padding.to_far_corner(padded, torch.tensor([[6, 8]]))
    for changes in ({"box_aligned": True}, {"box_pooling": "max"}, {}):
        heads = detector("mobilenet_v2_fpn", **changes).roi_heads
        expected = heads.pool([features], boxes, valid, [1 / 8])
        assert expected.abs().sum() > 0
        torch.testing.assert_close(heads.pool([moved], boxes + shift, valid, [1 / 8]), expected)
        assert not torch.isfinite(heads.pool([padded], boxes, valid, [1 / 8])).all() or "box_pooling" in changes


def test_training_with_the_mask(batch):
    model = detector("mobilenet_v2_fpn", mask_padding=True).train()
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([1])}] * 4
    seen = model.inspect(batch, targets)
    sum(seen["losses"].values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    # No anchor of a cell beyond an image trains: 96 x 128 pixels have 12 x 16 cells of the finest level.
    finest = seen["features"][0].shape[-2:]
    labels = seen["anchor_labels"][0, : finest[0] * finest[1] * 3].reshape(*finest, 3)
    assert (labels[12:] == -1).all()
    assert (labels[:, 16:] == -1).all()
    assert (labels[:12, :16] >= 0).any()


def test_copies_mask_their_own_batches(batch):
    model = detector("mobilenet_v2_fpn", mask_padding=True)
    twin = copy.deepcopy(model)
    assert twin._padding is not model._padding
    alone, together = alone_and_together(twin, batch[:2])
    assert_same_detections(alone, together, pixels=1e-3, scores=1e-3, at_least=5)


def test_it_is_one_graph_of_fixed_shapes(batch):
    model = detector("mobilenet_v2_fpn", mask_padding=True)
    opened, _, _ = model._open(batch[:2], None, False)
    torch._dynamo.reset()
    compiled = torch.compile(model.core, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _, found = compiled(opened.images, opened.sizes, None, opened.scales)
        _, expected = model.core(opened.images, opened.sizes, None, opened.scales)
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.boxes, expected.boxes)


def test_sizes_that_cannot_be_masked_are_refused(batch):
    for name, coarsest in (("mobilenet_v2", 16), ("resnet18_fpn", 32)):
        words = rf"mask_padding needs .* multiples of {coarsest}, but size_divisible is 8"
        with pytest.raises(ValueError, match=words):
            fastdet.FasterRCNN(name, 3, mask_padding=True, size_divisible=8)
    odd = fastdet.FasterRCNN("mobilenet_v2_fpn", 3, mask_padding=True, size_buckets=((300, 300),), **NUMBERS).eval()
    with pytest.raises(ValueError, match=r"the batch is padded to \(300, 300\)"):
        odd(batch)
    mask = padding.Mask()
    with pytest.raises(ValueError, match=r"pools to \(7, 7\)"):
        mask.attach(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((7, 7))))
    for layer in (torch.nn.GroupNorm(1, 3), torch.nn.InstanceNorm2d(3), torch.nn.ConvTranspose2d(3, 3, 2)):
        with pytest.raises(ValueError, match=f"is a {type(layer).__name__}, which has no mask"):
            mask.attach(torch.nn.Sequential(layer))


def test_extents():
    own = torch.tensor([[96, 128], [32, 160]])
    assert padding.extents(own, (128, 160), (16, 20)).tolist() == [[12, 16], [4, 20]]
    assert padding.extents(own, (128, 160), (2, 3)).tolist() == [[2, 2], [1, 3]], "a level that was rounded up"
    inside = padding.belonging(torch.tensor([[1, 2]]), (2, 3))
    assert inside.tolist() == [[[True, True, False], [False, False, False]]]
