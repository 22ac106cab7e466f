"""Pairwise overlap of boxes, batched: IoU, generalized, distance and complete IoU.

Sources: generalized, Rezatofighi et al. 2019 (arXiv:1902.09630), section 3; distance and complete, Zheng et al. 2020
(arXiv:1911.08287), sections 3.1 and 3.2.
"""

import math

import torch
import torchvision.ops
from torch import Tensor

from fastdet.ops import _checks
from fastdet.ops._library import call_below_autograd, define, needs_derivative, overridable
from fastdet.ops.cpu.box_iou import angles, box_iou_cpu, few_pairs, pairwise
from fastdet.ops.cpu.overlap import TILE


def box_iou_cuda(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float) -> Tensor:
    from fastdet.kernels import box_iou as kernel

    out = box_iou_fake(boxes1, boxes2)
    if out.numel():
        boxes1, boxes2 = boxes1.contiguous(), boxes2.contiguous()
        # The kernel reads the angles only for this kind; for the others any tensor will do.
        angle1, angle2 = (angles(boxes1), angles(boxes2)) if kind == "complete" else (boxes1, boxes2)
        kernel.launch(boxes1, boxes2, angle1, angle2, out, kind=kind, eps=eps)
    return out


def box_iou_fake(boxes1: Tensor, boxes2: Tensor, *_: object) -> Tensor:
    return boxes1.new_empty(boxes1.shape[0], boxes1.shape[1], boxes2.shape[1])


def box_iou_autograd(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float) -> Tensor:
    if needs_derivative(boxes1, boxes2):
        return pairwise(boxes1, boxes2, kind, eps)
    return call_below_autograd(torch.ops.fastdet.box_iou, boxes1, boxes2, kind, eps)


define(
    "box_iou(Tensor boxes1, Tensor boxes2, str kind, float eps) -> Tensor",
    cpu=box_iou_cpu,
    cuda=box_iou_cuda,
    fake=box_iou_fake,
    autograd=box_iou_autograd,
)


def _box_iou(boxes1: Tensor, boxes2: Tensor, kind: str, eps: float = 1e-7) -> Tensor:
    boxes1 = _checks.boxes("boxes1", boxes1, ndim=None, double=True, whole=True)
    boxes2 = _checks.boxes("boxes2", boxes2, ndim=None, double=True, whole=True)
    _checks.same_device(boxes1=boxes1, boxes2=boxes2)
    dtype = torch.promote_types(boxes1.dtype, boxes2.dtype)
    boxes1, boxes2 = boxes1.to(dtype), boxes2.to(dtype)
    if boxes1.shape[:-2] != boxes2.shape[:-2]:
        boxes1, boxes2 = _broadcast(boxes1, boxes2)
    eps = _checks.fp32("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    if _use_plain_formula(boxes1, boxes2):
        plain = boxes1.ndim == 2 and dtype == torch.float32 and not _checks.is_recorded(boxes1)
        if plain and kind in ("iou", "generalized") and boxes1.is_cpu and not needs_derivative(boxes1, boxes2):
            return few_pairs(boxes1, boxes2, kind)
        return pairwise(boxes1, boxes2, kind, eps)
    batch, num_boxes1, num_boxes2 = boxes1.shape[:-2], boxes1.shape[-2], boxes2.shape[-2]
    size = math.prod(batch)
    out = torch.ops.fastdet.box_iou(boxes1.reshape(size, num_boxes1, 4), boxes2.reshape(size, num_boxes2, 4), kind, eps)
    return out.reshape(*batch, num_boxes1, num_boxes2)


def _broadcast(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """The two with the same leading dimensions."""
    try:
        leading = torch.broadcast_shapes(boxes1.shape[:-2], boxes2.shape[:-2])
    except RuntimeError:
        shapes = f"{list(boxes1.shape)} and {list(boxes2.shape)}"
        raise ValueError(f"the leading dimensions of boxes1 and boxes2 must broadcast, got {shapes}") from None
    return boxes1.expand(*leading, -1, -1), boxes2.expand(*leading, -1, -1)


def _to_corners(name: str, boxes: Tensor, fmt: str) -> Tensor:
    if fmt not in ("xywh", "cxcywh"):
        raise ValueError(f"fmt must be xyxy, xywh or cxcywh, got {fmt!r}; torchvision.ops.box_iou takes rotated boxes")
    return torchvision.ops.box_convert(_checks.boxes(name, boxes, None, double=True, whole=True), fmt, "xyxy")


def _use_plain_formula(boxes1: Tensor, boxes2: Tensor) -> bool:
    """For float64, which checks need, not large matrices; and for one tile on the CPU, which takes less time than the
    call of an operator."""
    if boxes1.dtype == torch.float64:
        return True
    # In a compiled graph a comparison would specialize a symbolic size.
    small = boxes1.device.type == "cpu" and not torch.compiler.is_compiling()
    return small and boxes1.numel() // 4 * boxes2.shape[-2] <= TILE


@overridable
def box_iou(boxes1: Tensor, boxes2: Tensor, fmt: str = "xyxy") -> Tensor:
    """Intersection over union of every pair. Differentiable.

    Args:
        boxes1: [..., N, 4], x1, y1, x2, y2 in pixels, continuous (no + 1): floating point or whole numbers.
        boxes2: [..., M, 4], likewise; the leading dimensions of the two broadcast.
        fmt: "xyxy", or "xywh" or "cxcywh" for boxes of the upper left corner, or the center, and the sides.

    Returns:
        [..., N, M] in [0, 1], float64 where one of the two is and else fp32, also in computation. 0 for a pair whose
        ratio is undefined (a degenerate box: 0/0; NaN or infinite corners).

    Raises:
        TypeError: an argument is not a tensor of real numbers.
        ValueError: last dimension not 4, leading dimensions that do not broadcast, devices that differ, another `fmt`.
    """
    if fmt != "xyxy":
        boxes1, boxes2 = _to_corners("boxes1", boxes1, fmt), _to_corners("boxes2", boxes2, fmt)
    return _box_iou(boxes1, boxes2, "iou")


@overridable
def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU less the share of the common hull that neither box covers; arguments and errors as of `box_iou`.

    Returns:
        [..., N, M], in [-1, 1] for boxes that have an area.
    """
    return _box_iou(boxes1, boxes2, "generalized")


@overridable
def distance_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """IoU less the squared distance of the centers over the squared diagonal of the hull; else as `box_iou`.

    `eps`, in square pixels, finite and not negative, is added to the squared diagonal.
    """
    return _box_iou(boxes1, boxes2, "distance", eps)


@overridable
def complete_box_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """`distance_box_iou` less a term for the difference of the aspect ratios, whose denominator has `eps` added too."""
    return _box_iou(boxes1, boxes2, "complete", eps)
