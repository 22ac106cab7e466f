"""Matching of candidate boxes (anchors, proposals) to ground truth, never writing the matrix of their overlaps.

Source of the rules: Ren et al. 2015 (arXiv:1506.01497), section 3.1.2.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import boxes as algebra
from . import _checks
from ._library import define

# Elements of one tile of overlaps on the CPU, and the least number of candidates across it: small enough for the cache,
# large enough for torch to share among threads.
TILE = 1 << 17
MIN_BLOCK_K = 512


class Matches(NamedTuple):
    """What `match` found for each of K candidates of B images.

    index: int64 [B, K], the ground truth of the largest IoU, the first among equals; 0 where every IoU is 0.
    iou: fp32 [B, K], that IoU.
    label: int64 [B, K], 1 positive, 0 negative, -1 neither.
    deltas: fp32 [B, K, 4], what a regressor should answer at a positive (`boxes.encode`); 0 at the others.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    iou: Tensor
    label: Tensor
    deltas: Tensor


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
    index, iou, label, deltas = match_fake(
        candidates, gt_boxes, gt_valid, valid, gt_ignore, high, low, allow_low_quality, ignore_iof, weights
    )
    deltas.zero_()
    tiles = _Tiles(candidates, gt_boxes.shape[1])
    for image in range(gt_boxes.shape[0]):
        mine = candidates if candidates.ndim == 2 else candidates[image]
        allowed = None if valid is None else valid[image]
        one, other = _Side(mine, allowed), _Side(gt_boxes[image], gt_valid[image])
        hopeful, gt_best = _best(tiles, one, other, index[image], iou[image], allow_low_quality)
        label[image] = torch.where(iou[image] >= high, 1, torch.where(iou[image] < low, 0, -1))
        if gt_ignore is not None and gt_ignore[image].any():
            covered = _covered(tiles, one, _Side(gt_boxes[image][gt_ignore[image]], None))
            label[image].masked_fill_((label[image] == 0) & (covered >= ignore_iof), -1)
        if allow_low_quality:
            label[image, _as_good(tiles, one, other, hopeful, gt_best)] = 1
        if allowed is not None:
            label[image].masked_fill_(~allowed, -1)
        # A positive overlaps something, but for a threshold of 0.
        positive = ((label[image] == 1) & (iou[image] > 0)).nonzero()[:, 0]
        wx, wy, ww, wh = weights
        offsets = algebra.encode(mine[positive], gt_boxes[image][index[image][positive]], (wx, wy, ww, wh))
        deltas[image].index_copy_(0, positive, offsets)
    return index, iou, label, deltas


class _Side:
    """Boxes by coordinate [5, N]: x1, y1, x2, y2, area.

    A box that is masked out, has no area or is not finite overlaps nothing: it is put at the origin with an area of 1,
    so that no tile has to look for it, nor for NaN. (One inverted both ways keeps its area; no overlap is positive.)
    """

    def __init__(self, boxes: Tensor, allowed: Tensor | None) -> None:
        x1, y1, x2, y2 = boxes.unbind(-1)
        area = (x2 - x1) * (y2 - y1)
        proper = (area > 0) & (area < float("inf"))
        if allowed is not None:
            proper &= allowed
        self.rows = torch.stack((x1, y1, x2, y2, area))
        if not proper.all():
            self.rows[:4].masked_fill_(~proper, 0.0)
            self.rows[4].masked_fill_(~proper, 1.0)


