"""Greedy non-maximum suppression: exact, batched over groups, of fixed shape inside, torchvision's call outside.

The reference is `torchvision.ops.nms` on the CPU, index for index: it compares an fp32 IoU with a float64 threshold.
An fp32 number exceeds a float64 threshold exactly if it exceeds that threshold rounded down to fp32, so one rounding on
the host makes every fp32 comparison decide alike.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torchvision.ops  # noqa: F401  (registers the operator that the CPU implementation calls)
from torch import Tensor

from . import _checks
from ._library import define

# On the CPU: pairs compared at a time, just below what torch shares among threads, so that a tile stays in a core's
# cache and no operator waits for another thread; boxes filtered at a time; and how many need no filter.
_TILE = 32767
_BLOCK = 192
_FEW = 600


class Kept(NamedTuple):
    """`index` int64 [groups, max_keep], padded with 0; `count` int64 [groups]."""

    index: Tensor  # type: ignore[assignment]
    count: Tensor  # type: ignore[assignment]


def fp32_below(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`."""
    nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf)))


def nms_cpu(boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> tuple[Tensor, Tensor]:
    groups = boxes.shape[0]
    index, count = boxes.new_zeros(groups, max_keep, dtype=torch.int64), boxes.new_zeros(groups, dtype=torch.int64)
    if max_keep:
        for group in range(groups):
            kept = _suppress(boxes[group], valid[group].nonzero()[:, 0], iou_threshold, max_keep)
            index[group, : len(kept)] = kept
            count[group] = len(kept)
    return index, count


def _suppress(boxes: Tensor, rows: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    """What `rows` of `boxes` [N, 4] keep, ascending: torchvision's operator is the fastest there is for a few."""
    if len(rows) > _FEW:
        return _suppress_many(boxes, rows, iou_threshold, max_keep)
    few = boxes[rows]
    finite = few.isfinite().all(1)
    return rows[finite][_settle(few[finite], iou_threshold)[:max_keep]]


def _settle(boxes: Tensor, iou_threshold: float) -> Tensor:
    priority = torch.arange(len(boxes), 0, -1, dtype=boxes.dtype)
    return torch.ops.torchvision.nms(boxes, priority, iou_threshold)


def _suppress_many(boxes: Tensor, rows: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    """The same, a block at a time: first against all boxes kept so far, then what is left among itself."""
    planes = _planes(boxes, rows)
    threshold = fp32_below(iou_threshold)
    kept, found, most = planes.new_empty(5, min(max_keep, len(rows))), [], 0
    for start in range(0, len(rows), _BLOCK):
        block = planes[:, start : start + _BLOCK]
        left, first = start + block[:4].isfinite().all(0).nonzero()[:, 0], 0
        while first < most and len(left):
            last = min(first + _TILE // len(left), most)
            left = left[_overlapping(planes[:, left], kept[:, first:last], threshold) == 0]
            first = last
        left = left[_settle(planes[:4, left].t(), iou_threshold)[: max_keep - most]]
        found.append(rows[left])
        kept[:, most : most + len(left)] = planes[:, left]
        most += len(left)
        if most == max_keep:
            break
    return torch.cat(found)


def _planes(boxes: Tensor, rows: Tensor) -> Tensor:
    """x1, y1, x2, y2 and area of `rows` [M] of `boxes` [N, 4], apart: [5, M]."""
    planes = boxes.new_empty(5, len(rows))
    for plane, corner in zip(planes, boxes.unbind(1), strict=False):
        torch.index_select(corner, 0, rows, out=plane)
    torch.mul(planes[2] - planes[0], planes[3] - planes[1], out=planes[4])
    return planes


def _overlapping(first: Tensor, second: Tensor, threshold: float) -> Tensor:
    """With how many boxes of `second` [5, N] the IoU of each of `first` [5, M] exceeds the threshold: fp32 [M].

    The arithmetic of `box_iou`, in place, and numbers instead of booleans, because sums are what is fast on a CPU.
    """
    ax1, ay1, ax2, ay2, area1 = first[:, :, None]
    bx1, by1, bx2, by2, area2 = second[:, None]
    inter = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    inter *= torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    return inter.div_((area1 + area2).sub_(inter)).gt_(threshold).sum(1)


def nms_cuda(boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> tuple[Tensor, Tensor]:
    from fastdet.kernels import nms as kernel

    groups, num_boxes, _ = boxes.shape
    index, count = boxes.new_zeros(groups, max_keep, dtype=torch.int64), boxes.new_zeros(groups, dtype=torch.int64)
    if index.numel() and num_boxes:
        config = kernel.config(num_boxes)
        kernel.launch(
            boxes.contiguous(),
            valid.contiguous(),
            alive=boxes.new_empty(groups, config.chunk, dtype=torch.int8),
            overlap=boxes.new_empty(groups, config.chunk // 32, config.chunk, dtype=torch.int32),
            kept=boxes.new_empty(groups, max_keep, 4),
            index=index,
            count=count,
            iou_threshold=fp32_below(iou_threshold),
            config=config,
        )
    return index, count


def nms_fake(boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> tuple[Tensor, Tensor]:
    groups = boxes.shape[0]
    return boxes.new_empty(groups, max_keep, dtype=torch.int64), boxes.new_empty(groups, dtype=torch.int64)


define(
    "nms(Tensor boxes, Tensor valid, float iou_threshold, SymInt max_keep) -> (Tensor, Tensor)",
    cpu=nms_cpu,
    cuda=nms_cuda,
    fake=nms_fake,
)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_keep: int,
    valid: Tensor | None = None,
    presorted: bool = False,
) -> Kept:
    """Suppress within each group of a padded batch, in fixed shapes and without a wait: the form for inside a model.

    Args:
        boxes: fp32 [groups, N, 4], x1, y1, x2, y2 in pixels.
        scores: [groups, N]; equal scores rank by lower index.
        iou_threshold: in [0, 1]; a box is removed if its IoU with a kept one is above.
        max_keep: boxes kept at most in a group, the highest ranked.
        valid: bool [groups, N]; False rows neither suppress nor are kept.
        presorted: the rows stand in descending order of their scores already.

    Returns:
        Kept: positions in the rows as given, in descending order of score, [groups, max_keep] padded with 0.

    Raises:
        TypeError, ValueError: an argument of another type, shape, range or device; the message names it.
    """
    boxes = _checks.boxes("boxes", boxes, ndim=3).detach()
    scores = _checks.shape("scores", _checks.floats("scores", scores), tuple(boxes.shape[:2])).detach()
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    _checks.booleans("valid", valid, tuple(boxes.shape[:2]))
    _checks.same_device(boxes=boxes, scores=scores, valid=valid)
    _checks.threshold("iou_threshold", iou_threshold)
    if max_keep < 0:
        raise ValueError(f"max_keep must not be negative, got {max_keep}")
    if presorted:
        return Kept(*torch.ops.fastdet.nms(boxes, valid, iou_threshold, max_keep))
    # Rows that don't count go last, so that the work ends with the rows that do.
    order = torch.where(valid, scores, -math.inf).argsort(dim=1, descending=True, stable=True)
    rows = order[..., None].expand(-1, -1, 4)
    index, count = torch.ops.fastdet.nms(boxes.gather(1, rows), valid.gather(1, order), iou_threshold, max_keep)
    if boxes.shape[1] == 0:
        return Kept(index, count)
    taken = torch.arange(max_keep, device=boxes.device) < count[:, None]
    return Kept(torch.where(taken, order.gather(1, index), 0), count)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that greedy suppression keeps, int64, in descending order of score: torchvision's `nms`.

    Equal to `torchvision.ops.nms` on the CPU, index for index, ties included, with two exceptions: boxes with NaN or
    infinite corners are never returned and suppress nothing, and a box without area has IoU 0 with everything.

    Args:
        boxes: [N, 4] x1, y1, x2, y2 in pixels; fp16 and bf16 are widened to fp32.
        scores: [N] floating point.
        iou_threshold: in [0, 1].

    Raises:
        TypeError, ValueError: an argument of another type, shape, range or device; the message names it.
    """
    boxes, scores = _check(boxes, scores)
    _checks.threshold("iou_threshold", iou_threshold)
    index, count = nms_padded(boxes[None], scores[None], iou_threshold, boxes.shape[0])
    return index[0, : int(count[0])]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`nms` within each group of `idxs` [N], the kept of all groups merged in descending order of score (stable).

    Groups are kept apart by their ids, not by shifting coordinates (as torchvision's `batched_nms` does), so decisions
    near the threshold are those of `nms` on each group alone. Groups are padded to the power of two above their size
    and those of one padded size go through one call, so the padded boxes take at most twice the room of those given.
    """
    boxes, scores = _check(boxes, scores)
    _checks.threshold("iou_threshold", iou_threshold)
    idxs = _checks.shape("idxs", idxs, (boxes.shape[0],))
    if idxs.is_floating_point() or idxs.is_complex():
        raise TypeError(f"idxs must hold integers, got {idxs.dtype}")
    _checks.same_device(boxes=boxes, idxs=idxs)
    if boxes.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    order = scores.argsort(descending=True, stable=True)
    _, group, sizes = torch.unique(idxs[order], return_inverse=True, return_counts=True)
    by_group = group.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    padded_sizes = [1 << (size - 1).bit_length() for size in sizes.tolist()]
    keep = torch.zeros_like(group, dtype=torch.bool)
    for padded_size in sorted(set(padded_sizes)):
        members = torch.tensor([i for i, size in enumerate(padded_sizes) if size == padded_size], device=boxes.device)
        slot = torch.arange(padded_size, device=boxes.device)
        valid = slot < sizes[members, None]
        ranks = by_group[torch.where(valid, first[members, None] + slot, 0)]
        rows = order[ranks]
        kept = nms_padded(boxes[rows], scores[rows], iou_threshold, padded_size, valid, presorted=True)
        keep[ranks.gather(1, kept.index)[slot < kept.count[:, None]]] = True
    return order[keep]


def _check(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    boxes = _checks.boxes("boxes", boxes)
    scores = _checks.shape("scores", _checks.floats("scores", scores), (boxes.shape[0],))
    _checks.same_device(boxes=boxes, scores=scores)
    return boxes.detach(), scores.detach()
