"""Suppression on the CPU: small groups side by side, long ones block by block, by torch's threads."""

import numpy as np
import torch
import torchvision.ops  # noqa: F401  (registers the operator that is called)
from torch import Tensor

# Groups of at most so many boxes are worked through side by side, and longer ones block by block.
FEW = 600
# Side by side: how many groups it takes to beat torchvision's operator on each, and pairs compared at a time.
_ABREAST = 12
_ABREAST_TILE = 1 << 17
# Block by block: boxes of a block, and pairs compared at a time, just below what torch shares among threads: so a tile
# stays in a core's cache and no operator waits for another thread.
_BLOCK = 192
_TILE = 32767


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
