"""Loads, areas, intersections and exact ratios of boxes, shared by the kernels that compare boxes.

For kernels launched with `enable_fp_fusion=False` only: a fused multiply-add in an area or a union changes decisions
at a threshold.
"""

import triton
import triton.language as tl


@triton.jit
def load_boxes(
    boxes_ptr,  # [.., 4] fp32, contiguous
    index,  # [N] int32 or int64, rows of it
    mask,  # [N] bool; boxes of masked rows are zeros
):
    """Corners x1, y1, x2, y2 of N boxes as four tensors [N]: one 16-byte load per box."""
    corner_ptrs = boxes_ptr + index.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]  # [N, 4]
    corners = tl.load(corner_ptrs, mask=mask[:, None], other=0.0)
    # [N, 2, 2], of which the last axis is (x, y).
    xs, ys = tl.split(tl.reshape(corners, [index.shape[0], 2, 2]))
    x1, x2 = tl.split(xs)
    y1, y2 = tl.split(ys)
    return x1, y1, x2, y2


@triton.jit
def store_rows_of_4(
    rows_ptr,  # [.., 4] fp32, contiguous, output
    index,  # [N] int32 or int64, rows of it
    a,  # [N] fp32, as are b, c and d
    b,
    c,
    d,
    mask,  # [N] bool
):
    """Write (a, b, c, d), such as the corners or the deltas of a box, to N rows: one 16-byte store per row."""
    rows = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [index.shape[0], 4])
    tl.store(rows_ptr + index.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :], rows, mask=mask[:, None])


@triton.jit
def intersection_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Areas of the intersection and the union of boxes a and b; the corners broadcast."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    inter = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    return inter, union


@triton.jit
def pairwise_intersection_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """`intersection_union` [N, M] of every box a, corners [N], with every box b, corners [M]."""
    return intersection_union(
        ax1[:, None],
        ay1[:, None],
        ax2[:, None],
        ay2[:, None],
        bx1[None, :],
        by1[None, :],
        bx2[None, :],
        by2[None, :],
    )


@triton.jit
def ratio_or_zero(numerator, denominator):
    """The quotient, rounded as IEEE division does, where both are positive; 0 elsewhere (NaN as well)."""
    # A numerator of 0, the most frequent one, would take the slow path of an NVIDIA division. Any numerator that gives
    # a negative quotient can replace it, since that is turned into 0 below.
    ratio = tl.div_rn(tl.where(numerator > 0.0, numerator, -denominator), denominator)
    return tl.where(ratio > 0.0, ratio, 0.0)


@triton.jit
def iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Intersection over union; 0 where it is undefined (degenerate, NaN or infinite boxes)."""
    inter, union = intersection_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    return ratio_or_zero(inter, union)
