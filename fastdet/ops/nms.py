"""Greedy non-maximum suppression: exact, batched over groups, of fixed shape inside, torchvision's call outside.

The reference is `torchvision.ops.nms` on the CPU, index for index: it compares an fp32 IoU with a float64 threshold.
An fp32 number exceeds a float64 threshold exactly if it exceeds that threshold rounded down to fp32, so one rounding on
the host makes every fp32 comparison decide alike.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _checks
from ._library import define

# Boxes compared at a time, and elements of a comparison matrix that still fit a core's cache, on the CPU.
_BLOCK = 256
_MATRIX = 1 << 20


class Kept(NamedTuple):
    """`index` int64 [groups, max_keep], padded with 0; `count` int64 [groups]."""

    index: Tensor  # type: ignore[assignment]
    count: Tensor  # type: ignore[assignment]


def fp32_below(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`."""
    nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf)))


def nms_cpu(boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> tuple[Tensor, Tensor]:
    groups, num_boxes, _ = boxes.shape
    index, count = boxes.new_zeros(groups, max_keep, dtype=torch.int64), boxes.new_zeros(groups, dtype=torch.int64)
    if index.numel() and num_boxes:
        valid = valid & boxes.isfinite().all(-1)
        step = max(1, _MATRIX // (min(_BLOCK, num_boxes) * max(min(max_keep, num_boxes), min(_BLOCK, num_boxes))))
        for first in range(0, groups, step):
            part = slice(first, first + step)
            _suppress(boxes[part], valid[part], fp32_below(iou_threshold), index[part], count[part])
    return index, count


def _suppress(boxes: Tensor, valid: Tensor, threshold: float, index: Tensor, count: Tensor) -> None:
    """Fill `index` and `count` for a few groups, a block of boxes at a time against what is kept so far."""
    groups, max_keep = index.shape
    # Columns after the last valid box of any group have nothing to say.
    num_boxes = int((valid.any(0) * torch.arange(1, valid.shape[1] + 1)).max())
    planes = boxes[:, :num_boxes].permute(2, 0, 1).contiguous()
    planes = torch.cat([planes, ((planes[2] - planes[0]) * (planes[3] - planes[1]))[None]])
    # Rows beyond a group's count stay zero: a box without area overlaps nothing.
    kept = planes.new_zeros(5, groups, min(max_keep, num_boxes))
    most = 0
    for start in range(0, num_boxes, _BLOCK):
        block = planes[:, :, start : start + _BLOCK]
        alive = valid[:, start : start + block.shape[2]]
        if most:
            alive = alive & ~_overlaps(block, kept[:, :, :most], threshold).any(2)
        source = None
        if groups == 1:
            source = alive[0].nonzero()[:, 0]
            block, alive = block[:, :, source], alive[:, source]
        keep = _settle(_overlaps(block, block, threshold).tril_(-1), alive)
        rank = count[:, None] + keep.cumsum(1) - 1
        group, position = (keep & (rank < max_keep)).nonzero(as_tuple=True)
        rank = rank[group, position]
        index[group, rank] = start + (position if source is None else source[position])
        kept[:, group, rank] = block[:, group, position]
        count.add_(keep.sum(1)).clamp_(max=max_keep)
        most = int(count.max())
        if int(count.min()) == max_keep:
            break


def _overlaps(first: Tensor, second: Tensor, threshold: float) -> Tensor:
    """Whether IoU exceeds the threshold: planes (x1, y1, x2, y2, area) [5, G, M] and [5, G, N] give bool [G, M, N].

    The arithmetic of `box_iou`, in place: memory traffic is all that it costs.
    """
    ax1, ay1, ax2, ay2, area1 = first[..., :, None]
    bx1, by1, bx2, by2, area2 = second[..., None, :]
    inter = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    inter *= torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    return inter.div_((area1 + area2).sub_(inter)).gt(threshold)


def _settle(overlap: Tensor, alive: Tensor) -> Tensor:
    """Greedy decisions from `overlap` [G, M, M] (row: box, column: box of higher priority) by monotone rounds."""
    higher = overlap.float()
    undecided, keep = alive.clone(), torch.zeros_like(alive)
    while undecided.any():
        undecided &= torch.bmm(higher, keep.float()[..., None])[..., 0] == 0
        newly_kept = undecided & (torch.bmm(higher, undecided.float()[..., None])[..., 0] == 0)
        keep |= newly_kept
        undecided &= ~newly_kept
    return keep


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
    """
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
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
    and those of one padded size go through one call, so memory stays within twice the input whatever the sizes.
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
