"""The search of `match` on the CPU, in tiles of overlaps that stay in a core's cache."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdet.ops.cpu.overlap import TILE, Memory, Planes, intersection, iou, make_proper

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


def spans_of(candidates: Tensor, num_boxes: int) -> Spans:
    """`candidates` [K, 4], K > 0, for a search among `num_boxes` boxes."""
    count = len(candidates)
    across = min(max(TILE // max(num_boxes, 1), MIN_ACROSS), count)
    length = -(-count // (across * MAX_SPANS)) * across
    planes = candidates.new_zeros(5, -(-count // length) * length)
    planes[4, count:] = 1.0
    _fill(planes[:, :count], candidates, None)
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
    for tile in _tiles(spans, gt):
        overlap = iou(tile.boxes, tile.candidates, tile.memory)
        here = overlap.amax(0)
        here_rank = torch.eq(overlap, here, out=tile.memory[1]).mul_(rank[tile.down]).amax(0)
        if tile.down.start:
            here_rank = torch.where(here > best_iou[tile.at], here_rank, best_rank[tile.at])
            here = torch.maximum(here, best_iou[tile.at])
        best_iou[tile.at], best_rank[tile.at] = here, here_rank
        mine = of_gt[tile.at[0], tile.down]
        torch.maximum(mine, overlap.amax(1), out=mine)
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
        overlap = iou(gt[:, box, None].unbind(), spans.planes[:, span].unbind(), memory[:, : len(span)].unbind())
        row, column = (overlap == best_of_gt[box, None]).nonzero(as_tuple=True)
        found[span[row], column] = True
    return found.flatten()


def covered(spans: Spans, ignored: Tensor) -> Tensor:
    """fp32 [spans * length]: the largest share of the area of each candidate that one of `ignored` [5, G] covers."""
    most = torch.zeros_like(spans.planes[0])
    for tile in _tiles(spans, ignored):
        shared = intersection(tile.boxes, tile.candidates, tile.memory)
        torch.maximum(most[tile.at], shared.div_(tile.candidates[4]).amax(0), out=most[tile.at])
    return most.flatten()


class _Tile(NamedTuple):
    """Some candidates, across, with their place among the spans; some boxes, down; memory for their overlaps."""

    at: tuple[int, slice]
    candidates: Planes
    down: slice
    boxes: Planes
    memory: Memory


def _tiles(spans: Spans, boxes: Tensor) -> Iterator[_Tile]:
    """Every tile of `spans` and `boxes` [5, G]; their memory is reused."""
    _, num_spans, length = spans.planes.shape
    num_boxes, across = boxes.shape[1], spans.across
    height = max(TILE // across, 1)
    memory = boxes.new_empty(3, min(height, num_boxes), across)
    downs = [slice(top, min(top + height, num_boxes)) for top in range(0, num_boxes, height)]
    rows = [(down, boxes[:, down, None].unbind(), memory[:, : down.stop - down.start].unbind()) for down in downs]
    for span in range(num_spans):
        for left in range(0, length, across):
            at = span, slice(left, left + across)
            candidates = spans.planes[:, span, at[1]].unbind()
            for down, some, spare in rows:
                yield _Tile(at, candidates, down, some, spare)
