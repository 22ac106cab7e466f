"""Suppression on the CPU: small groups side by side, large ones block by block, by torch's threads."""

import numpy as np
import torch
import torchvision.ops  # noqa: F401  (registers the operator that is called)
from torch import Tensor

from fastdet.ops.cpu.overlap import TILE, iou, reset_invalid, to_planes

# Groups of at most so many boxes are suppressed side by side, and larger ones block by block.
SMALL_GROUP = 600
# Side by side: how many groups it takes to beat torchvision's operator on each, and pairs compared at a time.
_MIN_GROUPS = 12
_PAIRS = 1 << 17
# How many of their boxes are compared before those removed are dropped for the first time.
_ROWS = 64
# Block by block: boxes of the first block and of the largest. The next is twice as large where fewer than _SPARSE are
# left to be compared among themselves, and half as large where there are more than _DENSE.
_BLOCK, _LARGEST_BLOCK = 192, 1024
_SPARSE, _DENSE = 64, 160


def round_threshold_down(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`."""
    nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf)))


def nms_cpu(boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> tuple[Tensor, Tensor]:
    planes = to_planes(boxes)
    # NaN and infinities times 0 are NaN.
    keep = (planes[:4] * 0).sum(0).eq(0).logical_and_(valid)
    reset_invalid(planes, keep)
    groups, num_boxes = keep.shape
    place = torch.arange(num_boxes)
    if max_keep and num_boxes:
        sizes = torch.where(keep, place + 1, 0).amax(1).tolist()
        _suppress(planes, sizes, iou_threshold, max_keep, keep)
    rank = keep.cumsum(1)
    # One column more, for the boxes that are not returned.
    target = torch.where(keep & (rank <= max_keep), rank - 1, max_keep)
    index = rank.new_zeros(groups, max_keep + 1).scatter_(1, target, place.expand_as(target))
    return index[:, :max_keep].contiguous(), rank[:, -1:].sum(1).clamp_(max=max_keep)


def _suppress(planes: Tensor, sizes: list[int], iou_threshold: float, max_keep: int, keep: Tensor) -> None:
    """Leave in `keep` [G, N] of the boxes marked, which are among the first `sizes` of their group, at least the first
    `max_keep` that each group of `planes` [5, G, N] keeps."""
    small = sorted((group for group, size in enumerate(sizes) if 0 < size <= SMALL_GROUP), key=lambda i: -sizes[i])
    while small:
        count = max(_PAIRS // sizes[small[0]], _MIN_GROUPS)
        _suppress_small(planes, small[:count], sizes, iou_threshold, keep)
        small = small[count:]
    for group, size in enumerate(sizes):
        if size > SMALL_GROUP:
            rows = keep[group].nonzero()[:, 0]
            kept = _suppress_large(planes[:, group], rows, iou_threshold, max_keep)
            keep[group].zero_().index_fill_(0, kept, True)


def _torchvision_nms(corners: Tensor, iou_threshold: float) -> Tensor:
    """The boxes [4, N] that are kept, ascending, by torchvision's operator, the fastest one for few boxes."""
    priority = torch.arange(corners.shape[1], 0, -1, dtype=corners.dtype)
    return torch.ops.torchvision.nms(corners.t(), priority, iou_threshold)


def _suppress_small(planes: Tensor, groups: list[int], sizes: list[int], iou_threshold: float, keep: Tensor) -> None:
    """Leave in `keep` [G, N] what `groups`, the largest first, keep of the first `sizes` boxes of `planes` [5, G, N].

    Row after row: a box of every group against all after it, while enough groups have more rows; what is left of the
    largest is suppressed group by group. Removed boxes are dropped in between, each time after twice as many rows.
    """
    threshold, longest = round_threshold_down(iou_threshold), sizes[groups[0]]
    # Boxes down, groups across. `votes` is 1 for a box that is kept, and 1 less for each box that removes it.
    boxes, votes = planes[:, groups, :longest].transpose(1, 2), keep[groups, :longest].t().float()
    place = torch.arange(longest)[:, None].expand_as(votes)
    lengths = [sizes[group] for group in groups]
    kept = keep.new_zeros(len(groups), longest + 1)
    active, rows = len(groups), _ROWS
    while active >= _MIN_GROUPS:
        step, last = 0, rows if len(votes) >= 2 * rows else len(votes)
        boxes, votes = boxes.contiguous(), votes.contiguous()
        memory = votes.new_empty(3, max(_PAIRS, votes.numel()))
        while active >= _MIN_GROUPS and step < last:
            rest, left = boxes[:, step:, :active], votes[step:, :active]
            count = min(max(_PAIRS // left.numel(), 1), last - step)
            scratch = memory[:, : count * left.numel()].view(3, count, *left.shape)
            overlapping = _overlapping(rest[:, :count, None], rest[:, None], threshold, scratch)
            for row, hit in enumerate(overlapping.unbind()):
                left[row + 1 :].addcmul_(hit[row + 1 :], left[row].clamp(min=0), value=-1)
            step += count
            active = _num_longer(lengths, step)
        undecided = votes > 0
        kept.scatter_(1, place[:step].t(), undecided[:step].t())
        boxes, place, undecided = boxes[:, step:], place[step:], undecided[step:]
        if active < _MIN_GROUPS:
            break
        boxes, place, lengths = _compact(boxes, place, undecided, padding=longest)
        votes, active, rows = (place < longest).float(), _num_longer(lengths, 0), rows * 2
    else:
        undecided = votes > 0

    for column in range(active):
        rows_left = place[undecided[:, column], column]
        kept[column, rows_left[_torchvision_nms(planes[:4, groups[column], rows_left], iou_threshold)]] = True
    keep[groups, :longest] = kept[:, :longest]


def _num_longer(lengths: list[int], step: int) -> int:
    """How many of the first groups it takes to include all that have more than `step` boxes."""
    return next((i + 1 for i in reversed(range(len(lengths))) if lengths[i] > step), 0)


def _compact(boxes: Tensor, place: Tensor, chosen: Tensor, padding: int) -> tuple[Tensor, Tensor, list[int]]:
    """The chosen of `boxes` [5, L, G] and of their `place` [L, G] moved up, with zeros and `padding` below them; and
    how many each group has."""
    rank = chosen.cumsum(0)
    lengths = rank[-1].tolist()
    longest = max(lengths)
    # One row more, for what is not chosen.
    target = torch.where(chosen, rank - 1, longest)
    boxes = boxes.new_zeros(5, longest + 1, len(lengths)).scatter_(1, target.expand_as(boxes), boxes)
    place = place.new_full((longest + 1, len(lengths)), padding).scatter_(0, target, place)
    return boxes[:, :longest], place[:longest], lengths


def _suppress_large(planes: Tensor, rows: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    """The `rows` of `planes` [5, N] that are kept, ascending: a block at a time, first against all boxes kept before,
    then what is left of it among itself, which takes time quadratic in its size."""
    threshold = round_threshold_down(iou_threshold)
    kept, found, num_kept = planes.new_empty(5, min(max_keep, len(rows))), [], 0
    memory = planes.new_empty(3, TILE)
    start, size = 0, _BLOCK
    while start < len(rows) and num_kept < max_keep:
        left, first = rows[start : start + size], 0
        start += size
        while first < num_kept and len(left):
            last = min(first + TILE // len(left), num_kept)
            scratch = memory[:, : len(left) * (last - first)].view(3, len(left), last - first)
            hits = _overlapping(planes[:, left, None], kept[:, None, first:last], threshold, scratch)
            # On a CPU a sum of floats is faster than `any`.
            left = left[hits.sum(1) == 0]
            first = last
        if len(left) < _SPARSE:
            size = min(size * 2, _LARGEST_BLOCK)
        elif len(left) > _DENSE:
            size = max(size // 2, _SPARSE)
        left = left[_torchvision_nms(planes[:4, left], iou_threshold)[: max_keep - num_kept]]
        found.append(left)
        kept[:, num_kept : num_kept + len(left)] = planes[:, left]
        num_kept += len(left)
    return torch.cat(found)


def _overlapping(first: Tensor, second: Tensor, threshold: float, scratch: Tensor) -> Tensor:
    """fp32 1 where the IoU of `first` and `second` [5, ...], broadcast, exceeds the threshold, else 0, in `scratch`
    [3, ...]."""
    return iou(first.unbind(), second.unbind(), scratch.unbind()).gt_(threshold)
