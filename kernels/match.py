"""The best ground truth of every candidate box, a label and the offsets to it, without the matrix of their overlaps.

Two passes, each over all pairs, tile after tile: the first, for low-quality matches alone, finds the best IoU of each
ground truth; the second computes the same tiles again and decides each candidate.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.boxes import intersection_union, iou, load_boxes, ratio_or_zero, store_fours

# Parts of the ground truths that programs of their own look at for the best of each.
MAX_PARTS = 8


class Config(NamedTuple):
    """Candidates and ground truths of a tile, powers of two, and warps: a candidate a thread."""

    block_k: int
    block_g: int
    num_warps: int


def config(num_gt: int) -> Config:
    """Few candidates a program, so that there are many programs; wide enough for what is needed once a program."""
    return Config(block_k=64, block_g=min(max(triton.next_power_of_2(num_gt), 8), 16), num_warps=2)


@triton.jit
def _overlap(ax1, ay1, ax2, ay2, gt_boxes_ptr, gt_valid_ptr, first_gt, start, num_gt, BLOCK_G: tl.constexpr):
    """IoU [BLOCK_G, BLOCK_K] of ground truths from `start` with candidates [1, BLOCK_K].

    What is left out of either is loaded as zeros, which overlap nothing.
    """
    gt = start + tl.arange(0, BLOCK_G)
    inside = gt < num_gt
    valid = tl.load(gt_valid_ptr + first_gt + gt, mask=inside, other=0) != 0
    bx1, by1, bx2, by2 = load_boxes(gt_boxes_ptr, first_gt + gt, inside & valid)
    return iou(ax1, ay1, ax2, ay2, bx1[:, None], by1[:, None], bx2[:, None], by2[:, None])


@triton.jit
def _covered(ax1, ay1, ax2, ay2, gt_boxes_ptr, gt_ignore_ptr, first_gt, start, num_gt, BLOCK_G: tl.constexpr):
    """The largest share [BLOCK_K] of the area of candidates [1, BLOCK_K] that one ignored box from `start` covers."""
    gt = start + tl.arange(0, BLOCK_G)
    inside = gt < num_gt
    ignored = inside & (tl.load(gt_ignore_ptr + first_gt + gt, mask=inside, other=0) != 0)
    bx1, by1, bx2, by2 = load_boxes(gt_boxes_ptr, first_gt + gt, ignored)
    inter, _ = intersection_union(ax1, ay1, ax2, ay2, bx1[:, None], by1[:, None], bx2[:, None], by2[:, None])
    finite = (bx2 - bx1) * (by2 - by1) < float("inf")
    share = ratio_or_zero(inter, (ax2 - ax1) * (ay2 - ay1))
    return tl.max(tl.where((ignored & finite)[:, None], share, 0.0), axis=0)


@triton.jit
def _load_candidates(
    candidates_ptr, valid_ptr, num_candidates, stride_b, HAS_VALID: tl.constexpr, BLOCK_K: tl.constexpr
):
    """This program's candidates: a mask, where their results go, whether they take part, four corners [1, BLOCK_K]."""
    batch = tl.program_id(1).to(tl.int64)
    candidate = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = candidate < num_candidates
    out = batch * num_candidates + candidate
    allowed = mask
    if HAS_VALID:
        allowed = allowed & (tl.load(valid_ptr + out, mask=mask, other=0) != 0)
    x1, y1, x2, y2 = load_boxes(candidates_ptr + batch * stride_b, candidate, allowed)
    return mask, out, allowed, x1[None, :], y1[None, :], x2[None, :], y2[None, :]


