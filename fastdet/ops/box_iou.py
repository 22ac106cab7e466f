"""Pairwise overlap of boxes, batched: IoU, generalized, distance and complete IoU.

Sources: generalized, Rezatofighi et al. 2019 (arXiv:1902.09630), section 3; distance and complete, Zheng et al. 2020
(arXiv:1911.08287), sections 3.1 and 3.2.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdet.ops import _checks
from fastdet.ops._library import define
from fastdet.ops.cpu.overlap import TILE, iou, make_proper


def pairwise(boxes1: Tensor, boxes2: Tensor, kind: str = "iou", eps: float = 1e-7) -> Tensor:
    """The formula in plain torch, differentiable: [..., N, 4] and [..., M, 4] give [..., N, M]."""
    if kind == "iou":
        # What is not finite overlaps nothing, and has no part in the gradient either.
        boxes1, boxes2 = (torch.where(boxes.isfinite().all(-1, keepdim=True), boxes, 0.0) for boxes in (boxes1, boxes2))
    return _overlap(_planes(boxes1[..., :, None, :], kind), _planes(boxes2[..., None, :, :], kind), kind, eps)


def _planes(boxes: Tensor, kind: str) -> tuple[Tensor, ...]:
    """x1, y1, x2, y2, area and, for "complete", atan(width / height) of `boxes` [..., 4], apart."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    angle = (_angle(boxes),) if kind == "complete" else ()
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1), *angle


def _angle(boxes: Tensor) -> Tensor:
    return torch.atan2(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])


def _overlap(first: Sequence[Tensor], second: Sequence[Tensor], kind: str, eps: float) -> Tensor:
    """What `kind` says of the boxes of two sets of planes, which broadcast."""
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
        return value - _ratio_or_zero(hull - union, hull)
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
    # Never by 0: a gradient would be NaN even where the ratio is not taken.
    ratio = numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny)
    return torch.where(ratio > 0, ratio, 0.0)


def box_iou_cpu(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float) -> Tensor:
    out = box_iou_fake(boxes1, boxes2, kind, eps)
    first, second = torch.stack(_planes(boxes1, kind), 1), torch.stack(_planes(boxes2, kind), 1)
    if kind == "iou":
        make_proper(first.unbind(1))
        make_proper(second.unbind(1))
    spare = out.new_empty(2, TILE)
    for image, row, column in _tiles(out.shape):
        tile = out[image, row, column]
        some, others = first[image, :, row, None].unbind(1), second[image, :, None, column].unbind(1)
        if kind == "iou":
            iou(some, others, (tile, *spare[:, : tile.numel()].view(2, *tile.shape).unbind()))
        else:
            tile.copy_(_overlap(some, others, kind, eps))
    return out


def _tiles(shape: Sequence[int]) -> list[tuple[slice, slice, slice]]:
    """Parts of at most TILE elements of an array of three dimensions, none of them 0: as many whole rows as fit."""
    parts, room = [], TILE
    for size in reversed(shape):
        step = max(min(size, room), 1)
        parts.append([slice(start, start + step) for start in range(0, size, step)])
        room //= step
    return list(itertools.product(*reversed(parts)))


def box_iou_cuda(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float) -> Tensor:
    from fastdet.kernels import box_iou as kernel

    out = box_iou_fake(boxes1, boxes2, kind, eps)
    if out.numel():
        boxes1, boxes2 = boxes1.contiguous(), boxes2.contiguous()
        # The kernel reads the angles only where they matter; elsewhere any tensor fills the place.
        angle1, angle2 = (_angle(boxes1), _angle(boxes2)) if kind == "complete" else (boxes1, boxes2)
        kernel.launch(boxes1, boxes2, angle1, angle2, out, kind=kind, eps=eps)
    return out


def box_iou_fake(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float) -> Tensor:
    return boxes1.new_empty(boxes1.shape[0], boxes1.shape[1], boxes2.shape[1])


define(
    "box_iou(Tensor boxes1, Tensor boxes2, str kind, float eps) -> Tensor",
    cpu=box_iou_cpu,
    cuda=box_iou_cuda,
    fake=box_iou_fake,
)


def _public(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float = 1e-7) -> Tensor:
    _checks.same_dtype(boxes1=boxes1, boxes2=boxes2)
    boxes1 = _checks.boxes("boxes1", boxes1, ndim=None, double=True)
    boxes2 = _checks.boxes("boxes2", boxes2, ndim=None, double=True)
    _checks.same_device(boxes1=boxes1, boxes2=boxes2)
    if boxes1.shape[:-2] != boxes2.shape[:-2]:
        shapes = f"{list(boxes1.shape)} and {list(boxes2.shape)}"
        raise ValueError(f"boxes1 and boxes2 must have the same leading dimensions, got {shapes}")
    if not 0 <= _checks.number("eps", eps) < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    eps = float(eps)
    if _is_plain(boxes1, boxes2):
        return pairwise(boxes1, boxes2, kind, eps)
    batch, num_boxes1, num_boxes2 = boxes1.shape[:-2], boxes1.shape[-2], boxes2.shape[-2]
    size = math.prod(batch)
    out = torch.ops.fastdet.box_iou(boxes1.reshape(size, num_boxes1, 4), boxes2.reshape(size, num_boxes2, 4), kind, eps)
    return out.reshape(*batch, num_boxes1, num_boxes2)


def _is_plain(boxes1: Tensor, boxes2: Tensor) -> bool:
    """Whether the plain formula will do: float64 and gradients are for checks and losses, not for large matrices, and a
    matrix of one tile on the CPU is done before the operator is called."""
    if boxes1.dtype == torch.float64 or (torch.is_grad_enabled() and (boxes1.requires_grad or boxes2.requires_grad)):
        return True
    # Compiled, the size may be a symbol, which is better not asked.
    small = boxes1.device.type == "cpu" and not torch.compiler.is_compiling()
    return small and boxes1.numel() // 4 * boxes2.shape[-2] <= TILE


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair, [..., N, 4] and [..., M, 4] to [..., N, M].

    Boxes are x1, y1, x2, y2 in pixels, continuous (no + 1). fp16 and bf16 are computed and returned in fp32, float64 in
    float64. A pair whose ratio is undefined (a degenerate box: 0/0; NaN or infinite corners) has IoU 0. Differentiable.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the two differ in dtype.
        ValueError: last dimension not 4, leading dimensions or devices that differ.
    """
    return _public(boxes1, boxes2, "iou")


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU less the share of the common hull that neither box covers; else as `box_iou`.

    In [-1, 1] for boxes that have an area.
    """
    return _public(boxes1, boxes2, "generalized")


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU less the squared distance of the centres over the squared diagonal of the hull; else as `box_iou`."""
    return _public(boxes1, boxes2, "distance", eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """`distance_box_iou` less a term for the difference of the aspect ratios; else as `box_iou`."""
    return _public(boxes1, boxes2, "complete", eps)
