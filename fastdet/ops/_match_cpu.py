"""The search of `match` on the CPU, in tiles of overlaps that stay in a core's cache."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._overlap_cpu import TILE, intersection, iou, make_proper

# Candidates across a tile, at least: with fewer of them the calls of torch would take longer than their work.
MIN_ACROSS = 512
# Spans at most: a number is kept for each pair of a span and a ground truth.
MAX_SPANS = 64


class Spans(NamedTuple):
    """The candidates of one image by coordinate, `planes` [5, spans, length]: x1, y1, x2, y2, area.

    A span is `length` // `across` tiles wide; the last one is filled up with boxes that overlap nothing.
    """

    planes: Tensor
    across: int


def spans_of(candidates: Tensor, allowed: Tensor | None, num_boxes: int) -> Spans:
    """`candidates` [K, 4], K > 0, of which `allowed` [K] take part, for a search among `num_boxes` boxes."""
    count = len(candidates)
    across = min(max(TILE // max(num_boxes, 1), MIN_ACROSS), count)
    length = -(-count // (across * MAX_SPANS)) * across
    planes = candidates.new_zeros(5, -(-count // length) * length)
    planes[4, count:] = 1.0
    _fill(planes[:, :count], candidates, allowed)
    return Spans(planes.unflatten(1, (-1, length)), across)


def planes_of(boxes: Tensor, allowed: Tensor | None = None) -> Tensor:
    """`boxes` [N, 4] by coordinate [5, N]; those that are not `allowed` overlap nothing."""
    return _fill(boxes.new_empty(5, len(boxes)), boxes, allowed)


def _fill(planes: Tensor, boxes: Tensor, allowed: Tensor | None) -> Tensor:
    planes[:4] = boxes.t()
    torch.mul(planes[2] - planes[0], planes[3] - planes[1], out=planes[4])
    make_proper(planes.unbind(), allowed)
    return planes


def best(spans: Spans, gt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first of the best ground truths [5, G] of each candidate, and its IoU, both [spans * length]; and the best
    IoU of each ground truth within each span, [spans, G]."""
    num_gt = gt.shape[1]
    # Ranked from the last, so that the first of several equal ones ranks highest: exact below 2^24.
    rank = torch.arange(num_gt, 0, -1, dtype=gt.dtype)[:, None]
    best_iou = torch.zeros_like(spans.planes[0])
    best_rank = torch.full_like(best_iou, num_gt)
    of_gt = gt.new_zeros(len(best_iou), num_gt)
    for span, across, down, spare in _tiles(spans, num_gt):
        overlap = iou(gt[:, down, None].unbind(), spans.planes[:, span, across].unbind(), spare[0], spare[1:])
        here = overlap.amax(0)
        rank_here = torch.eq(overlap, here, out=spare[1]).mul_(rank[down]).amax(0)
        so_far = best_iou[span, across]
        torch.where(here > so_far, rank_here, best_rank[span, across], out=best_rank[span, across])
        torch.maximum(so_far, here, out=so_far)
        torch.maximum(of_gt[span, down], overlap.amax(1), out=of_gt[span, down])
    return num_gt - best_rank.flatten().long(), best_iou.flatten(), of_gt


def as_good(spans: Spans, gt: Tensor, of_gt: Tensor) -> Tensor:
    """bool [spans * length]: the candidates whose IoU with some ground truth, above 0, is the best which that has.

    Computed again of the spans that hold a best, as `best` has them.
    """
    length = spans.planes.shape[2]
    found = torch.zeros(spans.planes[0].shape, dtype=torch.bool)
    best_of_gt = of_gt.amax(0)
    some, boxes = ((of_gt == best_of_gt) & (best_of_gt > 0)).nonzero(as_tuple=True)
    step = max(TILE // length, 1)
    memory = gt.new_empty(3, step, length)
    for span, box in zip(some.split(step), boxes.split(step), strict=True):
        spare = memory[:, : len(span)]
        overlap = iou(gt[:, box, None].unbind(), spans.planes[:, span].unbind(), spare[0], spare[1:])
        row, column = (overlap == best_of_gt[box, None]).nonzero(as_tuple=True)
        found[span[row], column] = True
    return found.flatten()


def covered(spans: Spans, ignored: Tensor) -> Tensor:
    """fp32 [spans * length]: the largest share of the area of each candidate that one of `ignored` [5, G] covers."""
    most = torch.zeros_like(spans.planes[0])
    for span, across, down, spare in _tiles(spans, ignored.shape[1]):
        candidates = spans.planes[:, span, across].unbind()
        shared = intersection(ignored[:, down, None].unbind(), candidates, spare[0], spare[1:])
        torch.maximum(most[span, across], shared.div_(candidates[4]).amax(0), out=most[span, across])
    return most.flatten()


def _tiles(spans: Spans, num_boxes: int) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Every tile: its span, its candidates in that, its boxes, and memory [3, boxes, candidates] that is reused."""
    _, num_spans, length = spans.planes.shape
    height = max(TILE // spans.across, 1)
    memory = spans.planes.new_empty(3, height * spans.across)
    for span in range(num_spans):
        for left in range(0, length, spans.across):
            for top in range(0, num_boxes, height):
                rows = min(height, num_boxes - top)
                spare = memory[:, : rows * spans.across].view(3, rows, spans.across)
                yield span, slice(left, left + spans.across), slice(top, top + rows), spare
