"""The best ground truth of every candidate box and a label, without the matrix of their overlaps."""

import torch
import triton
import triton.language as tl

from .overlap import intersection_union, iou, load_boxes, ratio_or_zero

PAIRS = 2048
MIN_BLOCK_G = 16
MAX_BLOCK_G = 64


@triton.jit
def _overlap(ax1, ay1, ax2, ay2, allowed, gt_boxes_ptr, gt_valid_ptr, first_gt, start, num_gt, BLOCK_G: tl.constexpr):
    """IoU [BLOCK_K, BLOCK_G] of candidates [BLOCK_K, 1] with ground truths from `start`; 0 where either is left out."""
    column = start + tl.arange(0, BLOCK_G)
    inside = column < num_gt
    valid = tl.load(gt_valid_ptr + first_gt + column, mask=inside, other=0) != 0
    bx1, by1, bx2, by2 = load_boxes(gt_boxes_ptr, (first_gt + column)[None, :], (inside & valid)[None, :])
    overlap = iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    return tl.where(allowed & (inside & valid)[None, :], overlap, 0.0)


@triton.jit
def _covered(ax1, ay1, ax2, ay2, gt_boxes_ptr, gt_ignore_ptr, first_gt, start, num_gt, BLOCK_G: tl.constexpr):
    """The largest share [BLOCK_K] of the area of candidates [BLOCK_K, 1] that one ignored box from `start` covers."""
    column = start + tl.arange(0, BLOCK_G)
    inside = column < num_gt
    ignored = inside & (tl.load(gt_ignore_ptr + first_gt + column, mask=inside, other=0) != 0)
    bx1, by1, bx2, by2 = load_boxes(gt_boxes_ptr, (first_gt + column)[None, :], ignored[None, :])
    inter, _ = intersection_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    finite = (bx2 - bx1) * (by2 - by1) < float("inf")
    share = ratio_or_zero(inter, (ax2 - ax1) * (ay2 - ay1))
    return tl.max(tl.where(ignored[None, :] & finite, share, 0.0), axis=1)