@triton.jit(do_not_specialize=["num_candidates", "num_gt", "candidates_stride_b"])
def _best_kernel(
    candidates_ptr,
    gt_boxes_ptr,
    gt_valid_ptr,
    valid_ptr,
    gt_best_ptr,
    num_candidates,
    num_gt,
    candidates_stride_b,
    HAS_VALID: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The best IoU of each ground truth with any candidate.

               candidates
                BLOCK_K
               +-------+
      BLOCK_G  |   v   |    program (block of candidates, image, part): every so many tiles from its own on, as there
      BLOCK_G  |   v   |    are parts; the maximum of a row goes to gt_best by an atomic maximum, in any order
               +-------+

    Arguments as of `_match_kernel`; gt_best_ptr [B, G]: int32 bits of an fp32 IoU, zero at first.
    """
    first_gt = tl.program_id(1).to(tl.int64) * num_gt
    _, _, _, ax1, ay1, ax2, ay2 = _load_candidates(
        candidates_ptr, valid_ptr, num_candidates, candidates_stride_b, HAS_VALID, BLOCK_K
    )
    for start in range(tl.program_id(2) * BLOCK_G, num_gt, tl.num_programs(2) * BLOCK_G):
        overlap = _overlap(ax1, ay1, ax2, ay2, gt_boxes_ptr, gt_valid_ptr, first_gt, start, num_gt, BLOCK_G)
        gt = start + tl.arange(0, BLOCK_G)
        bits = tl.max(overlap.to(tl.int32, bitcast=True), axis=1)
        tl.atomic_max(gt_best_ptr + first_gt + gt, bits, mask=(gt < num_gt) & (bits > 0), sem="relaxed")


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
    deltas_ptr,
    num_candidates,
    num_gt,
    high,
    low,
    ignore_iof,
    weight_x,
    weight_y,
    weight_w,
    weight_h,
    candidates_stride_b,
    HAS_VALID: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    LOW_QUALITY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A block of candidates against every ground truth of its image, tile after tile, and then its results.

               candidates
                BLOCK_K
               +-------+
      BLOCK_G  |   v   |    program (block of candidates, image): the maximum of each column stays in its thread;
      BLOCK_G  |   v   |    with LOW_QUALITY also whether the column holds the maximum of a row
               +-------+

    candidates_ptr [K, 4] with candidates_stride_b 0, or [B, K, 4] with 4 K; gt_boxes_ptr [B, G, 4]: fp32 corners,
    pixels, contiguous. gt_valid_ptr [B, G], valid_ptr [B, K], gt_ignore_ptr [B, G]: bool; the last two are read if
    HAS_VALID and HAS_IGNORE. gt_best_ptr [B, G]: what `_best_kernel` wrote; read if LOW_QUALITY.
    index_ptr, label_ptr [B, K]: int64. iou_ptr [B, K]: fp32. deltas_ptr [B, K, 4]: fp32, times the four weights.
    """
    first_gt = tl.program_id(1).to(tl.int64) * num_gt
    mask, out, allowed, ax1, ay1, ax2, ay2 = _load_candidates(
        candidates_ptr, valid_ptr, num_candidates, candidates_stride_b, HAS_VALID, BLOCK_K
    )
    best = tl.zeros([BLOCK_K], dtype=tl.float32)
    best_index = tl.zeros([BLOCK_K], dtype=tl.int32)
    as_good = tl.zeros([BLOCK_K], dtype=tl.int32)
    for start in range(0, num_gt, BLOCK_G):
        overlap = _overlap(ax1, ay1, ax2, ay2, gt_boxes_ptr, gt_valid_ptr, first_gt, start, num_gt, BLOCK_G)
        here, where = tl.max(overlap, axis=0, return_indices=True, return_indices_tie_break_left=True)
        better = here > best
        best_index = tl.where(better, start + where, best_index)
        best = tl.where(better, here, best)
        if LOW_QUALITY:
            gt = start + tl.arange(0, BLOCK_G)
            most = tl.load(gt_best_ptr + first_gt + gt, mask=gt < num_gt, other=0).to(tl.float32, bitcast=True)
            same = (overlap == most[:, None]) & (overlap > 0.0)
            as_good = tl.maximum(as_good, tl.max(same.to(tl.int32), axis=0))
    label = tl.where(best >= high, 1, tl.where(best < low, 0, -1))
    if HAS_IGNORE:
        # A loop of its own: with both in one there are too few registers.
        covered = tl.zeros([BLOCK_K], dtype=tl.float32)
        for start in range(0, num_gt, BLOCK_G):
            here = _covered(ax1, ay1, ax2, ay2, gt_boxes_ptr, gt_ignore_ptr, first_gt, start, num_gt, BLOCK_G)
            covered = tl.maximum(covered, here)
        label = tl.where((label == 0) & (covered >= ignore_iof), -1, label)
    label = tl.where(as_good > 0, 1, label)
    label = tl.where(allowed, label, -1)
    tl.store(index_ptr + out, best_index.to(tl.int64), mask=mask)
    tl.store(iou_ptr + out, best, mask=mask)
    tl.store(label_ptr + out, label.to(tl.int64), mask=mask)

    # A positive overlaps something (but for a threshold of 0), so that both boxes have sides to take logarithms of.
    positive = (label == 1) & (best > 0.0)
    bx1, by1, bx2, by2 = load_boxes(gt_boxes_ptr, first_gt + best_index, positive)
    x1, y1, x2, y2 = load_boxes(
        candidates_ptr + tl.program_id(1).to(tl.int64) * candidates_stride_b,
        tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K),
        positive,
    )
    width = tl.where(positive, x2 - x1, 1.0)
    height = tl.where(positive, y2 - y1, 1.0)
    gt_width = tl.where(positive, bx2 - bx1, 1.0)
    gt_height = tl.where(positive, by2 - by1, 1.0)
    dx = weight_x * ((bx1 + 0.5 * gt_width) - (x1 + 0.5 * width)) / width
    dy = weight_y * ((by1 + 0.5 * gt_height) - (y1 + 0.5 * height)) / height
    dw = weight_w * tl.log(gt_width / width)
    dh = weight_h * tl.log(gt_height / height)
    store_fours(
        deltas_ptr,
        out,
        tl.where(positive, dx, 0.0),
        tl.where(positive, dy, 0.0),
        tl.where(positive, dw, 0.0),
        tl.where(positive, dh, 0.0),
        mask,
    )


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
    deltas: torch.Tensor,
    *,
    high: float,
    low: float,
    ignore_iof: float,
    weights: Sequence[float],
) -> None:
    """Fill `index`, `iou`, `label` [B, K] and `deltas` [B, K, 4]; `gt_best` [B, G], int32 zeros, asks for low-quality
    matches as well."""
    batch, num_candidates = index.shape
    block_k, block_g, num_warps = config(gt_boxes.shape[1])
    shared = {
        "candidates_ptr": candidates,
        "gt_boxes_ptr": gt_boxes,
        "gt_valid_ptr": gt_valid,
        "valid_ptr": valid,
        "gt_best_ptr": gt_best,
        "num_candidates": num_candidates,
        "num_gt": gt_boxes.shape[1],
        "candidates_stride_b": 0 if candidates.ndim == 2 else num_candidates * 4,
        "HAS_VALID": valid is not None,
        "BLOCK_K": block_k,
        "BLOCK_G": block_g,
        "num_warps": num_warps,
        "enable_fp_fusion": False,
    }
    grid = (triton.cdiv(num_candidates, block_k), batch)
    if gt_best is not None:
        # What it finds is scattered anyhow, so the work of few candidates is cut in the other direction too.
        _best_kernel[(*grid, min(triton.cdiv(gt_boxes.shape[1], block_g), MAX_PARTS))](**shared)
    _match_kernel[grid](
        gt_ignore_ptr=gt_ignore,
        index_ptr=index,
        iou_ptr=iou,
        label_ptr=label,
        deltas_ptr=deltas,
        high=high,
        low=low,
        ignore_iof=ignore_iof,
        weight_x=weights[0],
        weight_y=weights[1],
        weight_w=weights[2],
        weight_h=weights[3],
        HAS_IGNORE=gt_ignore is not None,
        LOW_QUALITY=gt_best is not None,
        **shared,
    )
