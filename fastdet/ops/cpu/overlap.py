"""Overlaps of boxes on the CPU, tile by tile: the arithmetic that `box_iou`, `match` and `nms` share there."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Pairs of a tile: few enough for a core's cache, and for torch to run an operator on one thread, without the cost of
# synchronizing threads.
TILE = 32 * 1024 - 1
# Exponents of the sides of boxes that can be scaled apart, before and after it: no area, nor a part of one as small as
# the least threshold, is beyond fp32's normal numbers.
_LOW, _HIGH = -40, 60
_LEAST_THRESHOLD = 2.0**-20

Planes = Sequence[Tensor]  # x1, y1, x2, y2 and area, apart
Scratch = Sequence[Tensor]  # three tensors of the shape of the result


def to_planes(boxes: Tensor, out: Tensor | None = None) -> Tensor:
    """x1, y1, x2, y2 and area of `boxes` [..., 4], apart: [5, ...]."""
    planes = boxes.new_empty(5, *boxes.shape[:-1]) if out is None else out
    planes[:4] = boxes.movedim(-1, 0)
    torch.mul(planes[2] - planes[0], planes[3] - planes[1], out=planes[4])
    return planes


def reset_invalid(planes: Tensor, valid: Tensor | None = None) -> Tensor:
    """`planes`, in which each box that overlaps nothing (inverted, without area, not finite, not `valid`) is moved to
    the origin.

    There it has no extent, but an area of 1: no tile has to test for it, nor for NaN.
    """
    overlapping = (planes[4] > 0) & (planes[4] < math.inf) & (planes[2] > planes[0])
    if valid is not None:
        overlapping &= valid
    if not overlapping.all():
        planes.masked_fill_(~overlapping, 0.0)
        planes[4].masked_fill_(~overlapping, 1.0)
    return planes


def intersection(first: Planes, second: Planes, scratch: Scratch) -> Tensor:
    """Shared areas of boxes, none of them invalid, which broadcast, in the first tensor of `scratch`.

    What two intervals share is one of them clamped to the other. The last dimension should be that of `second`.
    """
    ax1, ay1, ax2, ay2, _ = first
    bx1, by1, bx2, by2, _ = second
    out, low, height = scratch
    torch.clamp(ax2, bx1, bx2, out=out).sub_(torch.clamp(ax1, bx1, bx2, out=low))
    torch.clamp(ay2, by1, by2, out=height).sub_(torch.clamp(ay1, by1, by2, out=low))
    return out.mul_(height)


def iou(first: Planes, second: Planes, scratch: Scratch) -> Tensor:
    """IoU, rounded at each step as the kernels round; else as `intersection`."""
    inter = intersection(first, second, scratch)
    return inter.div_(torch.add(first[4], second[4], out=scratch[1]).sub_(inter))


# The functions in NumPy run under `np.errstate(all="ignore")` of their callers: boxes may be NaN, infinite or huge.
Array = NDArray[np.float32]


def few_planes(boxes: Array) -> Array:
    """`to_planes` of `boxes` [N, 4], [5, N], in NumPy, whose calls take less time than torch's."""
    planes = np.empty((5, len(boxes)), np.float32)
    planes[:4] = boxes.T
    np.multiply(planes[2] - planes[0], planes[3] - planes[1], out=planes[4])
    return planes


def valid_planes(boxes: Array, valid: NDArray[np.bool_] | None = None) -> Array:
    """`reset_invalid` of `few_planes`."""
    planes = few_planes(boxes)
    overlapping = (planes[4] > 0) & (planes[4] < np.inf) & (planes[2] > planes[0])
    if valid is not None:
        overlapping &= valid
    if not overlapping.all():
        planes[:4, ~overlapping] = 0
        planes[4, ~overlapping] = 1
    return planes


def few_intersections(first: Array, second: Array) -> Array:
    """`intersection` of few pairs of boxes [5, ...], which broadcast, in NumPy: both axes of a box in one call."""
    side = np.minimum(first[2:4], second[2:4])
    side -= np.maximum(first[:2], second[:2])
    np.maximum(side, 0, out=side)
    return np.multiply(side[0], side[1], out=side[0])


def few_ious(first: Array, second: Array) -> Array:
    """`iou` of few pairs of boxes [5, ...], which broadcast, in NumPy."""
    inter = few_intersections(first, second)
    union = first[4] + second[4]
    union -= inter
    inter /= union
    return inter


def few_generalized_ious(boxes1: Array, boxes2: Array) -> Array:
    """Generalized IoU [N, M] of `boxes1` [N, 4] and `boxes2` [M, 4], with the steps of `pairwise`, in NumPy."""
    first, second = few_planes(boxes1)[:, :, None], few_planes(boxes2)[:, None]
    inter = few_intersections(first, second)
    union = first[4] + second[4]
    union -= inter
    side = np.maximum(first[2:4], second[2:4])
    side -= np.minimum(first[:2], second[:2])
    np.maximum(side, 0, out=side)
    hull = np.multiply(side[0], side[1], out=side[0])
    uncovered = _ratio_or_zero(hull - union, hull)
    # Of an inverted box with an infinite side it is infinite, and the IoU 0.
    return np.where(uncovered < np.inf, _ratio_or_zero(inter, union) - uncovered, np.float32(0))


def _ratio_or_zero(numerator: Array, denominator: Array) -> Array:
    """0 where it is negative or undefined."""
    ratio = numerator / np.maximum(denominator, np.finfo(np.float32).tiny)
    return np.where((ratio >= 0) & (denominator > 0), ratio, np.float32(0))


def scale_apart(boxes: Tensor, ids: Tensor, groups: list[int], threshold: float) -> Tensor | None:
    """The boxes [N, 4], each group multiplied by a power of two of its own, so that no two of them overlap by more than
    `threshold`; None if there are no such powers, or a box without area or not finite.

    `ids` int64 [N] are those of `groups`, which ascend. Within a group no overlap changes by a bit: a power of two only
    changes exponents. Of two groups the overlap is at most the ratio of the smaller box's area to the larger one's.
    """
    begin, end = boxes.tensor_split(2, 1)
    least, most = (bound.item() for bound in (end - begin).aminmax())
    if not (least >= 2.0**_LOW and most < 2.0**_HIGH and threshold >= _LEAST_THRESHOLD):
        return None
    low, high = math.frexp(least)[1], math.frexp(most)[1]
    # Between two groups: areas are in the ratio of 2 ** (2 * (high - low + 1)) at most.
    step = high - low + 2 + (1 - math.frexp(threshold)[1]) // 2
    first = _LOW - low + 1
    last = first + step * (len(groups) - 1)
    if high + last > _HIGH:
        return None
    factors = np.array([2.0**exponent for exponent in range(first, last + 1, step)], np.float32)
    if groups[-1] - groups[0] < len(groups):
        place = ids - groups[0]
    else:
        place = torch.from_numpy(np.searchsorted(groups, ids.numpy()))
    return boxes * torch.from_numpy(factors).take(place)[:, None]