@triton.jit(do_not_specialize=["num_candidates", "num_gt", "candidates_stride_b"])
def _match_kernel(
    candidates_ptr,
    gt_boxes_ptr,
    gt_valid_ptr,
    valid_ptr,
    gt_ignore_ptr,
    gt_best_ptr,
    index_ptr,
    iou_ptr,
    label_ptr,
    num_candidates,
    num_gt,
    high,
    low,
    ignore_iof,
    candidates_stride_b,
    HAS_VALID: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    LOW_QUALITY: tl.constexpr,
    BEST_KNOWN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A block of candidates against every ground truth of its image, tile after tile.

                            gt_boxes
                     BLOCK_G  BLOCK_G  BLOCK_G
                    +--------+--------+--------+
           BLOCK_K  |   ->       ->       ->   |   program (block of candidates, image)
    candidates      +--------+--------+--------+

    First (BEST_KNOWN false): the row maxima are kept in registers and written once; the column maxima go to gt_best by
    an atomic maximum, whose order does not matter. Then, for LOW_QUALITY alone (BEST_KNOWN true): the tiles are
    computed again, and a candidate that equals a column's maximum is labelled 1.

    candidates_ptr [K, 4] with candidates_stride_b 0, or [B, K, 4] with 4 K; gt_boxes_ptr [B, G, 4]: fp32 corners,
    pixels, contiguous. gt_valid_ptr [B, G], valid_ptr [B, K], gt_ignore_ptr [B, G]: bool; the last two are read if
    HAS_VALID and HAS_IGNORE.
    gt_best_ptr [B, G]: int32 bits of an fp32 IoU, zero at first; touched if LOW_QUALITY.
    index_ptr, label_ptr [B, K]: int64. iou_ptr [B, K]: fp32.
    """
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask = row < num_candidates
    out = batch * num_candidates + row
    allowed = row_mask
    if HAS_VALID:
        allowed = allowed & (tl.load(valid_ptr + out, mask=row_mask, other=0) != 0)
    image_ptr = candidates_ptr + batch * candidates_stride_b
    ax1, ay1, ax2, ay2 = load_boxes(image_ptr, row[:, None], row_mask[:, None])
    first_gt = batch * num_gt

    if BEST_KNOWN:
        hit = tl.zeros([BLOCK_K], dtype=tl.int32)
        for start in range(0, num_gt, BLOCK_G):
            overlap = _overlap(
                ax1, ay1, ax2, ay2, allowed[:, None], gt_boxes_ptr, gt_valid_ptr, first_gt, start, num_gt, BLOCK_G
            )
            column = start + tl.arange(0, BLOCK_G)
            best = tl.load(gt_best_ptr + first_gt + column, mask=column < num_gt, other=0).to(tl.float32, bitcast=True)
            same = (overlap == best[None, :]) & (overlap > 0.0)
            hit = tl.maximum(hit, tl.max(same.to(tl.int32), axis=1))
        tl.store(label_ptr + out, tl.full([BLOCK_K], 1, dtype=tl.int64), mask=hit > 0)
    else:
        best = tl.zeros([BLOCK_K], dtype=tl.float32)
        best_index = tl.zeros([BLOCK_K], dtype=tl.int32)
        for start in range(0, num_gt, BLOCK_G):
            overlap = _overlap(
                ax1, ay1, ax2, ay2, allowed[:, None], gt_boxes_ptr, gt_valid_ptr, first_gt, start, num_gt, BLOCK_G
            )
            here, where = tl.max(overlap, axis=1, return_indices=True, return_indices_tie_break_left=True)
            better = here > best
            best_index = tl.where(better, start + where, best_index)
            best = tl.where(better, here, best)
            if LOW_QUALITY:
                column = start + tl.arange(0, BLOCK_G)
                bits = tl.max(overlap.to(tl.int32, bitcast=True), axis=0)
                tl.atomic_max(gt_best_ptr + first_gt + column, bits, mask=(column < num_gt) & (bits > 0), sem="relaxed")
        label = tl.where(best >= high, 1, tl.where(best < low, 0, -1))
        if HAS_IGNORE:
            # A loop of its own: with both in one there are too few registers.
            covered = tl.zeros([BLOCK_K], dtype=tl.float32)
            for start in range(0, num_gt, BLOCK_G):
                here = _covered(ax1, ay1, ax2, ay2, gt_boxes_ptr, gt_ignore_ptr, first_gt, start, num_gt, BLOCK_G)
                covered = tl.maximum(covered, here)
            label = tl.where((label == 0) & (covered >= ignore_iof), -1, label)
        label = tl.where(allowed, label, -1)
        tl.store(index_ptr + out, best_index.to(tl.int64), mask=row_mask)
        tl.store(iou_ptr + out, best, mask=row_mask)
        tl.store(label_ptr + out, label.to(tl.int64), mask=row_mask)


def block_sizes(num_gt: int) -> tuple[int, int]:
    """(BLOCK_K, BLOCK_G): tiles of PAIRS pairs, as wide as the ground truths ask for within bounds."""
    block_g = min(max(triton.next_power_of_2(num_gt), MIN_BLOCK_G), MAX_BLOCK_G)
    return PAIRS // block_g, block_g


def launch(
    candidates: torch.Tensor,
    gt_boxes: torch.Tensor,
    gt_valid: torch.Tensor,
    valid: torch.Tensor | None,
    gt_ignore: torch.Tensor | None,
    gt_best: torch.Tensor | None,
    index: torch.Tensor,
    iou: torch.Tensor,
    label: torch.Tensor,
    *,
    high: float,
    low: float,
    ignore_iof: float,
) -> None:
    """Fill `index`, `iou` and `label` [B, K]; `gt_best` [B, G], int32 zeros, asks for low-quality matches as well."""
    batch, num_candidates = index.shape
    num_gt = gt_boxes.shape[1]
    block_k, block_g = block_sizes(num_gt)
    for best_known in (False, True) if gt_best is not None else (False,):
        _match_kernel[(triton.cdiv(num_candidates, block_k), batch)](
            candidates_ptr=candidates,
            gt_boxes_ptr=gt_boxes,
            gt_valid_ptr=gt_valid,
            valid_ptr=valid,
            gt_ignore_ptr=gt_ignore,
            gt_best_ptr=gt_best,
            index_ptr=index,
            iou_ptr=iou,
            label_ptr=label,
            num_candidates=num_candidates,
            num_gt=num_gt,
            high=high,
            low=low,
            ignore_iof=ignore_iof,
            candidates_stride_b=0 if candidates.ndim == 2 else num_candidates * 4,
            HAS_VALID=valid is not None,
            HAS_IGNORE=gt_ignore is not None,
            LOW_QUALITY=gt_best is not None,
            BEST_KNOWN=best_known,
            BLOCK_K=block_k,
            BLOCK_G=block_g,
            enable_fp_fusion=False,
        )