class _Tiles:
    """Overlaps of some ground truths (down) with a block of candidates (across), in memory that is reused."""

    def __init__(self, like: Tensor, num_gt: int) -> None:
        self.width = max(MIN_BLOCK_K, TILE // max(num_gt, 1))
        self.height = max(TILE // self.width, 1)
        self.memory = like.new_empty(3, TILE)
        self.buffers = self.memory[:, :, None].unbind()

    def across(self, candidates: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """The blocks of `candidates` [5, K]: which, their coordinates [k]."""
        for start in range(0, candidates.shape[1], self.width):
            which = slice(start, start + self.width)
            yield which, candidates[:, which].unbind()

    def down(self, gt: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """The parts of `gt` [5, G]: which, their coordinates [g, 1]."""
        for start in range(0, gt.shape[1], self.height):
            which = slice(start, start + self.height)
            yield which, gt[:, which, None].unbind()

    def iou(self, gt: tuple[Tensor, ...], candidates: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """IoU [g, k], rounded as the kernels round, and spare memory of that shape; valid until the next call."""
        inter, other, spare = self.intersection(gt, candidates)
        return inter.div_(torch.add(candidates[4], gt[4], out=other).sub_(inter)), spare

    def intersection(self, gt: tuple[Tensor, ...], candidates: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Shared areas [g, k], 0 or less where nothing is shared, and two spares of that shape; till the next call."""
        bx1, by1, bx2, by2, area_b = gt
        ax1, ay1, ax2, ay2, area_a = candidates
        shape = area_b.shape[0], area_a.shape[0]
        if self.buffers[0].shape != shape:
            self.buffers = self.memory[:, : shape[0] * shape[1]].view(3, *shape).unbind()
        inter, other, spare = self.buffers
        torch.minimum(ax2, bx2, out=inter).sub_(torch.maximum(ax1, bx1, out=spare)).clamp_(min=0)
        torch.minimum(ay2, by2, out=other).sub_(torch.maximum(ay1, by1, out=spare))
        return inter.mul_(other), other, spare


def _best(
    tiles: _Tiles, candidates: _Side, gt: _Side, index: Tensor, iou: Tensor, allow_low_quality: bool
) -> tuple[Tensor, Tensor]:
    """Fill `index` and `iou` [K].

    With `allow_low_quality` return who was at the time as good as a ground truth's best (fp32 [K], 0 or 1), and what
    those are in the end (fp32 [G], infinite in place of 0).
    """
    num_gt = gt.rows.shape[1]
    # Ground truths are ranked from the last, so that the first of several equal ones ranks highest: exact below 2^24.
    rank = torch.arange(num_gt, 0, -1, dtype=iou.dtype)[:, None]
    gt_best, hopeful, best_rank = iou.new_zeros(num_gt, 1), torch.zeros_like(iou), torch.full_like(iou, num_gt)
    iou.zero_()
    parts = [(coordinates, rank[which], gt_best[which]) for which, coordinates in tiles.down(gt.rows)]
    for which, block in tiles.across(candidates.rows):
        best, best_rank_here, hopeful_here = iou[which], best_rank[which], hopeful[which]
        for coordinates, part_rank, part_best in parts:
            overlap, spare = tiles.iou(coordinates, block)
            of_candidate = overlap.amax(0)
            first = torch.eq(overlap, of_candidate, out=spare).mul_(part_rank).amax(0)
            best_rank_here.copy_(torch.where(of_candidate > best, first, best_rank_here))
            torch.maximum(best, of_candidate, out=best)
            if allow_low_quality:
                torch.maximum(part_best, overlap.amax(1, keepdim=True), out=part_best)
                as_good = torch.eq(overlap, _infinite_for_zero(part_best), out=spare).amax(0)
                torch.maximum(hopeful_here, as_good, out=hopeful_here)
    index.copy_(num_gt - best_rank)
    return hopeful, _infinite_for_zero(gt_best)


def _infinite_for_zero(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, float("inf"))


def _as_good(tiles: _Tiles, candidates: _Side, gt: _Side, hopeful: Tensor, gt_best: Tensor) -> Tensor:
    """Indices of the candidates that some ground truth finds as good as its best: of the hopeful, computed again."""
    some = hopeful.nonzero().flatten()
    hit = hopeful.new_zeros(len(some))
    parts = [(coordinates, gt_best[which]) for which, coordinates in tiles.down(gt.rows)]
    for which, block in tiles.across(candidates.rows[:, some]):
        for coordinates, part_best in parts:
            overlap, spare = tiles.iou(coordinates, block)
            hit[which] = torch.maximum(hit[which], torch.eq(overlap, part_best, out=spare).amax(0))
    return some[hit > 0]


def _covered(tiles: _Tiles, candidates: _Side, ignored: _Side) -> Tensor:
    """fp32 [K]: the largest share of each candidate's area that one of the ignored boxes covers."""
    covered = candidates.rows.new_zeros(candidates.rows.shape[1])
    parts = [coordinates for _, coordinates in tiles.down(ignored.rows)]
    for which, block in tiles.across(candidates.rows):
        for coordinates in parts:
            share = tiles.intersection(coordinates, block)[0].div_(block[4])
            covered[which] = torch.maximum(covered[which], share.amax(0))
    return covered


def match_cuda(
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
    from fastdet.kernels import match as kernel

    index, iou, label, deltas = match_fake(
        candidates, gt_boxes, gt_valid, valid, gt_ignore, high, low, allow_low_quality, ignore_iof, weights
    )
    if index.numel():
        candidates, gt_boxes, gt_valid = candidates.contiguous(), gt_boxes.contiguous(), gt_valid.contiguous()
        valid = None if valid is None else valid.contiguous()
        gt_ignore = None if gt_ignore is None else gt_ignore.contiguous()
        gt_best = torch.zeros(gt_valid.shape, dtype=torch.int32, device=gt_valid.device) if allow_low_quality else None
        kernel.launch(
            candidates,
            gt_boxes,
            gt_valid,
            valid,
            gt_ignore,
            gt_best,
            index,
            iou,
            label,
            deltas,
            high=high,
            low=low,
            ignore_iof=ignore_iof,
            weights=weights,
        )
    return index, iou, label, deltas


def match_fake(
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
    index = candidates.new_empty(shape, dtype=torch.int64)
    return index, candidates.new_empty(shape), torch.empty_like(index), candidates.new_empty(*shape, 4)


define(
    "match(Tensor candidates, Tensor gt_boxes, Tensor gt_valid, Tensor? valid, Tensor? gt_ignore, float high, "
    "float low, bool allow_low_quality, float ignore_iof, float[] weights) -> (Tensor index, Tensor iou, Tensor label, "
    "Tensor deltas)",
    cpu=match_cpu,
    cuda=match_cuda,
    fake=match_fake,
)


def match(
    candidates: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor | None = None,
    *,
    high: float,
    low: float,
    allow_low_quality: bool = False,
    valid: Tensor | None = None,
    gt_ignore: Tensor | None = None,
    ignore_iof: float = 0.5,
    weights: algebra.Weights = (1.0, 1.0, 1.0, 1.0),
) -> Matches:
    """The best ground truth of every candidate, its IoU, a label, and the offsets to it, in memory O(K + G).

    `candidates` [K, 4] (shared by the images) or [B, K, 4] and `gt_boxes` [B, G, 4] are x1, y1, x2, y2 in pixels;
    `gt_valid` [B, G] and `valid` [B, K] are bool and leave out ground truths and candidates. The label is 1 where the
    IoU is at least `high`, 0 where it is below `low`, else -1, and -1 with index 0 and IoU 0 for candidates left out;
    the thresholds are rounded to fp32. With `allow_low_quality` every candidate that has with some ground truth the
    largest IoU (above 0, equal in fp32) which that ground truth has with any candidate is labelled 1 too; its index
    stays that of its own best. Boxes that are degenerate or not finite overlap nothing. Carries no gradient.

    A candidate that would be labelled 0 is labelled -1 where one of the boxes marked in `gt_ignore` (bool [B, G])
    covers at least the share `ignore_iof` of its area: what lies in such a region may well be an object. These boxes
    are matched only if they are in `gt_valid` too.

    `weights` are those of `boxes.encode`, by which the offsets are multiplied.

    Raises:
        TypeError: an argument is not a tensor of the kind above, or the boxes are of two dtypes.
        ValueError: shapes or devices that do not fit together; thresholds outside [0, 1] or `low` above `high`.
    """
    given = {"candidates": candidates, "gt_boxes": gt_boxes}
    gt_boxes = _checks.boxes("gt_boxes", gt_boxes, ndim=3).detach()
    batch, num_gt = gt_boxes.shape[:2]
    candidates = _checks.boxes("candidates", candidates, ndim=None).detach()
    _checks.same_dtype(**given)
    if candidates.ndim not in (2, 3) or (candidates.ndim == 3 and candidates.shape[0] != batch):
        raise ValueError(f"candidates must have the shape [K, 4] or [{batch}, K, 4], got {list(candidates.shape)}")
    if gt_valid is None:
        gt_valid = torch.ones(batch, num_gt, dtype=torch.bool, device=gt_boxes.device)
    else:
        _checks.booleans("gt_valid", gt_valid, (batch, num_gt))
    _checks.same_device(candidates=candidates, gt_boxes=gt_boxes, gt_valid=gt_valid)
    if valid is not None:
        _checks.booleans("valid", valid, (batch, candidates.shape[-2]))
        _checks.same_device(candidates=candidates, valid=valid)
    if gt_ignore is not None:
        _checks.booleans("gt_ignore", gt_ignore, (batch, num_gt))
        _checks.same_device(candidates=candidates, gt_ignore=gt_ignore)
    high, low = _checks.threshold("high", high), _checks.threshold("low", low)
    ignore_iof = _checks.threshold("ignore_iof", ignore_iof)
    if low > high:
        raise ValueError(f"low must not exceed high, got {low} and {high}")
    masks = gt_valid, valid, gt_ignore
    rules = high, low, allow_low_quality, ignore_iof, [float(weight) for weight in weights]
    return Matches(*torch.ops.fastdet.match(candidates, gt_boxes, *masks, *rules))
