"""What the kernels of non-maximum suppression share: comparisons of IoUs, packed into bits, and arrivals.

IoUs are compared with the threshold as `torchvision.ops.nms` does on the CPU, decision for decision.
"""

import math
from typing import Any

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fastdet.kernels.common.boxes import pairwise_intersection_union, ratio_or_zero


@triton.jit
def pairwise_exceeds(
    ax1,  # [N] fp32, pixels, as are the other corners of boxes a
    ay1,
    ax2,
    ay2,
    bx1,  # [M] fp32, pixels, as are the other corners of boxes b
    by1,
    bx2,
    by2,
    threshold,
    half_ulp,  # half the distance from the threshold to the next fp32 number
    FUSED: tl.constexpr,
):
    """Whether the IoU of boxes a and b, [N, M], rounded as IEEE division does, is above the threshold.

    False where it is undefined. The rounded quotient is above if the exact one is above threshold + half_ulp, the
    midpoint between the threshold and the next fp32 number. The quotient is never the midpoint itself, which has one
    bit more than a numerator has. Near the midpoint inter - threshold * union has few bits, so that a fused
    multiply-add computes it exactly. (For areas above 2^-100.)
    """
    inter, union = pairwise_intersection_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    if FUSED:
        # A box inverted along one axis may have a union below 0.
        return (inter > 0.0) & (tl.fma(-threshold, union, inter) > half_ulp * union)
    else:
        return ratio_or_zero(inter, union) > threshold


@triton.jit
def are_finite(x1, y1, x2, y2):
    """Zero times a finite number is 0; times NaN or infinity it is NaN, which equals nothing."""
    return (x1 * 0.0 == 0.0) & (y1 * 0.0 == 0.0) & (x2 * 0.0 == 0.0) & (y2 * 0.0 == 0.0)


@triton.jit
def pack_overlaps(
    cx1,  # [32] fp32, pixels, as are the other corners of the columns
    cy1,
    cx2,
    cy2,
    column,  # [32], their priorities: 0 is the highest
    x1,  # [N] fp32, pixels, as are the other corners of the rows
    y1,
    x2,
    y2,
    row,  # [N], their priorities
    iou_threshold,
    half_ulp,
    FUSED: tl.constexpr,
):
    """int32 [N], of which bit c is set if column c has a higher priority than the row and overlaps it."""
    # Compare all pairs, [32, N], and pack 32 comparisons into a word.
    overlaps = pairwise_exceeds(cx1, cy1, cx2, cy2, x1, y1, x2, y2, iou_threshold, half_ulp, FUSED)
    overlaps &= column[:, None] < row[None, :]
    return tl.sum(overlaps.to(tl.int32) << tl.arange(0, 32)[:, None], axis=0)


@triton.jit
def arrive_last(
    arrivals_ptr,  # int32, 0 before the first program of a launch and after the last
    programs,  # how many arrive
):
    """Whether this program is the last one to arrive, which then sees what all others stored before.

    None waits for another, so that programs may run in any order, also one after another.
    """
    # The stores of all threads come before the one that adds.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    return last


def half_ulp(threshold: float) -> float:
    """Half the distance from an fp32 number in [0, 1] to the next one; 0 for 0, as any positive IoU is above it."""
    # The first of the 24 bits of its significand is worth half of 2 to the exponent.
    return math.ldexp(1.0, math.frexp(threshold)[1] - 25) if threshold else 0.0


def is_compiled(kernel: Any) -> bool:
    """Whether multiply-adds are fused: the interpreter rounds twice, so that there the quotient is compared."""
    return isinstance(kernel, JITFunction)
