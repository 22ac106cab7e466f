"""Suppression on the CPU, in one thread; how depends on the number of groups and of boxes in a group."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torchvision.ops  # noqa: F401  (registers the operator that is called)
from numpy.typing import NDArray
from torch import Tensor

from fastdet.ops.cpu.nms_tiles import suppress_tiles
from fastdet.ops.cpu.overlap import TILE, few_ious, few_planes, iou, reset_invalid, scale_apart, to_planes, valid_planes
from fastdet.ops.cpu.sorting import Index, argsort_descending

# Groups of at most so many boxes are compared pair by pair, all groups at once.
_FEW = 64
# So few boxes in all are compared without sorting them by group.
_FEW_IN_ALL = 160
# Above so many boxes tiles of near boxes are faster than torchvision's operator.
MANY = 2500
# In few groups of so many boxes each group is suppressed by itself; in between, all at once, scaled apart.
_MANY_A_GROUP = 56
_LEAST_SCALED, _MOST_SCALED, _GROUPS_SCALED = 110, 320, 8
# In between: how many groups it takes for suppressing them side by side to beat torchvision's operator on each.
_MIN_GROUPS = 12
# Side by side: how many boxes of a group are compared before those removed are dropped for the first time.
_ROWS = 64

# Without its wrappers in Python: of a hundred boxes they would take a tenth of the time.
torchvision_nms = torch.ops.torchvision.nms.default._op

Corners = NDArray[np.float32]
Mask = NDArray[np.bool_]


def round_threshold_down(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`."""
    nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf)))


