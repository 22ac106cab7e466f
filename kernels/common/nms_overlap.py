"""The two pairwise steps of non-maximum suppression: boxes against those of their chunk, and against those kept before.

Both compare IoUs with the threshold as `torchvision.ops.nms` does on the CPU, decision for decision.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fastdet.kernels.common.boxes import load_boxes, pairwise_intersection_union, ratio_or_zero


@triton.jit
def _exceeds(
    inter,  # fp32 of any shape
    union,  # fp32 of the same shape
    threshold,
    half_ulp,  # half the distance from the threshold to the next fp32 number
    FUSED: tl.constexpr,
):
    """Whether inter / union, rounded as IEEE division does, is above the threshold; False where it is undefined.

    The rounded quotient is above if the exact one is above threshold + half_ulp, the midpoint between the threshold
    and the next fp32 number. The quotient is never the midpoint itself, which has one bit more than a numerator has.
    Near the midpoint inter - threshold * union has few bits, so that a fused multiply-add computes it exactly. (For
    areas above 2^-100.)
    """
    if FUSED:
        # A box inverted along one axis may have a union below 0.
        return (inter > 0.0) & (tl.fma(-threshold, union, inter) > half_ulp * union)
    else:
        return ratio_or_zero(inter, union) > threshold


@triton.jit(do_not_specialize=["num_boxes", "num_chunks"])
def _overlap_kernel(
    # Tensors, all contiguous
    boxes_ptr,  # [groups, N, 4] fp32, pixels
    valid_ptr,  # [groups, N] bool
    overlap_ptr,  # [groups, num_chunks, CHUNK / 32, CHUNK] int32, output
    removed_ptr,  # [groups, N] int8, output: set to 0 for the launches that follow
    # Sizes
    num_boxes,
    num_chunks,
    # Scalars
    iou_threshold,
    half_ulp,
    # Constexprs
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FUSED: tl.constexpr,
):
    """The lower triangles of the overlap matrices of all chunks, 32 columns to a word.

                        BLOCK_ROWS rows
                 +-------------------------+
    32 columns,  | bit of column 0         |     program (group, chunk and row block; word), summed down to one word a
    one word     | bit of column 1   ...   |     row: bit c of word w is set if box 32 w + c has a higher priority than
                 +-------------------------+     the row's and overlaps it by more than the threshold

    Rows of tiles without a valid row are left unwritten: they are never read.
    """
    # The program's group and chunk, its rows [BLOCK_ROWS] and columns [32], counted inside the chunk.
    row_blocks: tl.constexpr = CHUNK // BLOCK_ROWS
    block = tl.program_id(0)
    word = tl.program_id(1)
    group = (block // (num_chunks * row_blocks)).to(tl.int64)
    chunk = block // row_blocks % num_chunks
    row = block % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    bit = tl.arange(0, 32)
    column = word * 32 + bit
    start = chunk * CHUNK
    first = group * num_boxes + start
    row_mask = start + row < num_boxes
    if word == 0:
        tl.store(removed_ptr + first + row, tl.zeros([BLOCK_ROWS], dtype=tl.int8), mask=row_mask)

    # Skip tiles above the diagonal, and those without a valid row.
    row_valid = tl.load(valid_ptr + first + row, mask=row_mask, other=0).to(tl.int32)
    column_valid = tl.load(valid_ptr + first + column, mask=start + column < num_boxes, other=0).to(tl.int32)
    on_or_below_diagonal = word * 32 < (block % row_blocks + 1) * BLOCK_ROWS
    if on_or_below_diagonal & (tl.max(row_valid, axis=0) > 0):
        # Load the boxes; those that are not valid are zeros, which overlap nothing.
        x1, y1, x2, y2 = load_boxes(boxes_ptr, first + row, row_valid != 0)
        cx1, cy1, cx2, cy2 = load_boxes(boxes_ptr, first + column, column_valid != 0)
        # Compare all pairs: [32, BLOCK_ROWS].
        inter, union = pairwise_intersection_union(cx1, cy1, cx2, cy2, x1, y1, x2, y2)
        overlaps = _exceeds(inter, union, iou_threshold, half_ulp, FUSED) & (column[:, None] < row[None, :])
        # Pack 32 comparisons into a word: [BLOCK_ROWS].
        packed = tl.sum(overlaps.to(tl.int32) << bit[:, None], axis=0)
        matrix = group * num_chunks + chunk
        tl.store(overlap_ptr + (matrix * (CHUNK // 32) + word) * CHUNK + row, packed)


@triton.jit(do_not_specialize=["num_boxes", "max_keep", "start"])
def _filter_kernel(
    # Tensors, all contiguous
    boxes_ptr,  # [groups, N, 4] fp32, pixels
    kept_ptr,  # [groups, max_keep, 4] fp32, pixels, of which `count` are written
    count_ptr,  # [groups] int64
    removed_ptr,  # [groups, N] int8, output: set to 1 where removed, by any number of programs
    # Sizes
    num_boxes,
    max_keep,
    start,  # first box of the chunk
    # Scalars
    iou_threshold,
    half_ulp,
    # Constexprs
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    SPAN: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Marks the boxes of one chunk that overlap a box kept from an earlier chunk.

                      SPAN of the kept boxes
                  BLOCK_KEPT  BLOCK_KEPT  ...
                +------------+------------+
    BLOCK_ROWS  |  ->   any overlap   ->  |    program (group and row block; span)
                +------------+------------+
    """
    # The program's group, rows [BLOCK_ROWS] and kept boxes [begin, end), none where the group has kept max_keep.
    row_blocks: tl.constexpr = CHUNK // BLOCK_ROWS
    group = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = start + tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    count = tl.load(count_ptr + group)
    begin = tl.program_id(1) * SPAN
    end = tl.where(count < max_keep, tl.minimum(count, begin + SPAN), 0)
    if begin < end:
        x1, y1, x2, y2 = load_boxes(boxes_ptr, group * num_boxes + row, row < num_boxes)
        removed = tl.zeros([BLOCK_ROWS], dtype=tl.int32)
        for first in range(begin, end, BLOCK_KEPT):
            kept = first + tl.arange(0, BLOCK_KEPT)
            # Past the end boxes are zeros, which overlap nothing.
            kx1, ky1, kx2, ky2 = load_boxes(kept_ptr, group * max_keep + kept, kept < end)
            # Compare all pairs: [BLOCK_ROWS, BLOCK_KEPT].
            inter, union = pairwise_intersection_union(x1, y1, x2, y2, kx1, ky1, kx2, ky2)
            overlaps = _exceeds(inter, union, iou_threshold, half_ulp, FUSED)
            removed |= tl.max(overlaps.to(tl.int32), axis=1)
        mask = (row < num_boxes) & (removed != 0)
        tl.store(removed_ptr + group * num_boxes + row, tl.full([BLOCK_ROWS], 1, dtype=tl.int8), mask=mask)


