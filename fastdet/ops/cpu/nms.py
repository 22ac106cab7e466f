"""Suppression on the CPU: small groups side by side, long ones block by block, by torch's threads."""

import numpy as np
import torch
import torchvision.ops  # noqa: F401  (registers the operator that is called)
from torch import Tensor

from fastdet.ops.cpu.overlap import TILE, iou, make_proper

# Groups of at most so many boxes are worked through side by side, and longer ones block by block.
FEW = 600
# Side by side: how many groups it takes to beat torchvision's operator on each, and pairs compared at a time.
_ABREAST = 12
_ABREAST_TILE = 1 << 17
# How many of them are compared before those removed are dropped for the first time.
_ROWS = 64
# Block by block: boxes of the first block and of the largest. The next is twice as large where fewer than _SPARSE are
# left to be settled among themselves, and half as large where there are more than _DENSE.
_BLOCK, _LARGEST_BLOCK = 192, 1024
_SPARSE, _DENSE = 64, 160


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

    The others, and those without area, overlap nothing.
    """
    planes = boxes.new_empty(5, *valid.shape)
    corners = planes[:4].copy_(boxes.permute(2, 0, 1))
    # NaN and infinities times 0 are NaN.
    counted = (corners * 0).sum(0).eq(0).logical_and_(valid)
    torch.mul(planes[2] - planes[0], planes[3] - planes[1], out=planes[4])
    make_proper(planes.unbind(), counted)
    return planes, counted


def _suppress(planes: Tensor, sizes: list[int], iou_threshold: float, max_keep: int, keep: Tensor) -> None:
    """Leave in `keep` [G, N] of the boxes marked, which are among the first `sizes` of their group, at least the first
    `max_keep` that each group of `planes` [5, G, N] keeps."""
    few = sorted((group for group, size in enumerate(sizes) if 0 < size <= FEW), key=lambda group: -sizes[group])
    while few:
        count = max(_ABREAST_TILE // sizes[few[0]], _ABREAST)
        _suppress_abreast(planes, few[:count], sizes, iou_threshold, keep)
        few = few[count:]
    for group, size in enumerate(sizes):
        if size > FEW:
            rows = keep[group].nonzero()[:, 0]
            kept = _suppress_many(planes[:, group], rows, iou_threshold, max_keep)
            keep[group].zero_().index_fill_(0, kept, True)


def _settle(corners: Tensor, iou_threshold: float) -> Tensor:
    """What the boxes [4, N] keep, ascending, by torchvision's operator: the fastest there is for a few."""
    priority = torch.arange(corners.shape[1], 0, -1, dtype=corners.dtype)
    return torch.ops.torchvision.nms(corners.t(), priority, iou_threshold)


