"""The narrow step of non-maximum suppression: the boxes of a chunk among themselves."""

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.boxes import load_boxes
from fastdet.kernels.common.nms_overlap import (
    append_kept,
    are_finite,
    arrive_last,
    decide,
    half_ulp,
    is_compiled,
    pack_overlaps,
)


@triton.jit
def _load_candidates(
    boxes_ptr,  # of the whole tensor, as in the kernel
    valid_ptr,
    survivors_ptr,
    group,
    lane,  # [N], places in the chunk
    num_boxes,
    number,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Index, eligibility and corners [N] of the boxes of a chunk; those that are not eligible overlap nothing."""
    if FIRST:
        row = lane
        eligible = row < num_boxes
        eligible &= tl.load(valid_ptr + group * num_boxes + row, mask=eligible, other=0) != 0
    else:
        eligible = lane < number
        row = tl.load(survivors_ptr + group * CHUNK + lane, mask=eligible, other=0)
    x1, y1, x2, y2 = load_boxes(boxes_ptr, group * num_boxes + row, eligible)
    return row, eligible & are_finite(x1, y1, x2, y2), x1, y1, x2, y2


@triton.jit
def overlap_block(
    # Tensors, all contiguous
    boxes_ptr,  # [groups, N, 4] fp32, pixels
    valid_ptr,  # [groups, N] bool
    survivors_ptr,  # [groups, CHUNK] int32, rows, from the filter; not read if FIRST
    overlap_ptr,  # [groups, CHUNK / 32, CHUNK] int32, output
    # Sizes
    num_boxes,
    number,  # of boxes in the chunk
    # Scalars
    iou_threshold,
    half_ulp,
    group,
    block,  # of rows
    word,  # of 32 columns
    # Constexprs
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Compare the rows of a block with 32 boxes of the chunk.

                        BLOCK_ROWS rows
                 +-------------------------+
    32 columns,  | bit of column 0         |     block and word, summed down to one word a row: bit c of word w is set
    one word     | bit of column 1   ...   |     if box 32 w + c has a higher priority than the row's and overlaps it
                 +-------------------------+     by more than the threshold

    Words above the diagonal, and of blocks past the last box, are left unwritten: they are never read.
    """
    if (word * 32 < (block + 1) * BLOCK_ROWS) & (block * BLOCK_ROWS < number):
        lane = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        _row, _eligible, x1, y1, x2, y2 = _load_candidates(
            boxes_ptr, valid_ptr, survivors_ptr, group, lane, num_boxes, number, CHUNK, FIRST
        )
        column = word * 32 + tl.arange(0, 32)
        _column_row, _column_eligible, cx1, cy1, cx2, cy2 = _load_candidates(
            boxes_ptr, valid_ptr, survivors_ptr, group, column, num_boxes, number, CHUNK, FIRST
        )
        packed = pack_overlaps(cx1, cy1, cx2, cy2, column, x1, y1, x2, y2, lane, iou_threshold, half_ulp, FUSED)
        tl.store(overlap_ptr + (group * (CHUNK // 32) + word) * CHUNK + lane, packed)


@triton.jit
def decide_group(
    # Tensors, all contiguous
    boxes_ptr,  # as in `overlap_block`
    valid_ptr,
    survivors_ptr,
    number_ptr,  # [groups] int32, boxes in the chunk; set to 0
    overlap_ptr,
    removed_ptr,  # [groups, STEP] int8, set to 0 if FIRST
    cursor_ptr,  # [groups] int32, set to CHUNK if FIRST
    kept_ptr,  # [groups, max_keep, 4] fp32, pixels, appended to
    index_ptr,  # [groups, max_keep] int64, appended to; filled up with 0 if FIRST
    count_ptr,  # [groups] int64, kept boxes, updated; not read if FIRST
    # Sizes
    num_boxes,
    number,
    max_keep,
    group,
    # Constexprs
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Decide the chunk of a group, whose matrix is read into registers, one row a box, and append what is kept."""
    WORDS: tl.constexpr = CHUNK // 32
    lane = tl.arange(0, CHUNK)
    row, eligible, x1, y1, x2, y2 = _load_candidates(
        boxes_ptr, valid_ptr, survivors_ptr, group, lane, num_boxes, number, CHUNK, FIRST
    )
    # Load the matrix, [CHUNK, WORDS]: no words of rows that are decided already, nor words of later boxes.
    words = tl.arange(0, WORDS)[None, :] * CHUNK + lane[:, None]
    needed = eligible[:, None] & (tl.arange(0, WORDS)[None, :] * 32 < lane[:, None])
    higher = tl.load(overlap_ptr + group * (WORDS * CHUNK) + words, mask=needed, other=0).to(tl.uint32, bitcast=True)
    kept = decide(higher, eligible.to(tl.int32))
    if FIRST:
        count = tl.full([], 0, dtype=tl.int64)
    else:
        count = tl.load(count_ptr + group)
    count = append_kept(
        kept_ptr + group * max_keep * 4, index_ptr + group * max_keep, count, max_keep, kept, row, x1, y1, x2, y2
    )
    tl.store(count_ptr + group, count)
    tl.store(number_ptr + group, 0)
    if FIRST:
        tl.store(cursor_ptr + group, CHUNK)
        tl.store(removed_ptr + group * STEP + tl.arange(0, STEP), tl.zeros([STEP], dtype=tl.int8))
        for start in range(0, max_keep, CHUNK):
            slot = start + lane
            padding = (slot >= count) & (slot < max_keep)
            tl.store(index_ptr + group * max_keep + slot, tl.zeros([CHUNK], dtype=tl.int64), mask=padding)


@triton.jit
def settle_block(
    # Tensors, all contiguous
    boxes_ptr,  # as in `decide_group`
    valid_ptr,
    survivors_ptr,
    number_ptr,  # not read if FIRST
    overlap_ptr,
    removed_ptr,
    cursor_ptr,
    kept_ptr,
    index_ptr,
    count_ptr,
    arrivals_ptr,  # [groups] int32, 0 before and after
    # Sizes
    num_boxes,
    max_keep,
    # Scalars
    iou_threshold,
    half_ulp,
    block,  # of rows, of all groups
    word,  # of 32 columns
    # Constexprs
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    DECIDE: tl.constexpr,
    FUSED: tl.constexpr,
):
    """`overlap_block`; if DECIDE, the last program of a group decides it. Returns whether it is decided, or empty."""
    row_blocks: tl.constexpr = CHUNK // BLOCK_ROWS
    group = tl.cast(block // row_blocks, tl.int64)
    if FIRST:
        number = tl.minimum(num_boxes, CHUNK)
    else:
        number = tl.load(number_ptr + group)
    decided = number == 0
    if number > 0:
        overlap_block(
            boxes_ptr, valid_ptr, survivors_ptr, overlap_ptr, num_boxes, number, iou_threshold, half_ulp,
            group, block % row_blocks, word, CHUNK, BLOCK_ROWS, FIRST, FUSED,
        )  # fmt: skip
        if DECIDE:
            decided = arrive_last(arrivals_ptr + group, row_blocks * (CHUNK // 32))
            if decided:
                decide_group(
                    boxes_ptr, valid_ptr, survivors_ptr, number_ptr, overlap_ptr, removed_ptr, cursor_ptr, kept_ptr,
                    index_ptr, count_ptr, num_boxes, number, max_keep, group, CHUNK, STEP, FIRST,
                )  # fmt: skip
    return decided


@triton.jit(do_not_specialize=["num_boxes", "max_keep"])
def _settle_kernel(
    boxes_ptr,  # all as in `settle_block`
    valid_ptr,
    survivors_ptr,
    number_ptr,
    overlap_ptr,
    removed_ptr,
    cursor_ptr,
    kept_ptr,
    index_ptr,
    count_ptr,
    arrivals_ptr,
    num_boxes,
    max_keep,
    iou_threshold,
    half_ulp,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    DECIDE: tl.constexpr,
    FUSED: tl.constexpr,
):
    """The matrix of a chunk of every group, and if DECIDE what is kept: program (block, word)."""
    settle_block(
        boxes_ptr, valid_ptr, survivors_ptr, number_ptr, overlap_ptr, removed_ptr, cursor_ptr, kept_ptr, index_ptr,
        count_ptr, arrivals_ptr, num_boxes, max_keep, iou_threshold, half_ulp, tl.program_id(0), tl.program_id(1),
        CHUNK, STEP, BLOCK_ROWS, FIRST, DECIDE, FUSED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_boxes", "max_keep"])
def _decide_kernel(
    boxes_ptr,  # all as in `decide_group`
    valid_ptr,
    survivors_ptr,
    number_ptr,
    overlap_ptr,
    removed_ptr,
    cursor_ptr,
    kept_ptr,
    index_ptr,
    count_ptr,
    num_boxes,
    max_keep,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
):
    """A chunk of every group: program (group)."""
    group = tl.program_id(0).to(tl.int64)
    if FIRST:
        number = tl.minimum(num_boxes, CHUNK)
    else:
        number = tl.load(number_ptr + group)
    if number > 0:
        decide_group(
            boxes_ptr, valid_ptr, survivors_ptr, number_ptr, overlap_ptr, removed_ptr, cursor_ptr, kept_ptr, index_ptr,
            count_ptr, num_boxes, number, max_keep, group, CHUNK, STEP, FIRST,
        )  # fmt: skip


def launch_settle(
    boxes: torch.Tensor,
    valid: torch.Tensor,
    survivors: torch.Tensor,
    number: torch.Tensor,
    overlap: torch.Tensor,
    removed: torch.Tensor,
    cursor: torch.Tensor,
    kept: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    arrivals: torch.Tensor,
    *,
    first: bool,
    iou_threshold: float,
    rows: int,
    warps: int,
    at_once: bool,
) -> None:
    """Settle the survivors of each group, or with `first` its first rows, and append what is kept.

    A program compares `rows` rows with 32 columns, and one of `warps` warps decides a group; `at_once` in one launch
    of programs of as many warps and registers, of which few fit the device at a time.
    """
    groups, chunk = survivors.shape
    arguments = {
        "boxes_ptr": boxes, "valid_ptr": valid, "survivors_ptr": survivors, "number_ptr": number,
        "overlap_ptr": overlap, "removed_ptr": removed, "cursor_ptr": cursor, "kept_ptr": kept, "index_ptr": index,
        "count_ptr": count, "num_boxes": boxes.shape[1], "max_keep": index.shape[1], "CHUNK": chunk,
        "STEP": removed.shape[1], "FIRST": first, "enable_fp_fusion": False,
    }  # fmt: skip
    _settle_kernel[(groups * (chunk // rows), chunk // 32)](
        **arguments,
        arrivals_ptr=arrivals,
        iou_threshold=iou_threshold,
        half_ulp=half_ulp(iou_threshold),
        BLOCK_ROWS=rows,
        DECIDE=at_once,
        FUSED=is_compiled(_settle_kernel),
        num_warps=warps if at_once else max(rows // 32, 1),
    )
    if not at_once:
        _decide_kernel[(groups,)](**arguments, num_warps=warps)
