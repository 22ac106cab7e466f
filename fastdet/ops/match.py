"""Matching of candidate boxes (anchors, proposals) to ground truth, never writing the matrix of their overlaps.

Source of the rules: Ren et al. 2015 (arXiv:1506.01497), section 3.1.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdet import boxes as algebra
from fastdet.ops import _checks
from fastdet.ops._library import define
from fastdet.ops.cpu import match as search


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
    # What a candidate that takes no part has.
    for tensor, value in ((index, 0), (iou, 0), (label, -1), (deltas, 0)):
        tensor.fill_(value)
    for image in range(gt_boxes.shape[0]):
        every = candidates if candidates.ndim == 2 else candidates[image]
        rows = slice(None) if valid is None else valid[image].nonzero()[:, 0]
        mine = every[rows]
        if not len(mine):
            continue
        gt = search.planes_of(gt_boxes[image], gt_valid[image])
        spans = search.spans_of(mine, gt.shape[1])
        best, best_iou, of_gt = search.best(spans, gt)
        best, best_iou = best[: len(mine)], best_iou[: len(mine)]
        labels = torch.where(best_iou >= high, 1, torch.where(best_iou < low, 0, -1))
        if gt_ignore is not None and gt_ignore[image].any():
            ignored = search.planes_of(gt_boxes[image][gt_ignore[image]])
            covered = search.covered(spans, ignored)[: len(mine)]
            labels.masked_fill_((labels == 0) & (covered >= ignore_iof), -1)
        if allow_low_quality:
            labels.masked_fill_(search.as_good(spans, gt, of_gt)[: len(mine)], 1)
        index[image, rows], iou[image, rows], label[image, rows] = best, best_iou, labels
        # A positive overlaps something, but for a threshold of 0.
        positive = ((label[image] == 1) & (iou[image] > 0)).nonzero()[:, 0]
        wx, wy, ww, wh = weights
        offsets = algebra.encode(every[positive], gt_boxes[image][index[image][positive]], (wx, wy, ww, wh))
        deltas[image].index_copy_(0, positive, offsets)
    return index, iou, label, deltas


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
    if not isinstance(weights, tuple | list) or len(weights) != 4:
        raise TypeError(f"weights must be four numbers, got {weights!r}")
    factors = [float(_checks.positive("weights", weight)) for weight in weights]
    rules = high, low, _checks.flag("allow_low_quality", allow_low_quality), ignore_iof, factors
    return Matches(*torch.ops.fastdet.match(candidates, gt_boxes, *masks, *rules))
