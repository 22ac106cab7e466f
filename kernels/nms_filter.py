"""The wide step of non-maximum suppression: which boxes overlap none of those that are kept."""

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.boxes import load_boxes
from fastdet.kernels.common.nms_overlap import are_finite, arrive_last, half_ulp, is_compiled, pairwise_exceeds


@triton.jit
def filter_block(
    # Tensors, all contiguous
    boxes_ptr,  # [groups, N, 4] fp32, pixels
    valid_ptr,  # [groups, N] bool
    kept_ptr,  # [groups, max_keep, 4] fp32, pixels, of which `count` are written
    count_ptr,  # [groups] int64
    removed_ptr,  # [groups, STEP] int8, 0 before and after: 1 where removed, by any number of programs
    cursor_ptr,  # [groups] int32, the first row of the step; moved on
    survivors_ptr,  # [groups, SETTLED] int32, output: rows
    number_ptr,  # [groups] int32, output: how many survive; left at 0 where the group needs no more
    arrivals_ptr,  # [groups] int32, 0 before and after
    # Sizes
    num_boxes,
    max_keep,
    # Scalars
    iou_threshold,
    half_ulp,
    block,  # of rows, of all groups
    span,  # of kept boxes
    # Constexprs
    SETTLED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    SPAN: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Marks the rows of a block that overlap a box of a span; the last of a group lists its rows that survive.

                  BLOCK_ROWS
                 +----------+
    BLOCK_KEPT   |   any    |
        ...      | overlap  |     block and span: each thread holds few rows, so that many programs fit at a time
    BLOCK_KEPT   |    v     |
                 +----------+
      SPAN of the kept boxes

    Spans past the last kept box have no work. Listed are the first SETTLED survivors of the step; where there are more,
    the next step begins with the first that is left over.
    """
    # The block's group and rows [BLOCK_ROWS].
    row_blocks: tl.constexpr = STEP // BLOCK_ROWS
    BLOCK_LISTED: tl.constexpr = min(STEP, 1024)
    group = tl.cast(block // row_blocks, tl.int64)
    place = block % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    count = tl.load(count_ptr + group)
    used_spans = tl.maximum(tl.cdiv(count, SPAN), 1)
    # Those past the last kept box do not arrive, so that the cursor may move while they would read it.
    cursor = num_boxes
    if (count < max_keep) & (span < used_spans):
        cursor = tl.load(cursor_ptr + group)
    if cursor < num_boxes:
        row = cursor + place
        source = group * num_boxes + row
        inside = (row < num_boxes) & (tl.load(valid_ptr + source, mask=row < num_boxes, other=0) != 0)
        x1, y1, x2, y2 = load_boxes(boxes_ptr, source, inside)
        # The maximum over the kept boxes is listed once, after the loop.
        overlaps = tl.zeros([BLOCK_KEPT, BLOCK_ROWS], dtype=tl.int32)
        begin = span * SPAN
        end = tl.minimum(count, begin + SPAN)
        for first in range(begin, end, BLOCK_KEPT):
            kept = first + tl.arange(0, BLOCK_KEPT)
            # Past the end boxes are zeros, which overlap nothing.
            kx1, ky1, kx2, ky2 = load_boxes(kept_ptr, group * max_keep + kept, kept < end)
            # Compare all pairs: [BLOCK_KEPT, BLOCK_ROWS].
            overlaps |= pairwise_exceeds(
                kx1, ky1, kx2, ky2, x1, y1, x2, y2, iou_threshold, half_ulp, FUSED
            ).to(tl.int32)  # fmt: skip
        removed = (tl.max(overlaps, axis=0) != 0) | ~(inside & are_finite(x1, y1, x2, y2))
        tl.store(removed_ptr + group * STEP + place, tl.full([BLOCK_ROWS], 1, dtype=tl.int8), mask=removed)

        if arrive_last(arrivals_ptr + group, row_blocks * used_spans):
            # List the survivors, of [STEP] rows, in order of priority: a part of them at a time, for few registers.
            surviving = 0
            for start in range(0, STEP, BLOCK_LISTED):
                lane = start + tl.arange(0, BLOCK_LISTED)
                survives = (tl.load(removed_ptr + group * STEP + lane) == 0).to(tl.int32)
                rank = surviving + tl.cumsum(survives, axis=0) - 1
                listed = (survives != 0) & (rank < SETTLED)
                tl.store(survivors_ptr + group * SETTLED + rank, cursor + lane, mask=listed)
                # The first that is left over moves the cursor to itself.
                tl.store(cursor_ptr + group + 0 * lane, cursor + lane, mask=(survives != 0) & (rank == SETTLED))
                surviving += tl.sum(survives, axis=0)
                # Every thread has read its marks before another resets them.
                tl.debug_barrier()
                tl.store(removed_ptr + group * STEP + lane, tl.zeros([BLOCK_LISTED], dtype=tl.int8))
            tl.store(number_ptr + group, tl.minimum(surviving, SETTLED))
            if surviving <= SETTLED:
                tl.store(cursor_ptr + group, cursor + STEP)


@triton.jit(do_not_specialize=["num_boxes", "max_keep"])
def _filter_kernel(
    boxes_ptr,  # all as in `filter_block`
    valid_ptr,
    kept_ptr,
    count_ptr,
    removed_ptr,
    cursor_ptr,
    survivors_ptr,
    number_ptr,
    arrivals_ptr,
    num_boxes,
    max_keep,
    iou_threshold,
    half_ulp,
    SETTLED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    SPAN: tl.constexpr,
    FUSED: tl.constexpr,
):
    """A step of every group: program (block, span)."""
    filter_block(
        boxes_ptr, valid_ptr, kept_ptr, count_ptr, removed_ptr, cursor_ptr, survivors_ptr, number_ptr, arrivals_ptr,
        num_boxes, max_keep, iou_threshold, half_ulp, tl.program_id(0), tl.program_id(1),
        SETTLED, STEP, BLOCK_ROWS, BLOCK_KEPT, SPAN, FUSED,
    )  # fmt: skip


def launch_filter(
    boxes: torch.Tensor,
    valid: torch.Tensor,
    kept: torch.Tensor,
    count: torch.Tensor,
    removed: torch.Tensor,
    cursor: torch.Tensor,
    survivors: torch.Tensor,
    number: torch.Tensor,
    arrivals: torch.Tensor,
    *,
    most_kept: int,
    iou_threshold: float,
    rows: int,
    block_kept: int,
    span: int,
) -> None:
    """Write to `survivors` [groups, settled] and `number` [groups] the rows of the next step that overlap no kept box.

    A program compares `rows` rows with `span` of the kept boxes, `most_kept` at most, `block_kept` at a time.
    """
    groups, step = removed.shape
    _filter_kernel[(groups * (step // rows), triton.cdiv(most_kept, span))](
        boxes_ptr=boxes,
        valid_ptr=valid,
        kept_ptr=kept,
        count_ptr=count,
        removed_ptr=removed,
        cursor_ptr=cursor,
        survivors_ptr=survivors,
        number_ptr=number,
        arrivals_ptr=arrivals,
        num_boxes=boxes.shape[1],
        max_keep=kept.shape[1],
        iou_threshold=iou_threshold,
        half_ulp=half_ulp(iou_threshold),
        SETTLED=survivors.shape[1],
        STEP=step,
        BLOCK_ROWS=rows,
        BLOCK_KEPT=block_kept,
        SPAN=span,
        FUSED=is_compiled(_filter_kernel),
        num_warps=max(rows // 8, 1),
        enable_fp_fusion=False,
    )
