"""Matching on the CPU, in one thread: few pairs at once, more in tiles of overlaps that stay in a core's cache."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdet.ops.cpu.overlap import (
    TILE,
    Array,
    Planes,
    Scratch,
    few_intersections,
    few_ious,
    intersection,
    iou,
    reset_invalid,
    to_planes,
    valid_planes,
)

# At most so many pairs are compared at once.
FEW_PAIRS = 1 << 17
# Candidates across a tile, at least: with fewer of them the calls of torch would take longer than their work.
MIN_ACROSS = 512
# Spans at most: an IoU is stored for each pair of a span and a ground truth.
MAX_SPANS = 64


class Spans(NamedTuple):
    """The `count` candidates of one image by coordinate, `planes` [5, spans, length]: x1, y1, x2, y2, area.

    A span is `length` // `across` tiles wide; the last one is filled up with boxes that overlap nothing.
    """

    planes: Tensor
    across: int
    count: int  # type: ignore[assignment]  # hides tuple.count


@np.errstate(all="ignore")
def match_cpu(
    candidates: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    valid: Tensor | None,
    gt_ignore: Tensor | None,
    high: float,
    low: float,
    allow_low_quality: bool,
    ignore_iof: float,
    weights: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (gt_boxes.shape[0], candidates.shape[-2])
    # The values of a candidate that is not valid.
    index, best_iou = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    label, deltas = np.full_like(index, -1), np.zeros((*shape, 4), np.float32)
    for image in range(shape[0]):
        anchors = candidates if candidates.ndim == 2 else candidates[image]
        rows = slice(None) if valid is None else np.flatnonzero(valid[image].numpy())
        chosen = anchors if valid is None else anchors[rows]
        if not len(chosen):
            continue
        ignored = None if gt_ignore is None else gt_boxes[image][gt_ignore[image]]
        match_image = _match_few if len(chosen) * gt_boxes.shape[1] <= FEW_PAIRS else _match_many
        best, best_overlap, is_best, covered = match_image(
            chosen, gt_boxes[image], gt_valid[image], ignored, allow_low_quality
        )
        overlap = best_overlap.numpy()
        labels = np.where(overlap >= high, 1, np.where(overlap < low, 0, -1))
        if covered is not None:
            labels[(labels == 0) & (covered.numpy() >= ignore_iof)] = -1
        if is_best is not None:
            labels[is_best.numpy()] = 1
        index[image, rows], best_iou[image, rows], label[image, rows] = best.numpy(), overlap, labels
        # With a threshold of 0 a positive may overlap nothing.
        positive = np.flatnonzero((label[image] == 1) & (best_iou[image] > 0))
        targets = gt_boxes[image].numpy().take(index[image].take(positive), axis=0)
        deltas[image, positive] = _encode(anchors.numpy().take(positive, axis=0), targets, weights)
    return torch.from_numpy(index), torch.from_numpy(best_iou), torch.from_numpy(label), torch.from_numpy(deltas)


def _encode(reference: Array, boxes: Array, weights: Sequence[float]) -> Array:
    """`fastdet.boxes.encode` of boxes [N, 4] in NumPy: few, so that thirty calls of torch would take longer."""
    side, reference_side = boxes[:, 2:] - boxes[:, :2], reference[:, 2:] - reference[:, :2]
    shift = (boxes[:, :2] + 0.5 * side) - (reference[:, :2] + 0.5 * reference_side)
    factors = np.array(weights, np.float32)
    logs = np.log(side / reference_side)
    return np.concatenate([factors[:2] * shift / reference_side, factors[2:] * logs], axis=1)


# The best ground truth of each candidate, its IoU; whether it is the best candidate of some ground truth, None unless
# asked for; the share of it that an ignored box covers, None without one.
_Matched = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _match_few(
    candidates: Tensor, gt_boxes: Tensor, gt_valid: Tensor, ignored: Tensor | None, allow_low_quality: bool
) -> _Matched:
    planes = valid_planes(candidates.numpy())
    gt = valid_planes(gt_boxes.numpy(), gt_valid.numpy())
    if not gt.shape[1]:
        gt = np.array([[0], [0], [0], [0], [1]], np.float32)
    overlaps = few_ious(gt[..., None], planes[:, None])
    index = overlaps.argmax(0)
    best = overlaps.max(0)
    is_best = None
    if allow_low_quality:
        best_of_gt = overlaps.max(1, keepdims=True)
        is_best = ((overlaps == best_of_gt) & (best_of_gt > 0)).any(0)
    covered = None
    if ignored is not None and len(ignored):
        shared = few_intersections(valid_planes(ignored.numpy())[..., None], planes[:, None])
        covered = (shared / planes[4]).max(0)
    is_best, covered = (None if part is None else torch.from_numpy(part) for part in (is_best, covered))
    return torch.from_numpy(index), torch.from_numpy(best), is_best, covered


def _match_many(
    candidates: Tensor, gt_boxes: Tensor, gt_valid: Tensor, ignored: Tensor | None, allow_low_quality: bool
) -> _Matched:
    gt = reset_invalid(to_planes(gt_boxes), gt_valid)
    spans = split_into_spans(candidates, gt.shape[1])
    index, best, span_best = find_best_gt(spans, gt)
    is_best = is_best_of_gt(spans, gt, span_best) if allow_low_quality else None
    if ignored is None or not len(ignored):
        return index, best, is_best, None
    return index, best, is_best, covered_share(spans, reset_invalid(to_planes(ignored)))


def split_into_spans(candidates: Tensor, num_boxes: int) -> Spans:
    """`candidates` [K, 4], K > 0, for a search among `num_boxes` boxes."""
    count = len(candidates)
    across = min(max(TILE // max(num_boxes, 1), MIN_ACROSS), count)
    length = -(-count // (across * MAX_SPANS)) * across
    planes = candidates.new_zeros(5, -(-count // length) * length)
    planes[4, count:] = 1.0
    reset_invalid(to_planes(candidates, out=planes[:, :count]))
    return Spans(planes.unflatten(1, (-1, length)), across, count)


def find_best_gt(spans: Spans, gt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first of the best ground truths [5, G] of each candidate, and its IoU, both [K]; and the best IoU of each
    ground truth within each span, [spans, G]."""
    num_gt = gt.shape[1]
    # Ranked from the last, so that the first of several equal ones ranks highest: exact below 2^24.
    rank = torch.arange(num_gt, 0, -1, dtype=gt.dtype, device="cpu")[:, None]
    best_iou = torch.zeros_like(spans.planes[0])
    best_rank = torch.full_like(best_iou, num_gt)
    span_best = gt.new_zeros(len(best_iou), num_gt)
    for tile in _tiles(spans, gt):
        overlap = iou(tile.boxes, tile.candidates, tile.scratch)
        tile_iou = overlap.amax(0)
        tile_rank = torch.eq(overlap, tile_iou, out=tile.scratch[1]).mul_(rank[tile.down]).amax(0)
        if tile.down.start:
            tile_rank = torch.where(tile_iou > best_iou[tile.at], tile_rank, best_rank[tile.at])
            tile_iou = torch.maximum(tile_iou, best_iou[tile.at])
        best_iou[tile.at], best_rank[tile.at] = tile_iou, tile_rank
        best_of_gt = span_best[tile.at[0], tile.down]
        torch.maximum(best_of_gt, overlap.amax(1), out=best_of_gt)
    index = num_gt - best_rank.flatten()[: spans.count].long()
    return index, best_iou.flatten()[: spans.count], span_best


