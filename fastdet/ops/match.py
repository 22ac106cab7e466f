"""Matching of candidate boxes (anchors, proposals) to ground truth, never writing the matrix of their overlaps.

Source of the rules: Ren et al. 2015 (arXiv:1506.01497), section 3.1.2.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdet.boxes import Weights
from fastdet.ops import _checks
from fastdet.ops._library import define
from fastdet.ops.cpu.match import match_cpu


class Matches(NamedTuple):
    """What `match` found for each of K candidates of B images.

    index: int64 [B, K], the ground truth of the largest IoU, the first among equals; 0 where every IoU is 0.
    iou: fp32 [B, K], that IoU.
    label: int64 [B, K], 1 positive, 0 negative, -1 neither.
    deltas: fp32 [B, K, 4], the regression targets of a positive (`fastdet.boxes.encode`); 0 for the others.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    iou: Tensor
    label: Tensor
    deltas: Tensor


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

    results = match_fake(candidates, gt_boxes)
    if results[0].numel():
        masks = [None if mask is None else mask.contiguous() for mask in (gt_valid, valid, gt_ignore)]
        gt_best = torch.zeros(gt_valid.shape, dtype=torch.int32, device=gt_valid.device) if allow_low_quality else None
        tensors: list[Any] = [candidates.contiguous(), gt_boxes.contiguous(), *masks, gt_best, *results]
        kernel.launch(*tensors, high=high, low=low, ignore_iof=ignore_iof, weights=weights)
    return results


def match_fake(candidates: Tensor, gt_boxes: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
) -> Matches:
    """The best ground truth of every candidate, its IoU, a label, and the deltas to it, in memory O(K + G).

    Carries no gradient. Boxes that are degenerate or not finite overlap nothing.

    Args:
        candidates: [K, 4], shared by the images, or [B, K, 4]: x1, y1, x2, y2 in pixels, fp32, fp16 or bf16.
        gt_boxes: [B, G, 4], likewise; its dtype may be another.
        gt_valid: bool [B, G]; where it is False the ground truth is left out. None: all are valid.
        high: in [0, 1], rounded to fp32: the label is 1 where the IoU is at least this.
        low: in [0, 1] and not above `high`, rounded to fp32: the label is 0 where the IoU is below this, -1 in between.
        allow_low_quality: label 1 also every candidate whose IoU with some ground truth, above 0, is the largest which
            that ground truth has with any candidate (equal in fp32). Its index stays that of its own best.
        valid: bool [B, K]; a candidate where it is False has label -1, index 0 and IoU 0. None: all are valid.
        gt_ignore: bool [B, G]; marks regions in which what looks like background may well be an object. They are
            matched only if they are in `gt_valid` too. None: no region.
        ignore_iof: in [0, 1]: a candidate of label 0 becomes -1 where a box of `gt_ignore` covers at least this share
            of its area.
        weights: four factors of the deltas, above 0, as of `fastdet.boxes.encode`.

    Returns:
        Matches: index, iou and label [B, K], deltas [B, K, 4].

    Raises:
        TypeError: an argument is not a tensor of the kind above.
        ValueError: shapes or devices that do not fit together; thresholds outside [0, 1] or `low` above `high`.
    """
    gt_boxes = _checks.boxes("gt_boxes", gt_boxes, ndim=3).detach()
    batch, num_gt = gt_boxes.shape[:2]
    candidates = _checks.boxes("candidates", candidates, ndim=None).detach()
    if candidates.ndim not in (2, 3) or (candidates.ndim == 3 and candidates.shape[0] != batch):
        raise ValueError(f"candidates must have the shape [K, 4] or [{batch}, K, 4], got {list(candidates.shape)}")
    if gt_valid is None:
        gt_valid = torch.ones(batch, num_gt, dtype=torch.bool, device=gt_boxes.device)
    masks = {"gt_valid": gt_valid, "valid": valid, "gt_ignore": gt_ignore}
    for name, mask in masks.items():
        if mask is not None:
            shape = (batch, candidates.shape[-2] if name == "valid" else num_gt)
            _checks.tensor(name, mask, shape, torch.bool)
    _checks.same_device(candidates=candidates, gt_boxes=gt_boxes, **masks)
    high, low = _checks.threshold("high", high), _checks.threshold("low", low)
    ignore_iof = _checks.threshold("ignore_iof", ignore_iof)
    if low > high:
        raise ValueError(f"low must not exceed high, got {low} and {high}")
    if not isinstance(weights, tuple | list) or len(weights) != 4:
        raise TypeError(f"weights must be four numbers, got {weights!r}")
    factors = [float(_checks.positive("weights", weight)) for weight in weights]
    rules = high, low, _checks.flag("allow_low_quality", allow_low_quality), ignore_iof, factors
    return Matches(*torch.ops.fastdet.match(candidates, gt_boxes, *masks.values(), *rules))
