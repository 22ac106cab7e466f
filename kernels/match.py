"""The best ground truth of every candidate box, its label and its deltas, without the matrix of their overlaps.

Two passes over all pairs, tile after tile: the first, for low-quality matches only, finds the best IoU of each ground
truth; the second computes the same tiles again and decides each candidate.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.boxes import load_boxes, store_rows_of_4
from fastdet.kernels.common.match_tiles import ignored_share_tile, iou_tile, load_candidates, program_candidates
from fastdet.kernels.common.nms_overlap import is_compiled

# At most this many programs share the ground truths of an image in the first pass.
MAX_PARTS = 16


class Config(NamedTuple):
    """Candidates and ground truths of a tile, powers of two, in the second and in the first pass, and warps."""

    block_k: int
    block_g: int
    num_warps: int
    best_block_k: int
    best_block_g: int


def config(num_gt: int) -> Config:
    """One candidate and 8 ground truths per thread: of more, registers would hold too few warps.

    The first pass reduces over the candidates, so its tiles are wide and of one warp, with 2 x 4 pairs per thread.
    """
    block_g = min(max(triton.next_power_of_2(num_gt), 8), 32)
    return Config(32, block_g, num_warps=block_g // 8, best_block_k=64, best_block_g=4)


@triton.jit(do_not_specialize=["num_candidates", "num_gt", "candidates_stride_b"])
def _best_kernel(
    # Tensors, all contiguous
    candidates_ptr,  # [K, 4] or [B, K, 4] fp32, pixels
    gt_boxes_ptr,  # [B, G, 4] fp32, pixels
    gt_valid_ptr,  # [B, G] bool
    valid_ptr,  # [B, K] bool; read if HAS_VALID
    gt_best_ptr,  # [B, G] int32, output: the bits of an fp32 IoU; zero before
    # Sizes
    num_candidates,
    num_gt,
    # Strides
    candidates_stride_b,  # 0 for [K, 4], 4 K for [B, K, 4]
    # Constexprs
    HAS_VALID: tl.constexpr,
    FUSED: tl.constexpr,  # multiply-adds are
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The best IoU of each ground truth with any candidate.

             candidates
              BLOCK_K
             +-------+
    BLOCK_G  |   v   |    program (image and block of candidates; part): part p of n takes the tiles p, p + n ..;
    BLOCK_G  |   v   |    the maximum of a row goes to gt_best by an atomic maximum, in any order
             +-------+
    """
    image, _ = program_candidates(num_candidates, BLOCK_K)
    first_gt = image * num_gt
    _, _, _, ax1, ay1, ax2, ay2 = load_candidates(
        candidates_ptr, valid_ptr, num_candidates, candidates_stride_b, HAS_VALID, BLOCK_K
    )
    for start in range(tl.program_id(1) * BLOCK_G, num_gt, tl.num_programs(1) * BLOCK_G):
        overlap = iou_tile(ax1, ay1, ax2, ay2, gt_boxes_ptr, gt_valid_ptr, first_gt, start, num_gt, FUSED, BLOCK_G)
        # The maximum of each row, [BLOCK_G]; bits of floats that are not negative compare as the floats do.
        gt = start + tl.arange(0, BLOCK_G)
        bits = tl.max(overlap.to(tl.int32, bitcast=True), axis=1)
        tl.atomic_max(gt_best_ptr + first_gt + gt, bits, mask=(gt < num_gt) & (bits > 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_candidates", "num_gt", "candidates_stride_b"])
def _match_kernel(
    # Tensors, all contiguous
    candidates_ptr,  # [K, 4] or [B, K, 4] fp32, pixels
    gt_boxes_ptr,  # [B, G, 4] fp32, pixels
    gt_valid_ptr,  # [B, G] bool
    valid_ptr,  # [B, K] bool; read if HAS_VALID
    gt_ignore_ptr,  # [B, G] bool; read if HAS_IGNORE
    gt_best_ptr,  # [B, G] int32, from `_best_kernel`; read if LOW_QUALITY
    index_ptr,  # [B, K] int64, output: best ground truth
    iou_ptr,  # [B, K] fp32, output: its IoU
    label_ptr,  # [B, K] int64, output: 1 positive, 0 negative, -1 neither
    deltas_ptr,  # [B, K, 4] fp32, output: encoded box times the four weights; 0 unless positive
    # Sizes
    num_candidates,
    num_gt,
    # Scalars
    high,  # IoU from which a candidate is positive
    low,  # IoU below which it is negative
    ignore_iof,  # share of its area inside one ignored box from which a negative becomes neither
    weight_x,
    weight_y,
    weight_w,
    weight_h,
    # Strides
    candidates_stride_b,  # 0 for [K, 4], 4 K for [B, K, 4]
    # Constexprs
    HAS_VALID: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    LOW_QUALITY: tl.constexpr,
    FUSED: tl.constexpr,  # multiply-adds are
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A block of candidates against every ground truth of its image, tile after tile, and then its results.

             candidates
              BLOCK_K
             +-------+
    BLOCK_G  |   v   |    program (image and block of candidates): the maximum of each column stays in its thread;
    BLOCK_G  |   v   |    with LOW_QUALITY also whether the column holds the maximum of a row
             +-------+
    """
    image, candidate = program_candidates(num_candidates, BLOCK_K)
    first_gt = image * num_gt
    mask, out, valid, ax1, ay1, ax2, ay2 = load_candidates(
        candidates_ptr, valid_ptr, num_candidates, candidates_stride_b, HAS_VALID, BLOCK_K
    )

    # Find the best ground truth of each candidate, the first among equals: all [BLOCK_K].
    best = tl.zeros([BLOCK_K], dtype=tl.float32)
    best_index = tl.zeros([BLOCK_K], dtype=tl.int32)
    best_of_gt = tl.zeros([BLOCK_K], dtype=tl.int32)
    for start in range(0, num_gt, BLOCK_G):
        gt = start + tl.arange(0, BLOCK_G)
        if LOW_QUALITY:
            # Loaded first: the test of the tile's range ends a basic block, past which no load moves up.
            gt_best = tl.load(gt_best_ptr + first_gt + gt, mask=gt < num_gt, other=0).to(tl.float32, bitcast=True)
        overlap = iou_tile(ax1, ay1, ax2, ay2, gt_boxes_ptr, gt_valid_ptr, first_gt, start, num_gt, FUSED, BLOCK_G)
        tile_best, tile_index = tl.max(overlap, axis=0, return_indices=True, return_indices_tie_break_left=True)
        better = tile_best > best
        best_index = tl.where(better, start + tile_index, best_index)
        best = tl.where(better, tile_best, best)
        if LOW_QUALITY:
            # Mark candidates that have the best IoU of some ground truth.
            equals_best = (overlap == gt_best[:, None]) & (overlap > 0.0)
            best_of_gt = tl.maximum(best_of_gt, tl.max(equals_best.to(tl.int32), axis=0))

    # Label the candidates.
    label = tl.where(best >= high, 1, tl.where(best < low, 0, -1))
    if HAS_IGNORE:
        # A separate loop: one loop for both needs too many registers.
        covered = tl.zeros([BLOCK_K], dtype=tl.float32)
        for start in range(0, num_gt, BLOCK_G):
            share = ignored_share_tile(
                ax1, ay1, ax2, ay2, gt_boxes_ptr, gt_ignore_ptr, first_gt, start, num_gt, BLOCK_G
            )
            covered = tl.maximum(covered, share)
        label = tl.where((label == 0) & (covered >= ignore_iof), -1, label)
    label = tl.where(best_of_gt > 0, 1, label)
    label = tl.where(valid, label, -1)
    tl.store(index_ptr + out, best_index.to(tl.int64), mask=mask)
    tl.store(iou_ptr + out, best, mask=mask)
    tl.store(label_ptr + out, label.to(tl.int64), mask=mask)

    # Load the boxes of the positives, the candidates anew rather than from registers. A positive overlaps something
    # (except with a threshold of 0), so that both boxes have sides to take logarithms of.
    positive = (label == 1) & (best > 0.0)
    bx1, by1, bx2, by2 = load_boxes(gt_boxes_ptr, first_gt + best_index, positive)
    x1, y1, x2, y2 = load_boxes(
        candidates_ptr + image * candidates_stride_b,
        candidate,
        positive,
    )
    # Encode them.
    width = tl.where(positive, x2 - x1, 1.0)
    height = tl.where(positive, y2 - y1, 1.0)
    gt_width = tl.where(positive, bx2 - bx1, 1.0)
    gt_height = tl.where(positive, by2 - by1, 1.0)
    dx = weight_x * ((bx1 + 0.5 * gt_width) - (x1 + 0.5 * width)) / width
    dy = weight_y * ((by1 + 0.5 * gt_height) - (y1 + 0.5 * height)) / height
    dw = weight_w * tl.log(gt_width / width)
    dh = weight_h * tl.log(gt_height / height)
    store_rows_of_4(
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
    num_gt = gt_boxes.shape[1]
    candidates_stride_b = 0 if candidates.ndim == 2 else num_candidates * 4
    block_k, block_g, num_warps, best_block_k, best_block_g = config(num_gt)
    # Images and blocks share the first axis of the grid, the only one that is not limited to 65535.
    if gt_best is not None:
        # Its results are atomic maxima in any case, so the ground truths are divided among programs too.
        parts = min(triton.cdiv(num_gt, best_block_g), MAX_PARTS)
        _best_kernel[(batch * triton.cdiv(num_candidates, best_block_k), parts)](
            candidates_ptr=candidates,
            gt_boxes_ptr=gt_boxes,
            gt_valid_ptr=gt_valid,
            valid_ptr=valid,
            gt_best_ptr=gt_best,
            num_candidates=num_candidates,
            num_gt=num_gt,
            candidates_stride_b=candidates_stride_b,
            HAS_VALID=valid is not None,
            FUSED=is_compiled(_best_kernel),
            BLOCK_K=best_block_k,
            BLOCK_G=best_block_g,
            num_warps=1,
            enable_fp_fusion=False,
        )
    _match_kernel[(batch * triton.cdiv(num_candidates, block_k),)](
        candidates_ptr=candidates,
        gt_boxes_ptr=gt_boxes,
        gt_valid_ptr=gt_valid,
        valid_ptr=valid,
        gt_ignore_ptr=gt_ignore,
        gt_best_ptr=gt_best,
        index_ptr=index,
        iou_ptr=iou,
        label_ptr=label,
        deltas_ptr=deltas,
        num_candidates=num_candidates,
        num_gt=num_gt,
        high=high,
        low=low,
        ignore_iof=ignore_iof,
        weight_x=weights[0],
        weight_y=weights[1],
        weight_w=weights[2],
        weight_h=weights[3],
        candidates_stride_b=candidates_stride_b,
        HAS_VALID=valid is not None,
        HAS_IGNORE=gt_ignore is not None,
        LOW_QUALITY=gt_best is not None,
        FUSED=is_compiled(_match_kernel),
        BLOCK_K=block_k,
        BLOCK_G=block_g,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
