"""Areas, intersections and exact ratios of boxes, shared by the kernels that compare boxes.

All of it is meant for kernels launched with `enable_fp_fusion=False`: a fused multiply-add in an area or a union moves
decisions that sit on a threshold.
"""

import triton
import triton.language as tl


@triton.jit
def load_boxes(boxes_ptr, index, mask):
    """Corners of the boxes `index` [N] of a contiguous [.., 4] array, as four tensors [N]: one load a box."""
    corner = boxes_ptr + index.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    corners = tl.load(corner, mask=mask[:, None], other=0.0)
    xs, ys = tl.split(tl.reshape(corners, [index.shape[0], 2, 2]))
    x1, x2 = tl.split(xs)
    y1, y2 = tl.split(ys)
    return x1, y1, x2, y2


@triton.jit
def store_fours(rows_ptr, index, a, b, c, d, mask):
    """Write four numbers, such as corners, to the rows `index` [N] of a contiguous [.., 4] array: one store a row."""
    fours = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [index.shape[0], 4])
    tl.store(rows_ptr + index.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :], fours, mask=mask[:, None])


@triton.jit
def intersection_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Areas that two boxes share and that they cover together; the arguments broadcast."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    inter = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    return inter, union


@triton.jit
def intersections_unions(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """The same of each of N boxes, down, with each of M others, across: [N, M], of corners [N] and [M]."""
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
    """The quotient of two positive numbers, rounded as IEEE division does; 0 for any others (NaN as well)."""
    # A numerator of 0, that of most pairs, would take the slow path of an NVIDIA division; any that gives a negative
    # quotient will do in its place.
    ratio = tl.div_rn(tl.where(numerator > 0.0, numerator, -denominator), denominator)
    return tl.where(ratio > 0.0, ratio, 0.0)


@triton.jit
def iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Intersection over union; 0 where it is undefined (degenerate, NaN or infinite boxes)."""
    inter, union = intersection_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    return ratio_or_zero(inter, union)
