"""Greedy non-maximum suppression: exact, batched over groups, of fixed shape inside, torchvision's call outside.

The reference is `torchvision.ops.nms` on the CPU, index for index: it compares an fp32 IoU with a float64 threshold.
An fp32 number exceeds a float64 threshold exactly if it exceeds that threshold rounded down to fp32, so one rounding on
the host makes every fp32 comparison decide alike.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdet.ops import _checks
from fastdet.ops._library import define
from fastdet.ops.cpu.nms import FEW, fp32_below, nms_cpu


class Kept(NamedTuple):
    """`index` int64 [groups, max_keep], padded with 0; `count` int64 [groups]."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    count: Tensor  # type: ignore[assignment]  # hides tuple.count

    @property
    def valid(self) -> Tensor:
        """bool [groups, max_keep]: the rows that are not padding."""
        return torch.arange(self.index.shape[1], device=self.count.device) < self.count[:, None]


def nms_cuda(boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> tuple[Tensor, Tensor]:
    from fastdet.kernels import nms as kernel

    groups, num_boxes, _ = boxes.shape
    index = boxes.new_zeros(groups, max_keep, dtype=torch.int64)
    if not index.numel() or not num_boxes:
        return index, boxes.new_zeros(groups, dtype=torch.int64)
    count = boxes.new_empty(groups, dtype=torch.int64)
    config = kernel.config(num_boxes)
    chunks = -(-num_boxes // config.chunk)
    kernel.launch(
        boxes.contiguous(),
        valid.contiguous(),
        overlap=boxes.new_empty(groups, chunks, config.chunk // 32, config.chunk, dtype=torch.int32),
        removed=boxes.new_empty(groups, num_boxes, dtype=torch.int8),
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
    _checks.integer("max_keep", max_keep, least=0)
    if _checks.flag("presorted", presorted):
        return Kept(*torch.ops.fastdet.nms(boxes, valid, iou_threshold, max_keep))
    # Rows that don't count go last, so that the work ends with the rows that do.
    order = torch.where(valid, scores, -math.inf).argsort(dim=1, descending=True, stable=True)
    rows = order[..., None].expand(-1, -1, 4)
    index, count = torch.ops.fastdet.nms(boxes.gather(1, rows), valid.gather(1, order), iou_threshold, max_keep)
    if boxes.shape[1] == 0:
        return Kept(index, count)
    taken = torch.arange(max_keep, device=boxes.device) < count[:, None]
    return Kept(torch.where(taken, order.gather(1, index), 0), count)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int | None = None) -> Tensor:
    """Indices of the boxes that greedy suppression keeps, int64, in descending order of score: torchvision's `nms`.

    Equal to `torchvision.ops.nms` on the CPU, index for index, ties included, with two exceptions: boxes with NaN or
    infinite corners are never returned and suppress nothing, and a box without area has IoU 0 with everything.

    Args:
        boxes: [N, 4] x1, y1, x2, y2 in pixels; fp16 and bf16 are widened to fp32.
        scores: [N] floating point.
        iou_threshold: in [0, 1].
        max_keep: indices at most, the highest ranked; None: all. The work stops there.

    Raises:
        TypeError, ValueError: an argument of another type, shape, range or device; the message names it.
    """
    boxes, scores = _check(boxes, scores)
    _checks.threshold("iou_threshold", iou_threshold)
    most = _most(max_keep, boxes)
    if boxes.device.type == "cpu" and len(boxes) <= FEW and boxes.isfinite().all():
        return torch.ops.torchvision.nms(boxes, scores, iou_threshold)[:most]
    index, count = nms_padded(boxes[None], scores[None], iou_threshold, most)
    return index[0, : int(count[0])]


def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, max_keep: int | None = None
) -> Tensor:
    """`nms` within each group of `idxs` [N], the kept of all groups merged in descending order of score (stable).

    Of the merged the first `max_keep` are returned; None: all.

    Groups are kept apart by their ids, not by shifting coordinates (as torchvision's `batched_nms` does), so decisions
    near the threshold are those of `nms` on each group alone. Groups are padded to the power of two above their size
    and those of one padded size go through one call, so the padded boxes take at most twice the room of those given.
    """
    boxes, scores = _check(boxes, scores)
    _checks.threshold("iou_threshold", iou_threshold)
    idxs = _checks.shape("idxs", idxs, (boxes.shape[0],))
    if idxs.is_floating_point() or idxs.is_complex() or idxs.dtype == torch.bool:
        raise TypeError(f"idxs must hold integers, got {idxs.dtype}")
    _checks.same_device(boxes=boxes, idxs=idxs)
    most = _most(max_keep, boxes)
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
        kept = nms_padded(boxes[rows], scores[rows], iou_threshold, min(padded_size, most), valid, presorted=True)
        taken = torch.arange(kept.index.shape[1], device=boxes.device) < kept.count[:, None]
        keep[ranks.gather(1, kept.index)[taken]] = True
    return order[keep][:most]


def _most(max_keep: int | None, boxes: Tensor) -> int:
    """How many of `boxes` [N, 4] may be kept."""
    return len(boxes) if max_keep is None else min(_checks.integer("max_keep", max_keep, least=0), len(boxes))


def _check(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    given = {"boxes": boxes, "scores": scores}
    boxes = _checks.boxes("boxes", boxes)
    scores = _checks.shape("scores", _checks.floats("scores", scores), (boxes.shape[0],))
    _checks.same_device(boxes=boxes, scores=scores)
    _checks.same_dtype(**given)
    return boxes.detach(), scores.detach()
