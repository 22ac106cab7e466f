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

# On the CPU, groups of at most so many boxes are worked through side by side, and longer ones block by block.
_FEW = 600
# Side by side: how many groups it takes to beat torchvision's operator on each, and pairs compared at a time.
_ABREAST = 12
_ABREAST_TILE = 1 << 17
# Block by block: boxes of a block, and pairs compared at a time, just below what torch shares among threads: so a tile
# stays in a core's cache and no operator waits for another thread.
_BLOCK = 192
_TILE = 32767


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
    planes, keep = _planes(boxes, valid)
    place = torch.arange(num_boxes)
    if max_keep and num_boxes:
        sizes = torch.where(keep, place + 1, 0).amax(1).tolist()
        _suppress(planes, sizes, iou_threshold, max_keep, keep)
    rank = keep.cumsum(1)
    # One place more, for what is not kept or not any more.
    target = torch.where(keep & (rank <= max_keep), rank - 1, max_keep)
    index = rank.new_zeros(groups, max_keep + 1).scatter_(1, target, place.expand_as(target))
    return index[:, :max_keep].contiguous(), rank[:, -1:].sum(1).clamp_(max=max_keep)


def _planes(boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """x1, y1, x2, y2 and area of `boxes` [G, N, 4], apart: [5, G, N]; and which of the `valid` are finite.

    The others are zeros, which overlap nothing.
    """
    planes = boxes.new_empty(5, *valid.shape)
    corners = planes[:4].copy_(boxes.permute(2, 0, 1))
    # NaN and infinities times 0 are NaN.
    counted = (corners * 0).sum(0).eq(0).logical_and_(valid)
    if not counted.all():
        corners.masked_fill_(~counted, 0.0)
    torch.mul(planes[2] - planes[0], planes[3] - planes[1], out=planes[4])
    return planes, counted


def _suppress(planes: Tensor, sizes: list[int], iou_threshold: float, max_keep: int, keep: Tensor) -> None:
    """Leave in `keep` [G, N] of the boxes marked, which are among the first `sizes` of their group, at least the first
    `max_keep` that each group of `planes` [5, G, N] keeps."""
    few = sorted((group for group, size in enumerate(sizes) if 0 < size <= _FEW), key=lambda group: -sizes[group])
    while few:
        count = max(_ABREAST_TILE // sizes[few[0]], _ABREAST)
        _suppress_abreast(planes, few[:count], sizes, iou_threshold, keep)
        few = few[count:]
    for group, size in enumerate(sizes):
        if size > _FEW:
            rows = keep[group].nonzero()[:, 0]
            kept = _suppress_many(planes[:, group], rows, iou_threshold, max_keep)
            keep[group].zero_().index_fill_(0, kept, True)


def _settle(corners: Tensor, iou_threshold: float) -> Tensor:
    """What the boxes [4, N] keep, ascending, by torchvision's operator: the fastest there is for a few."""
    priority = torch.arange(corners.shape[1], 0, -1, dtype=corners.dtype)
    return torch.ops.torchvision.nms(corners.t(), priority, iou_threshold)


def _suppress_abreast(planes: Tensor, groups: list[int], sizes: list[int], iou_threshold: float, keep: Tensor) -> None:
    """Leave in `keep` [G, N] what `groups`, the longest first, keep of the first `sizes` boxes of `planes` [5, G, N].

    Box after box, that of all groups at a time, for as long as enough groups have more; what is left of the longest is
    settled group by group.
    """
    step, active = 0, len(groups)
    if active >= _ABREAST:
        longest, threshold = sizes[groups[0]], fp32_below(iou_threshold)
        tall = planes[:, groups, :longest].transpose(1, 2).contiguous()
        hits = torch.zeros_like(tall[0])
        memory = hits.new_empty(3, max(_ABREAST_TILE, hits.numel()))
        while active >= _ABREAST and step < longest:
            rest, left = tall[:, step:, :active], hits[step:, :active]
            count = min(max(_ABREAST_TILE // left.numel(), 1), len(left))
            spare = memory[:, : count * left.numel()].view(3, count, *left.shape)
            overlapping = _overlapping(rest[:, :count, None], rest[:, None], threshold, spare)
            for row, hit in enumerate(overlapping.unbind()):
                left[row + 1 :].addcmul_(hit[row + 1 :], (left[row] == 0).float())
            step += count
            while active and sizes[groups[active - 1]] <= step:
                active -= 1
        keep[groups, :longest] &= hits.t() == 0

    for group in groups[:active]:
        left = keep[group, step : sizes[group]]
        rows = left.nonzero()[:, 0]
        left.zero_().index_fill_(0, rows[_settle(planes[:4, group, step + rows], iou_threshold)], True)


def _suppress_many(planes: Tensor, rows: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    """What `rows` of `planes` [5, N] keep, ascending: a block at a time, first against all boxes kept so far, then
    what is left among itself."""
    threshold = fp32_below(iou_threshold)
    kept, found, most = planes.new_empty(5, min(max_keep, len(rows))), [], 0
    memory = planes.new_empty(3, _TILE)
    for block in rows.split(_BLOCK):
        left, first = block, 0
        while first < most and len(left):
            last = min(first + _TILE // len(left), most)
            spare = memory[:, : len(left) * (last - first)].view(3, len(left), last - first)
            hits = _overlapping(planes[:, left, None], kept[:, None, first:last], threshold, spare)
            # A sum, because sums of numbers are what is fast on a CPU.
            left = left[hits.sum(1) == 0]
            first = last
        left = left[_settle(planes[:4, left], iou_threshold)[: max_keep - most]]
        found.append(left)
        kept[:, most : most + len(left)] = planes[:, left]
        most += len(left)
        if most == max_keep:
            break
    return torch.cat(found)


def _overlapping(first: Tensor, second: Tensor, threshold: float | Tensor, spare: Tensor) -> Tensor:
    """1 where the IoU of `first` and `second` [5, ...], broadcast, exceeds the threshold, else 0: fp32, in `spare`
    [3, ...].

    The arithmetic of `box_iou`, but that a height below 0 is let be: the IoU is negative then, and exceeds nothing.
    """
    ax1, ay1, ax2, ay2, area1 = first.unbind()
    bx1, by1, bx2, by2, area2 = second.unbind()
    inter, other, another = spare.unbind()
    torch.minimum(ax2, bx2, out=inter).sub_(torch.maximum(ax1, bx1, out=another)).clamp_(min=0)
    inter *= torch.minimum(ay2, by2, out=other).sub_(torch.maximum(ay1, by1, out=another))
    return inter.div_(torch.add(area1, area2, out=other).sub_(inter)).gt_(threshold)


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
    if boxes.device.type == "cpu" and len(boxes) <= _FEW and boxes.isfinite().all():
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
    if idxs.is_floating_point() or idxs.is_complex():
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
    if max_keep is not None and max_keep < 0:
        raise ValueError(f"max_keep must not be negative, got {max_keep}")
    return len(boxes) if max_keep is None else min(max_keep, len(boxes))


def _check(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    given = {"boxes": boxes, "scores": scores}
    boxes = _checks.boxes("boxes", boxes)
    scores = _checks.shape("scores", _checks.floats("scores", scores), (boxes.shape[0],))
    _checks.same_device(boxes=boxes, scores=scores)
    _checks.same_dtype(**given)
    return boxes.detach(), scores.detach()
