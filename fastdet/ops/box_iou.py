"""Pairwise overlap of boxes, batched: IoU, generalized, distance and complete IoU.

Sources: generalized, Rezatofighi et al. 2019 (arXiv:1902.09630), section 3; distance and complete, Zheng et al. 2020
(arXiv:1911.08287), sections 3.1 and 3.2.
"""

import math

import torch
from torch import Tensor

from . import _checks
from ._library import define


def _ratio_or_zero(numerator: Tensor, denominator: Tensor) -> Tensor:
    ratio = numerator / denominator
    return torch.where(ratio > 0, ratio, 0.0)


def pairwise(boxes1: Tensor, boxes2: Tensor, kind: str = "iou", eps: float = 1e-7) -> Tensor:
    """The formula in plain torch, differentiable: [..., N, 4] and [..., M, 4] give [..., N, M]."""
    ax1, ay1, ax2, ay2 = boxes1[..., :, None, :].unbind(-1)
    bx1, by1, bx2, by2 = boxes2[..., None, :, :].unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    inter = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
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
        turn = _aspect_angle(boxes1)[..., :, None] - _aspect_angle(boxes2)[..., None, :]
        aspect = 4 / math.pi**2 * turn * turn
        # The trade-off weight is a constant to the gradient: section 3.2, equation 12.
        weight = (aspect / (1 - value + aspect + eps)).detach()
        distance = distance + weight * aspect
    return value - distance


def _aspect_angle(boxes: Tensor) -> Tensor:
    return torch.atan2(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])


def box_iou_cuda(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float) -> Tensor:
    from fastdet.kernels import box_iou as kernel

    out = box_iou_fake(boxes1, boxes2, kind, eps)
    if out.numel():
        boxes1, boxes2 = boxes1.contiguous(), boxes2.contiguous()
        # The kernel reads the angles only where they matter; elsewhere any tensor fills the place.
        angle1, angle2 = (_aspect_angle(boxes1), _aspect_angle(boxes2)) if kind == "complete" else (boxes1, boxes2)
        kernel.launch(boxes1, boxes2, angle1, angle2, out, kind=kind, eps=eps)
    return out


def box_iou_fake(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float) -> Tensor:
    return boxes1.new_empty(boxes1.shape[0], boxes1.shape[1], boxes2.shape[1])


define(
    "box_iou(Tensor boxes1, Tensor boxes2, str kind, float eps) -> Tensor",
    cpu=pairwise,
    cuda=box_iou_cuda,
    fake=box_iou_fake,
)


def _public(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float = 1e-7) -> Tensor:
    # float64 and gradients take the plain formula: they are for checks and losses, not for large matrices.
    plain = all(isinstance(boxes, Tensor) and boxes.dtype == torch.float64 for boxes in (boxes1, boxes2))
    if not plain:
        boxes1 = _checks.boxes("boxes1", boxes1, ndim=None)
        boxes2 = _checks.boxes("boxes2", boxes2, ndim=None)
    _checks.same_device(boxes1=boxes1, boxes2=boxes2)
    if boxes1.shape[:-2] != boxes2.shape[:-2]:
        shapes = f"{list(boxes1.shape)} and {list(boxes2.shape)}"
        raise ValueError(f"boxes1 and boxes2 must have the same leading dimensions, got {shapes}")
    if plain or (torch.is_grad_enabled() and (boxes1.requires_grad or boxes2.requires_grad)):
        return pairwise(boxes1, boxes2, kind, eps)
    batch, num_boxes1, num_boxes2 = boxes1.shape[:-2], boxes1.shape[-2], boxes2.shape[-2]
    size = math.prod(batch)
    out = torch.ops.fastdet.box_iou(boxes1.reshape(size, num_boxes1, 4), boxes2.reshape(size, num_boxes2, 4), kind, eps)
    return out.reshape(*batch, num_boxes1, num_boxes2)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair, [..., N, 4] and [..., M, 4] to [..., N, M].

    Boxes are x1, y1, x2, y2 in pixels, continuous (no + 1). fp16 and bf16 are computed and returned in fp32. A pair
    whose ratio is undefined (a degenerate box: 0/0; NaN or infinite corners) has IoU 0. Differentiable.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: last dimension not 4, leading dimensions or devices that differ.
    """
    return _public(boxes1, boxes2, "iou")


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU less the share of the common hull that neither box covers, in [-1, 1]; else as `box_iou`."""
    return _public(boxes1, boxes2, "generalized")


def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU less the squared distance of the centres over the squared diagonal of the hull; else as `box_iou`."""
    return _public(boxes1, boxes2, "distance", eps)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """`distance_box_iou` less a term for the difference of the aspect ratios; else as `box_iou`."""
    return _public(boxes1, boxes2, "complete", eps)