@np.errstate(all="ignore")
def nms_cpu(
    boxes: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, scores: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    groups, count = valid.shape
    index, number = valid.new_zeros(groups, max_keep, dtype=torch.int64), valid.new_zeros(groups, dtype=torch.int64)
    rows, corners = np.flatnonzero(valid.numpy()), boxes.reshape(-1, 4).numpy()
    if scores is not None:
        rows = rows.take(argsort_descending(scores.reshape(-1).numpy().take(rows)))
        rows = rows.take(np.argsort(rows // count, kind="stable")) if groups > 1 else rows
    rows = _finite_rows(corners, rows)
    if max_keep and len(rows):
        kept = rows.compress(_suppress_sorted(corners.take(rows, axis=0), rows // count, iou_threshold, max_keep))
        group = kept // count
        rank = np.arange(len(kept)) - np.searchsorted(group, group)
        within = rank < max_keep
        index.numpy()[group[within], rank[within]] = kept[within] % count
        number.numpy()[:] = np.bincount(group[within], minlength=groups)
    return index, number


def few_nms_cpu(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The indices of the boxes [N, 4] that are kept, of one group, by torchvision's operator."""
    kept: Tensor = torchvision_nms(boxes, scores, iou_threshold)
    # It keeps a box that is not finite in any case, and removes none by it.
    if math.isfinite(boxes.sum().item()):
        return kept
    return kept[boxes.index_select(0, kept).isfinite().all(1)]


def plain_nms_cpu(boxes: Tensor, scores: Tensor, iou_threshold: float, max_keep: int | None = None) -> Tensor:
    """The indices of the boxes [N, 4] that are kept, of one group."""
    if boxes.shape[0] > MANY:
        most = len(boxes) if max_keep is None else min(max_keep, len(boxes))
        valid = torch.ones(1, len(boxes), dtype=torch.bool, device="cpu")
        index, number = nms_cpu(plain(boxes)[None], valid, iou_threshold, most, plain(scores)[None])
        return index[0, : int(number)]
    return few_nms_cpu(boxes, scores, iou_threshold)[:max_keep]


def batched_nms_cpu(
    given: tuple[Tensor, Tensor, Tensor], arrays: Sequence[Any], iou_threshold: float, max_keep: int | None = None
) -> Tensor:
    """The indices of the boxes that are kept. `given`: boxes fp32 [N, 4], scores fp32 [N] and groups int64 [N];
    `arrays` share their memory, as a call of torch or NumPy takes longer after one of the other."""
    (boxes, scores, idxs), (corners, values, ids) = given, arrays
    count = len(ids)
    groups = set(ids.tolist()) if _FEW // 2 < count <= MANY else set()
    if len(groups) == 1:
        return plain_nms_cpu(boxes, scores, iou_threshold, max_keep)
    if _LEAST_SCALED < count <= _MOST_SCALED and len(groups) <= _GROUPS_SCALED:
        scaled = scale_apart(boxes, idxs, sorted(groups), iou_threshold)
        if scaled is not None:
            kept = torchvision_nms(scaled, scores, iou_threshold)
            return kept if max_keep is None else kept[:max_keep]
    if count > _MANY_A_GROUP * len(groups) > 0:
        rows = _suppress_one_by_one(corners, values, ids, iou_threshold)
    else:
        rows = _suppress_groups(corners, values, ids, iou_threshold, max_keep)
    return torch.from_numpy(rows[:max_keep])


@np.errstate(all="ignore")
def _suppress_one_by_one(corners: Corners, scores: NDArray[np.float32], ids: Index, iou_threshold: float) -> Index:
    """By torchvision's operator on each group."""
    by_group = np.argsort(ids, kind="stable")
    ends = (np.flatnonzero(np.diff(ids.take(by_group))) + 1).tolist()
    boxes = torch.from_numpy(corners.take(by_group, axis=0)).tensor_split(ends)
    values = torch.from_numpy(scores.take(by_group)).tensor_split(ends)
    kept = [torchvision_nms(*group, iou_threshold).numpy() for group in zip(boxes, values, strict=True)]
    for group, first in zip(kept[1:], ends, strict=True):
        group += first
    rows = _finite_rows(corners, np.sort(by_group.take(np.concatenate(kept))))
    return rows.take(argsort_descending(scores.take(rows)))


@np.errstate(all="ignore")
def _suppress_groups(
    corners: Corners, scores: NDArray[np.float32], ids: Index, iou_threshold: float, max_keep: int | None
) -> Index:
    order, count = argsort_descending(scores), len(ids)
    if count <= _FEW_IN_ALL:
        threshold = round_threshold_down(iou_threshold)
        kept = order.compress(_suppress_all_pairs(corners.take(order, axis=0), ids.take(order), threshold))
        return _finite_rows(corners, kept)
    keep = np.zeros(count, np.bool_)
    rows = _finite_rows(corners, order.take(np.argsort(ids.take(order), kind="stable")))
    most = count if max_keep is None else max_keep
    keep[rows.compress(_suppress_sorted(corners.take(rows, axis=0), ids.take(rows), iou_threshold, most))] = True
    return order.compress(keep.take(order))


def plain(given: Tensor) -> Tensor:
    """Without a gradient, and no view that negates: such as NumPy can share."""
    return given.detach().resolve_neg() if given.requires_grad or given.is_neg() else given


def finite_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """By torchvision's operator, among the finite boxes: below a threshold of 0 the others too would suppress."""
    finite = boxes.isfinite().all(1).nonzero()[:, 0]
    return finite[torchvision_nms(boxes[finite], scores[finite], iou_threshold)]


def _finite_rows(corners: Corners, rows: Index) -> Index:
    """Those of `rows`, indices of boxes `corners` [N, 4], whose box is finite."""
    if math.isfinite(corners.sum()):
        return rows
    return rows.compress(np.isfinite(corners.take(rows, axis=0)).all(1))


def _suppress_all_pairs(corners: Corners, group: NDArray[np.integer], threshold: float) -> Mask:
    """Which of few boxes [N, 4], in descending order of priority, are not removed by another of their `group` [N].

    The calls take longer than their work: these are fewer than those that sort the boxes by group.
    """
    count = len(group)
    rank = np.arange(count, dtype=np.int16)
    comparable = group[:, None] == group
    comparable &= rank[:, None] < rank
    pairs = np.flatnonzero(comparable)
    higher = pairs // count
    lower = pairs - higher * count
    overlapping = np.flatnonzero(_overlap(few_planes(corners), higher, lower, threshold))
    decided = bytearray(b"\1") * count
    _decide(decided, higher.take(overlapping), lower.take(overlapping))
    return np.frombuffer(decided, np.bool_)


def _overlap(planes: Corners, higher: Index, lower: Index, threshold: float) -> Mask:
    """Whether two boxes of `planes` [5, N] overlap by more, in each pair; one that is not valid overlaps nothing.

    Of a box without area, inverted or not finite the ratio is 0, negative or NaN: they need not be reset.
    """
    return few_ious(planes.take(higher, axis=1), planes.take(lower, axis=1)) > threshold


def _decide(decided: bytearray, higher: Index, lower: Index) -> None:
    """Clear in `decided` the `lower` of each pair whose `higher` is not cleared; pairs stand in ascending order of it.

    In order of priority: a box is decided before it removes another.
    """
    for by, removed in zip(higher.tolist(), lower.tolist(), strict=True):
        if decided[by]:
            decided[removed] = 0


def _suppress_sorted(corners: Corners, group: Index, iou_threshold: float, max_keep: int) -> Mask:
    """Which of the boxes [N, 4], all finite, are kept: at least the first `max_keep` of each group.

    The boxes stand in ascending order of `group` [N], and in a group in descending order of priority.
    """
    threshold = round_threshold_down(iou_threshold)
    keep = np.ones(len(corners), np.bool_)
    starts = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    ends = np.append(starts[1:], len(group))
    lengths = ends - starts
    few = lengths <= _FEW
    if few.any():
        later = np.repeat(ends, lengths) - np.arange(1, len(group) + 1)  # boxes after each in its group
        _suppress_pairs(corners, np.flatnonzero(later * np.repeat(few, lengths)), later, threshold, keep)
        if few.all():
            return keep
    medium = np.flatnonzero((lengths > _FEW) & (lengths <= MANY))
    if len(medium) < _MIN_GROUPS:
        boxes = torch.from_numpy(corners)
        for start, end in zip(starts[medium].tolist(), ends[medium].tolist(), strict=True):
            keep[start:end] = False
            keep[start:end][_nms_of_sorted(boxes[start:end], threshold)] = True
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
    planes = few_planes(corners)
    for pairs in range(0, int(last[-1]) if len(last) else 0, TILE):
        chosen = slice(*np.searchsorted(last, (pairs, pairs + TILE), side="right"))
        higher, count, end = rows[chosen], counts[chosen], last[chosen]
        lower = np.arange(end[0] - count[0], end[-1]) + np.repeat(higher + 1 - end + count, count)
        higher = np.repeat(higher, count)
        overlapping = np.flatnonzero(_overlap(planes, higher, lower, threshold))
        _decide(decided, higher.take(overlapping), lower.take(overlapping))
    keep[:] = np.frombuffer(decided, np.bool_)


def _nms_of_sorted(boxes: Tensor, threshold: float) -> Index:
    """Which boxes [N, 4] of one group, in descending order of priority, torchvision's operator keeps."""
    priority = torch.arange(len(boxes), 0, -1, dtype=torch.float32, device="cpu")
    return torchvision_nms(boxes, priority, threshold).numpy()


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
    scratch = torch.empty(3, max(TILE, place.size), device="cpu")
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
        boxes = torch.from_numpy(corners.take(undecided, axis=0))
        keep[undecided[_nms_of_sorted(boxes, threshold)]] = True