def _half_ulp(threshold: float) -> float:
    """Half the distance from an fp32 number in [0, 1] to the next one; 0 for 0, as any positive IoU is above it."""
    # The first of the 24 bits of its significand is worth half of 2 to the exponent.
    return math.ldexp(1.0, math.frexp(threshold)[1] - 25) if threshold else 0.0


def _is_compiled(kernel: Any) -> bool:
    """Whether multiply-adds are fused: the interpreter rounds twice, so that there the quotient is compared."""
    return isinstance(kernel, JITFunction)


def launch_overlap(
    boxes: torch.Tensor,
    valid: torch.Tensor,
    overlap: torch.Tensor,
    removed: torch.Tensor,
    *,
    iou_threshold: float,
    rows: int,
) -> None:
    """Fill `overlap` [groups, chunks, chunk / 32, chunk] for `boxes` [groups, N, 4]; set `removed` [groups, N] to 0.

    A program compares `rows` rows with 32 columns.
    """
    groups, num_boxes, _ = boxes.shape
    chunks, chunk = overlap.shape[1], overlap.shape[3]
    # The first axis of a grid is the only one that may be long.
    grid = (groups * chunks * (chunk // rows), triton.cdiv(min(num_boxes, chunk), 32))
    _overlap_kernel[grid](
        boxes_ptr=boxes,
        valid_ptr=valid,
        overlap_ptr=overlap,
        removed_ptr=removed,
        num_boxes=num_boxes,
        num_chunks=chunks,
        iou_threshold=iou_threshold,
        half_ulp=_half_ulp(iou_threshold),
        CHUNK=chunk,
        BLOCK_ROWS=rows,
        FUSED=_is_compiled(_overlap_kernel),
        num_warps=max(rows // 32, 1),
        enable_fp_fusion=False,
    )


def launch_filter(
    boxes: torch.Tensor,
    kept: torch.Tensor,
    count: torch.Tensor,
    removed: torch.Tensor,
    *,
    start: int,
    iou_threshold: float,
    chunk: int,
    rows: int,
    block_kept: int,
    span: int,
) -> None:
    """Set `removed` [groups, N] to 1 for the boxes of the chunk from `start` that overlap a kept one.

    A program compares `rows` rows with `span` of the kept boxes, `block_kept` at a time.
    """
    groups, num_boxes, _ = boxes.shape
    max_keep = kept.shape[1]
    # At most `start` boxes are kept before the chunk.
    grid = (groups * (chunk // rows), triton.cdiv(min(max_keep, start), span))
    _filter_kernel[grid](
        boxes_ptr=boxes,
        kept_ptr=kept,
        count_ptr=count,
        removed_ptr=removed,
        num_boxes=num_boxes,
        max_keep=max_keep,
        start=start,
        iou_threshold=iou_threshold,
        half_ulp=_half_ulp(iou_threshold),
        CHUNK=chunk,
        BLOCK_ROWS=rows,
        BLOCK_KEPT=block_kept,
        SPAN=span,
        FUSED=_is_compiled(_filter_kernel),
        enable_fp_fusion=False,
    )
