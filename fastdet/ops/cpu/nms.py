"""Suppression on the CPU, in one thread; how depends on the number of groups and of boxes in a group."""

import numpy as np
import torch
import torchvision.ops  # noqa: F401  (registers the operator that is called)
from numpy.typing import NDArray
from torch import Tensor

from fastdet.ops.cpu.nms_tiles import suppress_tiles
from fastdet.ops.cpu.overlap import TILE, few_ious, iou, reset_invalid, to_planes, valid_planes
from fastdet.ops.cpu.sorting import Index, argsort_descending

# Groups of at most so many boxes are compared pair by pair, all groups at once.
_FEW = 64
# Above so many boxes tiles of near boxes are faster than torchvision's operator.
MANY = 2500
# In between: how many groups it takes for suppressing them side by side to beat torchvision's operator on each.
_MIN_GROUPS = 12
# Side by side: how many boxes of a group are compared before those removed are dropped for the first time.
_ROWS = 64

Corners = NDArray[np.float32]
Mask = NDArray[np.bool_]


def round_threshold_down(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`."""
    nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf)))


def nms_cpu(
    boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, scores: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    groups, count = valid.shape
    index, number = valid.new_zeros(groups, max_keep, dtype=torch.int64), valid.new_zeros(groups, dtype=torch.int64)
    rows = np.flatnonzero(valid.numpy())
    if scores is not None:
        rows = rows.take(argsort_descending(scores.reshape(-1).numpy().take(rows)))
        rows = rows.take(np.argsort(rows // count, kind="stable")) if groups > 1 else rows
    corners, rows = _finite(boxes.reshape(-1, 4).numpy().take(rows, axis=0), rows)
    if max_keep and len(rows):
        kept = rows.compress(_suppress(corners, rows // count, iou_threshold, max_keep))
        group = kept // count
        rank = np.arange(len(kept)) - np.searchsorted(group, group)
        within = rank < max_keep
        index.numpy()[group[within], rank[within]] = kept[within] % count
        number.numpy()[:] = np.bincount(group[within], minlength=groups)
    return index, number


def batched_nms_cpu(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    order = argsort_descending(scores.numpy())
    group = idxs.numpy().take(order)
    by_group = np.argsort(group, kind="stable")
    corners, by_group = _finite(boxes.numpy().take(order.take(by_group), axis=0), by_group)
    keep = np.zeros(len(order), np.bool_)
    keep[by_group.compress(_suppress(corners, group.take(by_group), iou_threshold, max_keep))] = True
    return torch.from_numpy(order.compress(keep)[:max_keep])


@np.errstate(all="ignore")
def _finite(corners: Corners, rows: Index) -> tuple[Corners, Index]:
    """Those of the boxes [N, 4], and of the rows that they stand for, that are finite."""
    if np.isfinite(corners.sum()):
        return corners, rows
    finite = np.isfinite(corners).all(1)
    return corners.compress(finite, axis=0), rows.compress(finite)


@np.errstate(all="ignore")
def _suppress(corners: Corners, group: Index, iou_threshold: float, max_keep: int) -> Mask:
    """Which of the boxes [N, 4], all finite, are kept: at least the first `max_keep` of each group.

    The boxes stand in ascending order of `group` [N], and in a group in descending order of priority.
    """
    threshold = round_threshold_down(iou_threshold)
    keep = np.ones(len(corners), np.bool_)
    ends = np.searchsorted(group, group, side="right")
    later = ends - np.arange(len(group)) - 1  # boxes after each in its group
    if not len(later) or later.max() < _FEW:
        _suppress_pairs(corners, np.flatnonzero(later), later, threshold, keep)
        return keep
    starts = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    ends = ends[starts]
    lengths = ends - starts
    _suppress_pairs(corners, np.flatnonzero((later > 0) & np.repeat(lengths <= _FEW, lengths)), later, threshold, keep)
    medium = np.flatnonzero((lengths > _FEW) & (lengths <= MANY))
    if len(medium) < _MIN_GROUPS:
        for start, end in zip(starts[medium].tolist(), ends[medium].tolist(), strict=True):
            keep[start:end] = _suppress_by_torchvision(corners[start:end], threshold)
    else:
        medium = medium[np.argsort(-lengths[medium], kind="stable")]
        while len(medium):
            count = max(TILE // int(lengths[medium[0]]), _MIN_GROUPS)
            _suppress_side_by_side(corners, starts[medium[:count]], lengths[medium[:count]], threshold, keep)
            medium = medium[count:]
    for large in np.flatnonzero(lengths > MANY).tolist():
        start, end = int(starts[large]), int(ends[large])
        keep[start:end] = False
        keep[start + suppress_tiles(valid_planes(corners[start:end]), threshold, max_keep)] = True
    return keep


def _suppress_pairs(corners: Corners, rows: Index, later: Index, threshold: float, keep: Mask) -> None:
    """Clear in `keep` what the `rows`, ascending, remove of the `later` [N] boxes after each in its group."""
    decided = bytearray(keep.tobytes())
    counts = later.take(rows)
    last = counts.cumsum()
    planes = valid_planes(corners)
    for pairs in range(0, int(last[-1]) if len(last) else 0, TILE):
        chosen = slice(*np.searchsorted(last, (pairs, pairs + TILE), side="right"))
        higher, count = rows[chosen], counts[chosen]
        lower = np.arange(count.sum()) + np.repeat(higher + 1 - count.cumsum() + count, count)
        higher = np.repeat(higher, count)
        overlapping = np.flatnonzero(few_ious(planes.take(higher, axis=1), planes.take(lower, axis=1)) > threshold)
        # In order of priority: a box is decided before it removes another.
        for by, removed in zip(higher.take(overlapping).tolist(), lower.take(overlapping).tolist(), strict=True):
            if decided[by]:
                decided[removed] = 0
    keep[:] = np.frombuffer(decided, np.bool_)


def _suppress_by_torchvision(corners: Corners, threshold: float) -> Mask:
    """Which boxes [N, 4] of one group are kept, by the fastest operator for hundreds of boxes."""
    keep = np.zeros(len(corners), np.bool_)
    priority = torch.arange(len(corners), 0, -1, dtype=torch.float32)
    keep[torch.ops.torchvision.nms.default(torch.from_numpy(corners), priority, threshold).numpy()] = True
    return keep


def _suppress_side_by_side(corners: Corners, starts: Index, lengths: Index, threshold: float, keep: Mask) -> None:
    """Clear in `keep` what is removed of groups from `starts` on, of `lengths` boxes, the largest first.

    Row after row: a box of every group against all after it, while enough groups have more rows; what is left of the
    largest is suppressed group by group. Removed boxes are dropped in between, each time after twice as many rows.
    """
    # Boxes down, groups across. `place` is where a box stands in `corners`.
    row = np.arange(lengths[0])[:, None]
    left = row < lengths
    place = np.where(left, starts + row, starts)
    keep[place[left]] = False
    active, rows = len(lengths), _ROWS
    scratch = torch.empty(3, max(TILE, place.size))
    while active >= _MIN_GROUPS:
        place, left = place[:, :active], np.ascontiguousarray(left[:, :active])
        boxes = reset_invalid(to_planes(torch.from_numpy(corners.take(place, axis=0))))
        step, last = 0, rows if len(left) >= 2 * rows else len(left)
        while active >= _MIN_GROUPS and step < last:
            rest = boxes[:, step:, :active]
            size = rest[0].numel()
            count = min(max(TILE // size, 1), last - step)
            memory = scratch[:, : count * size].view(3, count, *rest.shape[1:])
            overlapping = iou(rest[:, :count, None].unbind(), rest[:, None].unbind(), memory.unbind())
            separate = overlapping.numpy() <= threshold
            for offset in range(count):
                after = left[step + offset + 1 :, :active]
                after &= separate[offset, offset + 1 :] | ~left[step + offset, :active]
            step += count
            active = int((lengths > step).sum())
        keep[place[:step][left[:step]]] = True
        place, left = place[step:], left[step:]
        if active < _MIN_GROUPS:
            break
        # Move what is left up, and the groups that have most to the front.
        lengths = left.sum(0)
        order, by_length = np.argsort(~left, axis=0, kind="stable")[: lengths.max()], np.argsort(-lengths)
        place, left = (np.take_along_axis(part, order, axis=0)[:, by_length] for part in (place, left))
        lengths = lengths[by_length]
        active, rows = int((lengths > 0).sum()), rows * 2
    for column in np.flatnonzero(left.any(0)).tolist():
        undecided = place[left[:, column], column]
        keep[undecided] = _suppress_by_torchvision(corners.take(undecided, axis=0), threshold)
