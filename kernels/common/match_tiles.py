"""Tiles of candidates against ground truths, shared by the two passes of matching."""

import triton
import triton.language as tl

from fastdet.kernels.common.boxes import intersection_union, load_boxes, ratio_or_zero

# If an intersection is not below the one and a union below the other, no step of the division underflows or overflows.
LEAST = tl.constexpr(2.0**-60)
LARGEST = tl.constexpr(2.0**60)


@triton.jit
def program_candidates(num_candidates, BLOCK_K: tl.constexpr):
    """The image, int64, and the candidates [BLOCK_K] of program (image and block)."""
    num_blocks = tl.cdiv(num_candidates, BLOCK_K)
    image = (tl.program_id(0) // num_blocks).to(tl.int64)
    return image, tl.program_id(0) % num_blocks * BLOCK_K + tl.arange(0, BLOCK_K)


@triton.jit
def load_candidates(
    candidates_ptr,  # [K, 4] or [B, K, 4] fp32, pixels
    valid_ptr,  # [B, K] bool; read if HAS_VALID
    num_candidates,
    stride_b,  # of candidates; 0 where they have no batch axis
    HAS_VALID: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The candidates of program (image and block).

    Returns a mask of those in range, their index in [B, K] and a mask of the valid ones, each [BLOCK_K], and their
    corners x1, y1, x2, y2, each [1, BLOCK_K] and 0 where not valid.
    """
    image, candidate = program_candidates(num_candidates, BLOCK_K)
    mask = candidate < num_candidates
    out = image * num_candidates + candidate
    valid = mask
    if HAS_VALID:
        valid = valid & (tl.load(valid_ptr + out, mask=mask, other=0) != 0)
    x1, y1, x2, y2 = load_boxes(candidates_ptr + image * stride_b, candidate, valid)
    return mask, out, valid, x1[None, :], y1[None, :], x2[None, :], y2[None, :]


@triton.jit
def _ratio_tile(numerator, denominator, FUSED: tl.constexpr):
    """`ratio_or_zero` of the intersections and unions of a tile.

    A division that rounds as IEEE asks for branches where an operand is extreme, value after value, and the next one
    waits for the branch. So, where multiply-adds are fused, one branch serves the tile, and the quotients are computed
    as in P. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor" (1990): the
    reciprocal is corrected, and then the quotient, twice, by its remainder, which is exact.
    """
    if FUSED:
        inverse = 1.0 / denominator  # to a few units in the last place
        inverse = tl.fma(tl.fma(-denominator, inverse, 1.0), inverse, inverse)
        ratio = numerator * inverse
        ratio = tl.fma(tl.fma(-denominator, ratio, numerator), inverse, ratio)
        ratio = tl.fma(tl.fma(-denominator, ratio, numerator), inverse, ratio)
        ratio = tl.where((numerator > 0.0) & (denominator > 0.0), ratio, 0.0)
        extreme = ((numerator > 0.0) & (numerator < LEAST)) | ~(tl.abs(denominator) < LARGEST)
        if tl.max(extreme.to(tl.int32)) > 0:
            ratio = ratio_or_zero(numerator, denominator)
        return ratio
    else:
        return ratio_or_zero(numerator, denominator)


@triton.jit
def iou_tile(
    ax1,  # [1, BLOCK_K] fp32, corners of candidates, as are ay1, ax2 and ay2
    ay1,
    ax2,
    ay2,
    gt_boxes_ptr,  # [B, G, 4] fp32, pixels
    gt_valid_ptr,  # [B, G] bool
    first_gt,  # index in [B, G] of the image's first ground truth
    start,  # first ground truth of the tile, counted in the image
    num_gt,
    FUSED: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """IoU [BLOCK_G, BLOCK_K] of ground truths with candidates; 0 where either is not valid."""
    gt = start + tl.arange(0, BLOCK_G)
    inside = gt < num_gt
    valid = tl.load(gt_valid_ptr + first_gt + gt, mask=inside, other=0) != 0
    bx1, by1, bx2, by2 = load_boxes(gt_boxes_ptr, first_gt + gt, inside & valid)
    inter, union = intersection_union(ax1, ay1, ax2, ay2, bx1[:, None], by1[:, None], bx2[:, None], by2[:, None])
    return _ratio_tile(inter, union, FUSED)


@triton.jit
def ignored_share_tile(
    ax1,  # [1, BLOCK_K] fp32, corners of candidates, as are ay1, ax2 and ay2
    ay1,
    ax2,
    ay2,
    gt_boxes_ptr,  # [B, G, 4] fp32, pixels
    gt_ignore_ptr,  # [B, G] bool
    first_gt,
    start,
    num_gt,
    BLOCK_G: tl.constexpr,
):
    """The largest share [BLOCK_K] of a candidate's area that one ignored box of the tile covers."""
    gt = start + tl.arange(0, BLOCK_G)
    inside = gt < num_gt
    ignored = inside & (tl.load(gt_ignore_ptr + first_gt + gt, mask=inside, other=0) != 0)
    bx1, by1, bx2, by2 = load_boxes(gt_boxes_ptr, first_gt + gt, ignored)
    inter, _ = intersection_union(ax1, ay1, ax2, ay2, bx1[:, None], by1[:, None], bx2[:, None], by2[:, None])
    finite = (bx2 - bx1) * (by2 - by1) < float("inf")
    share = ratio_or_zero(inter, (ax2 - ax1) * (ay2 - ay1))  # [BLOCK_G, BLOCK_K]
    return tl.max(tl.where((ignored & finite)[:, None], share, 0.0), axis=0)