def _suppress_abreast(planes: Tensor, groups: list[int], sizes: list[int], iou_threshold: float, keep: Tensor) -> None:
    """Leave in `keep` [G, N] what `groups`, the longest first, keep of the first `sizes` boxes of `planes` [5, G, N].

    Box after box, that of all groups at a time, against all after it, for as long as enough groups have more; what is
    left of the longest is settled group by group. Removed boxes are dropped in between, each time twice as late.
    """
    threshold, longest = fp32_below(iou_threshold), sizes[groups[0]]
    # Boxes down, groups across. Of `stays` a box that is kept has 1, and 1 less for each that removes it.
    boxes, stays = planes[:, groups, :longest].transpose(1, 2), keep[groups, :longest].t().float()
    place = torch.arange(longest)[:, None].expand_as(stays)
    lengths = [sizes[group] for group in groups]
    kept = keep.new_zeros(len(groups), longest + 1)
    active, rows = len(groups), _ROWS
    while active >= _ABREAST:
        step, last = 0, rows if len(stays) >= 2 * rows else len(stays)
        boxes, stays = boxes.contiguous(), stays.contiguous()
        memory = stays.new_empty(3, max(_ABREAST_TILE, stays.numel()))
        while active >= _ABREAST and step < last:
            rest, left = boxes[:, step:, :active], stays[step:, :active]
            count = min(max(_ABREAST_TILE // left.numel(), 1), last - step)
            spare = memory[:, : count * left.numel()].view(3, count, *left.shape)
            overlapping = _overlapping(rest[:, :count, None], rest[:, None], threshold, spare)
            for row, hit in enumerate(overlapping.unbind()):
                left[row + 1 :].addcmul_(hit[row + 1 :], left[row].clamp(min=0), value=-1)
            step += count
            active = _active(lengths, step)
        undecided = stays > 0
        kept.scatter_(1, place[:step].t(), undecided[:step].t())
        boxes, place, undecided = boxes[:, step:], place[step:], undecided[step:]
        if active < _ABREAST:
            break
        boxes, place, lengths = _packed(boxes, place, undecided, nowhere=longest)
        stays, active, rows = (place < longest).float(), _active(lengths, 0), rows * 2
    else:
        undecided = stays > 0

    for column in range(active):
        rows_left = place[undecided[:, column], column]
        kept[column, rows_left[_settle(planes[:4, groups[column], rows_left], iou_threshold)]] = True
    keep[groups, :longest] = kept[:, :longest]


def _active(lengths: list[int], step: int) -> int:
    """The first so many groups are those with more than `step` boxes, and perhaps some others."""
    return next((i + 1 for i in reversed(range(len(lengths))) if lengths[i] > step), 0)


def _packed(boxes: Tensor, place: Tensor, chosen: Tensor, nowhere: int) -> tuple[Tensor, Tensor, list[int]]:
    """The chosen of `boxes` [5, L, G] and of their `place` [L, G] moved up; below them zeros, `nowhere`. And how many
    each group has."""
    rank = chosen.cumsum(0)
    lengths = rank[-1].tolist()
    most = max(lengths)
    # One row more, for what is not chosen.
    target = torch.where(chosen, rank - 1, most)
    boxes = boxes.new_zeros(5, most + 1, len(lengths)).scatter_(1, target.expand_as(boxes), boxes)
    place = place.new_full((most + 1, len(lengths)), nowhere).scatter_(0, target, place)
    return boxes[:, :most], place[:most], lengths


def _suppress_many(planes: Tensor, rows: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    """What `rows` of `planes` [5, N] keep, ascending: a block at a time, first against all boxes kept so far, then
    what is left among itself, which takes as long as its square."""
    threshold = fp32_below(iou_threshold)
    kept, found, most = planes.new_empty(5, min(max_keep, len(rows))), [], 0
    memory = planes.new_empty(3, TILE)
    start, size = 0, _BLOCK
    while start < len(rows) and most < max_keep:
        left, first = rows[start : start + size], 0
        start += size
        while first < most and len(left):
            last = min(first + TILE // len(left), most)
            spare = memory[:, : len(left) * (last - first)].view(3, len(left), last - first)
            hits = _overlapping(planes[:, left, None], kept[:, None, first:last], threshold, spare)
            # A sum, because sums of numbers are what is fast on a CPU.
            left = left[hits.sum(1) == 0]
            first = last
        if len(left) < _SPARSE:
            size = min(size * 2, _LARGEST_BLOCK)
        elif len(left) > _DENSE:
            size = max(size // 2, _SPARSE)
        left = left[_settle(planes[:4, left], iou_threshold)[: max_keep - most]]
        found.append(left)
        kept[:, most : most + len(left)] = planes[:, left]
        most += len(left)
    return torch.cat(found)


def _overlapping(first: Tensor, second: Tensor, threshold: float, spare: Tensor) -> Tensor:
    """1 where the IoU of `first` and `second` [5, ...], broadcast, exceeds the threshold, else 0: fp32, in `spare`
    [3, ...]."""
    return iou(first.unbind(), second.unbind(), spare.unbind()).gt_(threshold)
