"""The narrow step of non-maximum suppression: the survivors of a step among themselves, chunk by chunk."""

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.nms_decide import decide_group, load_candidates
from fastdet.kernels.common.nms_overlap import arrive_last, half_ulp, is_compiled, pack_overlaps


@triton.constexpr_function
def pairs_of_blocks(settled: int, rows: int) -> int:
    """Of the matrix of a group, only the words up to the diagonal are needed: by block b of `rows` rows, b + 1 times as
    many as by the first, so that the b-th block and the b-th from the end need as many as any such pair."""
    return max(settled // rows // 2, 1)


@triton.constexpr_function
def words_of_pair(settled: int, rows: int) -> int:
    """Blocks of 32 columns that a pair of blocks needs."""
    blocks = settled // rows
    return (blocks + 1 if blocks > 1 else 1) * (rows // 32)


@triton.jit
def overlap_block(
    # Tensors, all contiguous
    boxes_ptr,  # [groups, N, 4] fp32, pixels
    valid_ptr,  # [groups, N] bool
    survivors_ptr,  # [groups, SETTLED] int32, rows, from the filter; not read if FIRST
    overlap_ptr,  # [groups, SETTLED / 32, SETTLED] int32, output
    # Sizes
    num_boxes,
    number,  # of survivors
    # Scalars
    iou_threshold,
    half_ulp,
    group,
    block,  # of rows
    word,  # of 32 columns
    # Constexprs
    SETTLED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Compare the rows of a block with 32 survivors.

                        BLOCK_ROWS rows
                 +-------------------------+
    32 columns,  | bit of column 0         |     block and word, summed down to one word a row: bit c of word w is set
    one word     | bit of column 1   ...   |     if box 32 w + c has a higher priority than the row's and overlaps it
                 +-------------------------+     by more than the threshold

    Words above the diagonal, and of blocks past the last box, are left unwritten: they are never read.
    """
    lane = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    _row, _eligible, x1, y1, x2, y2 = load_candidates(
        boxes_ptr, valid_ptr, survivors_ptr, group, lane, num_boxes, number, SETTLED, FIRST
    )
    column = word * 32 + tl.arange(0, 32)
    _column_row, _column_eligible, cx1, cy1, cx2, cy2 = load_candidates(
        boxes_ptr, valid_ptr, survivors_ptr, group, column, num_boxes, number, SETTLED, FIRST
    )
    packed = pack_overlaps(cx1, cy1, cx2, cy2, column, x1, y1, x2, y2, lane, iou_threshold, half_ulp, FUSED)
    tl.store(overlap_ptr + (group * (SETTLED // 32) + word) * SETTLED + lane, packed)


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
    pair,  # of row blocks, of all groups
    word,  # of 32 columns, of both blocks
    # Constexprs
    SETTLED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    DECIDE: tl.constexpr,
    FUSED: tl.constexpr,
):
    """`overlap_block`; if DECIDE, the last program of a group decides it. Returns whether it is decided, or empty."""
    PAIRS: tl.constexpr = pairs_of_blocks(SETTLED, BLOCK_ROWS)
    WORDS: tl.constexpr = BLOCK_ROWS // 32
    group = tl.cast(pair // PAIRS, tl.int64)
    if FIRST:
        number = tl.minimum(num_boxes, SETTLED)
    else:
        number = tl.load(number_ptr + group)
    # The words of the pair's first block come before those of its second.
    block = pair % PAIRS
    words_before = (block + 1) * WORDS
    if word >= words_before:
        block = SETTLED // BLOCK_ROWS - 1 - block
        word -= words_before
    decided = number == 0
    if number > 0:
        if block * BLOCK_ROWS < number:
            overlap_block(
                boxes_ptr, valid_ptr, survivors_ptr, overlap_ptr, num_boxes, number, iou_threshold, half_ulp,
                group, block, word, SETTLED, BLOCK_ROWS, FIRST, FUSED,
            )  # fmt: skip
        if DECIDE:
            # All arrive, also those without rows: one that came late would read a number that is reset already.
            decided = arrive_last(arrivals_ptr + group, PAIRS * words_of_pair(SETTLED, BLOCK_ROWS))
            if decided:
                decide_group(
                    boxes_ptr, valid_ptr, survivors_ptr, number_ptr, overlap_ptr, removed_ptr, cursor_ptr, kept_ptr,
                    index_ptr, count_ptr, num_boxes, number, max_keep, group, SETTLED, CHUNK, STEP, FIRST,
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
    SETTLED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    DECIDE: tl.constexpr,
    FUSED: tl.constexpr,
):
    """The matrix of the survivors of every group, and if DECIDE what is kept: program (pair, word)."""
    settle_block(
        boxes_ptr, valid_ptr, survivors_ptr, number_ptr, overlap_ptr, removed_ptr, cursor_ptr, kept_ptr, index_ptr,
        count_ptr, arrivals_ptr, num_boxes, max_keep, iou_threshold, half_ulp, tl.program_id(0), tl.program_id(1),
        SETTLED, CHUNK, STEP, BLOCK_ROWS, FIRST, DECIDE, FUSED,
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
    SETTLED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
):
    """The survivors of every group: program (group)."""
    group = tl.program_id(0).to(tl.int64)
    if FIRST:
        number = tl.minimum(num_boxes, SETTLED)
    else:
        number = tl.load(number_ptr + group)
    if number > 0:
        decide_group(
            boxes_ptr, valid_ptr, survivors_ptr, number_ptr, overlap_ptr, removed_ptr, cursor_ptr, kept_ptr, index_ptr,
            count_ptr, num_boxes, number, max_keep, group, SETTLED, CHUNK, STEP, FIRST,
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
    chunk: int,
    rows: int,
    warps: int,
    at_once: bool,
) -> None:
    """Settle the survivors of each group, or with `first` its first rows, and append what is kept.

    A program compares `rows` rows with 32 columns, and one of `warps` warps decides a group, `chunk` boxes at a time;
    `at_once` in one launch of programs of as many warps and registers, of which few fit the device at a time.
    """
    groups, settled = survivors.shape
    arguments = {
        "boxes_ptr": boxes, "valid_ptr": valid, "survivors_ptr": survivors, "number_ptr": number,
        "overlap_ptr": overlap, "removed_ptr": removed, "cursor_ptr": cursor, "kept_ptr": kept, "index_ptr": index,
        "count_ptr": count, "num_boxes": boxes.shape[1], "max_keep": index.shape[1], "SETTLED": settled,
        "CHUNK": chunk, "STEP": removed.shape[1], "FIRST": first, "enable_fp_fusion": False,
    }  # fmt: skip
    _settle_kernel[(groups * pairs_of_blocks(settled, rows), words_of_pair(settled, rows))](
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
