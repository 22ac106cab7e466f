"""Numbers that an operation cannot hold are refused by name; numbers of other types are taken as torch takes them."""

import math
import re

import numpy as np
import pytest
import torch

from fastdet import ops

FEATURES, ROIS = torch.rand(1, 2, 8, 8), torch.tensor([[0, 1.0, 1, 5, 5]])
BOXES, SCORES = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 3], [6, 6, 9, 9.0]]), torch.tensor([0.9, 0.8, 0.7])
HEAD = torch.rand(1, 4, 2, 2), torch.rand(1, 1, 2, 2), BOXES[:1], torch.tensor([[9, 9]])
LABELS = torch.tensor([[1, 0, 0, 1]])


def align(**changes):
    return ops.roi_align(FEATURES, ROIS, **{"output_size": 2, **changes})


def pool(**changes):
    return ops.roi_pool(FEATURES, ROIS, **{"output_size": 2, **changes})


def pyramid(**changes):
    return ops.multiscale_roi_align([FEATURES], [ROIS[:, 1:]], **{"output_size": 2, "scales": [1.0], **changes})


def decode(**changes):
    return ops.decode(*HEAD, **{"stride": (4, 4), **changes})


def match(**changes):
    return ops.match(BOXES, BOXES[None], **{"high": 0.7, "low": 0.3, **changes})


def nms(**changes):
    return ops.nms(BOXES, SCORES, **{"iou_threshold": 0.5, **changes})


def padded(**changes):
    return ops.nms_padded(BOXES[None], SCORES[None], **{"iou_threshold": 0.5, "max_keep": 2, **changes})


def iou(**changes):
    return ops.distance_box_iou(BOXES, BOXES, **changes)


def sample(**changes):
    return ops.sample(LABELS, **{"num_samples": 2, "max_positive": 1, "seed": torch.tensor([3]), **changes})


HUGE = 10**400


@pytest.mark.parametrize(
    ("call", "changes"),
    [
        # torchvision's operator lists the samples of a box: the process ended there, or a number wrapped around.
        (align, {"sampling_ratio": 65536}),
        (align, {"sampling_ratio": 2**32 + 1}),
        (align, {"sampling_ratio": 600, "output_size": 2}),
        (align, {"sampling_ratio": -(2**31) - 1}),
        (align, {"output_size": 65536}),
        (pool, {"output_size": (2, 2**32 + 1)}),
        (pool, {"output_size": 2**31 - 1}),
        (pyramid, {"canonical_level": 2**31}),
        (pyramid, {"canonical_scale": 1e300}),
        (pool, {"spatial_scale": 1e39}),
        (pool, {"spatial_scale": HUGE}),
        (decode, {"min_side": 1e300}),
        (decode, {"min_side": HUGE}),
        (decode, {"clamp": -1e39}),
        (decode, {"stride": (2**31, 1)}),
        (match, {"weights": [1.0, 1, 1, 1e39]}),
        (nms, {"max_keep": 2**31}),
        (nms, {"iou_threshold": HUGE}),
        (padded, {"max_keep": HUGE}),
        (iou, {"eps": 1e39}),
        (sample, {"num_samples": 2**31}),
        (sample, {"max_positive": HUGE}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value),
)
def test_numbers_that_an_operation_cannot_hold_are_named(call, changes):
    argument = next(iter(changes))
    with pytest.raises(ValueError, match=rf"^{argument} must ") as caught:
        call(**changes)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("call", "argument", "value"),
    [
        (align, "sampling_ratio", 2),
        (align, "spatial_scale", 0.5),
        (align, "aligned", True),
        (align, "output_size", 3),
        (pyramid, "canonical_level", 4),
        (decode, "min_side", 3.0),
        (match, "high", 0.5),
        (nms, "iou_threshold", 0.5),
        (nms, "max_keep", 1),
        (padded, "max_keep", 1),
        (sample, "num_samples", 2),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_numbers_of_numpy_and_tensors_without_dimensions(call, argument, value):
    wanted = call(**{argument: value})
    kinds = {int: [np.int64, np.int16], float: [np.float64, np.float32], bool: [np.bool_, int]}[type(value)]
    for given in [torch.tensor(value), *(kind(value) for kind in kinds)]:
        if argument != "output_size" or not isinstance(given, torch.Tensor):
            found = call(**{argument: given})
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    with pytest.raises((TypeError, ValueError), match=rf"^{argument} must ") as caught:
        call(**{argument: torch.tensor([value, value])})
    if argument not in ("output_size", "min_side"):
        assert str(caught.value).endswith("got a tensor of the shape [2]")


def test_tensors_whose_value_is_not_known_are_named():
    with pytest.raises(TypeError, match=r"^spatial_scale must be a number, got a tensor whose value is not known$"):
        torch.vmap(lambda scale: align(spatial_scale=scale))(torch.ones(3))


@pytest.mark.parametrize("value", [True, "1", None, 1j, [0.5]])
@pytest.mark.parametrize("argument", ["iou_threshold"])
def test_what_is_no_number_is_named(argument, value):
    with pytest.raises(TypeError, match=f"^{argument} must be a number, got {re.escape(repr(value))}"):
        nms(**{argument: value})


def test_suppression_needs_values():
    with pytest.raises(ValueError, match=r"^boxes is on the meta device"):
        ops.nms(BOXES.to("meta"), SCORES.to("meta"), 0.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [30, 150, 400])
def test_boxes_whose_sums_and_areas_overflow_give_no_warning(count):
    """NumPy warns where torch does not."""
    infinite = [[-math.inf, 0, math.inf, 1], [math.nan, 0, 1, 1]]
    huge = [[1e19, 1e19, 2.5e19, 2.7e19], [-3e38, -3e38, -2.9e38, -2.9e38], [3e38, 0, 3.2e38, 1], [-3e38, 0, -2e38, 1]]
    for special in (infinite, huge):
        boxes = torch.tensor([*special, [0, 0, 9, 9]]).repeat(count, 1)[:count]
        for groups in (1, 2, 60):
            ops.batched_nms(boxes, torch.rand(count), torch.arange(count) % groups, 0.5)
        ops.nms(boxes, torch.rand(count), 0.5)
        ops.nms_padded(boxes[None], torch.rand(1, count), 0.5, count)
        ops.box_iou(boxes, boxes)
        ops.generalized_box_iou(boxes, boxes)
        ignored = torch.ones(1, count, dtype=torch.bool)
        ops.match(boxes, boxes[None], high=0.7, low=0.3, allow_low_quality=True, gt_ignore=ignored)