def is_best_of_gt(spans: Spans, gt: Tensor, span_best: Tensor) -> Tensor:
    """bool [K]: the candidates whose IoU with some ground truth, above 0, is the largest of that ground truth.

    The overlaps are computed again in the spans that hold such a largest one; `span_best` is that of `find_best_gt`.
    """
    length = spans.planes.shape[2]
    found = torch.zeros(spans.planes[0].shape, dtype=torch.bool)
    best_of_gt = span_best.amax(0)
    holding, boxes = ((span_best == best_of_gt) & (best_of_gt > 0)).nonzero(as_tuple=True)
    step = max(TILE // length, 1)
    scratch = gt.new_empty(3, step, length)
    for span, box in zip(holding.split(step), boxes.split(step), strict=True):
        overlap = iou(gt[:, box, None].unbind(), spans.planes[:, span].unbind(), scratch[:, : len(span)].unbind())
        row, column = (overlap == best_of_gt[box, None]).nonzero(as_tuple=True)
        found[span[row], column] = True
    return found.flatten()[: spans.count]


def covered_share(spans: Spans, ignored: Tensor) -> Tensor:
    """fp32 [K]: the largest share of the area of each candidate that a box of `ignored` [5, G] covers."""
    largest = torch.zeros_like(spans.planes[0])
    for tile in _tiles(spans, ignored):
        shared = intersection(tile.boxes, tile.candidates, tile.scratch)
        torch.maximum(largest[tile.at], shared.div_(tile.candidates[4]).amax(0), out=largest[tile.at])
    return largest.flatten()[: spans.count]


class _Tile(NamedTuple):
    """Candidates, across, with their place among the spans; boxes, down; scratch memory for their overlaps."""

    at: tuple[int, slice]
    candidates: Planes
    down: slice
    boxes: Planes
    scratch: Scratch


def _tiles(spans: Spans, boxes: Tensor) -> Iterator[_Tile]:
    """Every tile of `spans` and `boxes` [5, G]; their scratch memory is reused."""
    _, num_spans, length = spans.planes.shape
    num_boxes, across = boxes.shape[1], spans.across
    height = max(TILE // across, 1)
    scratch = boxes.new_empty(3, min(height, num_boxes), across)
    downs = [slice(top, min(top + height, num_boxes)) for top in range(0, num_boxes, height)]
    rows = [(down, boxes[:, down, None].unbind(), scratch[:, : down.stop - down.start].unbind()) for down in downs]
    for span in range(num_spans):
        for left in range(0, length, across):
            at = span, slice(left, left + across)
            candidates = spans.planes[:, span, at[1]].unbind()
            for down, row_boxes, row_scratch in rows:
                yield _Tile(at, candidates, down, row_boxes, row_scratch)
