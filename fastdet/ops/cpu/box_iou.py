"""Pairwise overlap in plain torch, which serves gradients and float64, and in tiles on the CPU."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastdet.ops.cpu.overlap import TILE, few_generalized_ious, few_ious, iou, reset_invalid, to_planes, valid_planes


def pairwise(boxes1: Tensor, boxes2: Tensor, kind: str = "iou", eps: float = 1e-7) -> Tensor:
    """The formula in plain torch, differentiable: [..., N, 4] and [..., M, 4] give [..., N, M]."""
    first, second = boxes1[..., :, None, :], boxes2[..., None, :, :]
    if kind not in ("iou", "generalized"):
        return _similarity(_planes(first, kind), _planes(second, kind), kind, eps)
    # A box that is not finite is 0 to all, and has no part in the gradient either.
    finite1, finite2 = (boxes.isfinite().all(-1, keepdim=True) for boxes in (first, second))
    first, second = torch.where(finite1, first, 0.0), torch.where(finite2, second, 0.0)
    value = _similarity(_planes(first, kind), _planes(second, kind), kind, eps)
    # To a point the generalized IoU is not 0.
    return value if kind == "iou" else torch.where((finite1 & finite2)[..., 0], value, 0.0)


@np.errstate(all="ignore")
def few_pairs(boxes1: Tensor, boxes2: Tensor, kind: str) -> Tensor:
    """IoU, also "generalized", of few fp32 boxes [N, 4] and [M, 4], without derivatives."""
    corners1, corners2 = (boxes.detach().resolve_neg().numpy() for boxes in (boxes1, boxes2))
    if kind == "generalized":
        return torch.from_numpy(few_generalized_ious(corners1, corners2))
    planes1, planes2 = valid_planes(corners1), valid_planes(corners2)
    return torch.from_numpy(few_ious(planes1[:, :, None], planes2[:, None]))


def angles(boxes: Tensor) -> Tensor:
    """atan(width / height) of `boxes` [..., 4], in radians; 0 for a point."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    # Not the angle of a direction: a box inverted along both axes has the shape that it has otherwise.
    return torch.atan2(torch.where(height < 0, -width, width), torch.where(height < 0, -height, height))


def _planes(boxes: Tensor, kind: str) -> tuple[Tensor, ...]:
    """x1, y1, x2, y2, area and, for "complete", the angle of `boxes` [..., 4], apart."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    angle = (angles(boxes),) if kind == "complete" else ()
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1), *angle


def _similarity(first: Sequence[Tensor], second: Sequence[Tensor], kind: str, eps: float) -> Tensor:
    """The similarity of `kind` of the boxes of two sets of planes, which broadcast."""
    ax1, ay1, ax2, ay2, area1 = first[:5]
    bx1, by1, bx2, by2, area2 = second[:5]
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    inter = width * height
    union = area1 + area2 - inter
    value = _ratio_or_zero(inter, union)
    if kind == "iou":
        return value
    hull_width = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)).clamp(min=0)
    hull_height = (torch.maximum(ay2, by2) - torch.minimum(ay1, by1)).clamp(min=0)
    if kind == "generalized":
        hull = hull_width * hull_height
        uncovered = _ratio_or_zero(hull - union, hull)
        # Of an inverted box with an infinite side it is infinite, and the IoU 0.
        return torch.where(uncovered < math.inf, value - uncovered, 0.0)
    dx = (ax1 + ax2 - bx1 - bx2) * 0.5
    dy = (ay1 + ay2 - by1 - by2) * 0.5
    distance = (dx * dx + dy * dy) / (hull_width * hull_width + hull_height * hull_height + eps)
    if kind == "complete":
        turn = first[5] - second[5]
        aspect = 4 / math.pi**2 * turn * turn
        # The trade-off weight is a constant to the gradient: section 3.2, equation 12.
        weight = (aspect / (1 - value + aspect + eps)).detach()
        distance = distance + weight * aspect
    return value - distance


def _ratio_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    # Never by 0: a gradient would be NaN even where the ratio is not used.
    ratio = numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny)
    # A ratio of 0 has a gradient: a hull that equals the union may grow.
    return torch.where((ratio >= 0) & (denominator > 0), ratio, 0.0)


def box_iou_cpu(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float) -> Tensor:
    out = boxes1.new_empty(*boxes1.shape[:2], boxes2.shape[1])
    if kind == "iou":
        planes1, planes2 = (reset_invalid(to_planes(boxes)) for boxes in (boxes1, boxes2))
    else:
        planes1, planes2 = (torch.stack(_planes(boxes, kind)) for boxes in (boxes1, boxes2))
    scratch = out.new_empty(2, TILE)
    for image, row, column in _tiles(out.shape):
        tile = out[image, row, column]
        first, second = planes1[:, image, row, None].unbind(), planes2[:, image, None, column].unbind()
        if kind == "iou":
            iou(first, second, (tile, *scratch[:, : tile.numel()].view(2, *tile.shape).unbind()))
        else:
            tile.copy_(_similarity(first, second, kind, eps))
    return out


def _tiles(shape: Sequence[int]) -> list[tuple[slice, slice, slice]]:
    """Parts of at most TILE elements of an array of three dimensions, none of them 0: as many whole rows as fit."""
    parts, capacity = [], TILE
    for size in reversed(shape):
        step = max(min(size, capacity), 1)
        parts.append([slice(start, start + step) for start in range(0, size, step)])
        capacity //= step
    return list(itertools.product(*reversed(parts)))
