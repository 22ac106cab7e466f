"""Greedy non-maximum suppression of many groups at once, exact, without a wait of the host.

The boxes of a group come in descending order of priority and are worked through in chunks. One wide launch writes for
each chunk a bit matrix of "overlaps a box of higher priority in the chunk". Then, chunk after chunk, a wide launch
marks the boxes that a box kept from an earlier chunk removes, and one program a group settles the rest in rounds: a box
is removed once a kept box of higher priority overlaps it, and kept once every box of higher priority that overlaps it
is removed. Each round decides at least the first undecided box, and no decision is ever revised, so the result is the
greedy one whatever the data. A group that has kept `max_keep` boxes skips its later chunks.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fastdet.kernels.common.boxes import intersections_unions, load_boxes, ratio_or_zero, store_fours

# A value of its own would compile a kernel of its own.
_SIZES = ["num_boxes", "num_chunks", "max_keep", "start", "chunk"]


class Config(NamedTuple):
    """Sizes of the work, all powers of two: boxes a chunk, at least 32; rows a program compares with 32 others; rows
    and kept boxes a program of the filter compares at a time, and kept boxes it compares in all; warps that settle."""

    chunk: int
    overlap_rows: int
    filter_rows: int
    filter_kept: int
    filter_span: int
    settle_warps: int


def config(num_boxes: int) -> Config:
    """Sizes for groups of `num_boxes` boxes: the matrix of a chunk has to fit the registers of the program it settles.

    That of 1024 boxes is 64 words in each of 512 threads.
    """
    chunk = min(max(triton.next_power_of_2(num_boxes), 32), 1024)
    return Config(
        chunk,
        overlap_rows=min(chunk, 128),
        filter_rows=32,
        filter_kept=64,
        filter_span=256,
        settle_warps=max(chunk // 64, 1),
    )


@triton.jit
def _exceeds(inter, union, threshold, half_ulp, FUSED: tl.constexpr):
    """Whether the quotient, rounded as IEEE division does, is above the threshold; not if it is undefined.

    The rounded quotient is above if the true one is above threshold + half_ulp, the middle between the threshold and
    the next fp32 number; it never lies there, as that middle has one digit more than a quotient's numerator. Near it,
    inter - threshold * union has few digits, so that a fused multiply-add gives it exactly. (For areas above 2^-100.)
    """
    if FUSED:
        # A box inverted along one axis may have a union below 0.
        return (inter > 0.0) & (tl.fma(-threshold, union, inter) > half_ulp * union)
    else:
        return ratio_or_zero(inter, union) > threshold


@triton.jit(do_not_specialize=_SIZES)
def _overlap_kernel(
    boxes_ptr,
    valid_ptr,
    overlap_ptr,
    removed_ptr,
    num_boxes,
    num_chunks,
    iou_threshold,
    half_ulp,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FUSED: tl.constexpr,
):
    """The lower triangles of the overlap matrices of all chunks, 32 columns to a word.

                        BLOCK_ROWS rows
                 +-------------------------+
    32 columns,  | bit of column 0         |     program (group, chunk and row block; word), summed down to one word a
    one word     | bit of column 1   ...   |     row: bit c of word w says that box 32 w + c has a higher priority than
                 +-------------------------+     the row's and overlaps it by more than the threshold

    Rows whose tile holds nothing valid are left unwritten: they are never looked at.

    boxes_ptr [groups, N, 4] fp32, pixels; valid_ptr [groups, N] bool; overlap_ptr [groups, num_chunks, CHUNK / 32,
    CHUNK] int32, written; removed_ptr [groups, N] int8, set to 0 for the launches that follow.
    """
    row_blocks: tl.constexpr = CHUNK // BLOCK_ROWS
    block = tl.program_id(0)
    word = tl.program_id(1)
    group = (block // (num_chunks * row_blocks)).to(tl.int64)
    chunk = block // row_blocks % num_chunks
    slot = block % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    bit = tl.arange(0, 32)
    other = word * 32 + bit
    start = chunk * CHUNK
    first = group * num_boxes + start
    row_mask = start + slot < num_boxes
    if word == 0:
        tl.store(removed_ptr + first + slot, tl.zeros([BLOCK_ROWS], dtype=tl.int8), mask=row_mask)
    row_valid = tl.load(valid_ptr + first + slot, mask=row_mask, other=0).to(tl.int32)
    other_valid = tl.load(valid_ptr + first + other, mask=start + other < num_boxes, other=0).to(tl.int32)
    below = word * 32 < (block % row_blocks + 1) * BLOCK_ROWS
    if below & (tl.max(row_valid, axis=0) > 0):
        x1, y1, x2, y2 = load_boxes(boxes_ptr, first + slot, row_valid != 0)
        ox1, oy1, ox2, oy2 = load_boxes(boxes_ptr, first + other, other_valid != 0)
        inter, union = intersections_unions(ox1, oy1, ox2, oy2, x1, y1, x2, y2)
        hit = _exceeds(inter, union, iou_threshold, half_ulp, FUSED) & (other[:, None] < slot[None, :])
        packed = tl.sum(hit.to(tl.int32) << bit[:, None], axis=0)
        matrix = group * num_chunks + chunk
        tl.store(overlap_ptr + (matrix * (CHUNK // 32) + word) * CHUNK + slot, packed)


@triton.jit(do_not_specialize=_SIZES)
def _filter_kernel(
    boxes_ptr,
    kept_ptr,
    count_ptr,
    removed_ptr,
    num_boxes,
    max_keep,
    start,
    iou_threshold,
    half_ulp,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    SPAN: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Marks the boxes of the chunk that a box kept before removes.

                      SPAN of the kept boxes
                  BLOCK_KEPT  BLOCK_KEPT  ...
                +------------+------------+
    BLOCK_ROWS  |  ->   any overlap   ->  |    program (group and row block; span)
                +------------+------------+

    boxes_ptr [groups, N, 4] fp32, pixels; kept_ptr [groups, max_keep, 4] fp32, of which count_ptr [groups] int64 are
    written; removed_ptr [groups, N] int8, set to 1 by whichever program sees a reason.
    """
    row_blocks: tl.constexpr = CHUNK // BLOCK_ROWS
    group = (tl.program_id(0) // row_blocks).to(tl.int64)
    row = start + tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    count = tl.load(count_ptr + group)
    begin = tl.program_id(1) * SPAN
    end = tl.where(count < max_keep, tl.minimum(count, begin + SPAN), 0)
    if begin < end:
        x1, y1, x2, y2 = load_boxes(boxes_ptr, group * num_boxes + row, row < num_boxes)
        overlapped = tl.zeros([BLOCK_ROWS], dtype=tl.int32)
        for first in range(begin, end, BLOCK_KEPT):
            other = first + tl.arange(0, BLOCK_KEPT)
            # Past the end boxes are zeros, which overlap nothing.
            kx1, ky1, kx2, ky2 = load_boxes(kept_ptr, group * max_keep + other, other < end)
            inter, union = intersections_unions(x1, y1, x2, y2, kx1, ky1, kx2, ky2)
            hit = _exceeds(inter, union, iou_threshold, half_ulp, FUSED)
            overlapped |= tl.max(hit.to(tl.int32), axis=1)
        mask = (row < num_boxes) & (overlapped != 0)
        tl.store(removed_ptr + group * num_boxes + row, tl.full([BLOCK_ROWS], 1, dtype=tl.int8), mask=mask)


@triton.jit
def _or(first, second):
    return first | second


@triton.jit
def _words(flags, CHUNK: tl.constexpr):
    """uint32 [1, CHUNK / 32]: 32 of the `flags` [CHUNK], 0 or 1, to a word."""
    bits = tl.reshape(flags, [CHUNK // 32, 32]) << tl.arange(0, 32)[None, :]
    return tl.sum(bits, axis=1).to(tl.uint32, bitcast=True)[None, :]


@triton.jit(do_not_specialize=_SIZES)
def _settle_kernel(
    boxes_ptr,
    valid_ptr,
    overlap_ptr,
    removed_ptr,
    kept_ptr,
    index_ptr,
    count_ptr,
    num_boxes,
    num_chunks,
    max_keep,
    chunk,
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Decide the chunk of one group and append what is kept.

      one row a box:  undecided -> kept | removed

          word 0   word 1  ...   the matrix stays in registers; each round meets every row with the packed states of
         +--------+--------+     all boxes: kept ones remove it, undecided ones hold it back
    row  |        |        |
         +--------+--------+     program (group)

    boxes_ptr [groups, N, 4] fp32; valid_ptr [groups, N] bool; overlap_ptr [groups, num_chunks, CHUNK / 32, CHUNK]
    int32; removed_ptr [groups, N] int8; kept_ptr [groups, max_keep, 4] fp32, index_ptr [groups, max_keep] int64,
    count_ptr [groups] int64: appended to, and taken to be empty if FIRST.
    """
    WORDS: tl.constexpr = CHUNK // 32
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    row = chunk * CHUNK + lane
    if FIRST:
        count = tl.full([], 0, dtype=tl.int64)
    else:
        count = tl.load(count_ptr + group)
    inside = (row < num_boxes) & (count < max_keep)
    source = group * num_boxes + row
    undecided = inside & (tl.load(valid_ptr + source, mask=inside, other=0) != 0)
    if not FIRST:
        undecided &= tl.load(removed_ptr + source, mask=inside, other=1) == 0
    x1, y1, x2, y2 = load_boxes(boxes_ptr, source, undecided)
    # Zero times a finite number is 0; times NaN or infinity it is NaN, which equals nothing.
    undecided &= (x1 * 0.0 == 0.0) & (y1 * 0.0 == 0.0) & (x2 * 0.0 == 0.0) & (y2 * 0.0 == 0.0)
    waiting = undecided.to(tl.int32)
    if tl.sum(waiting, axis=0) > 0:
        matrix = (group * num_chunks + chunk) * (WORDS * CHUNK)
        words = tl.arange(0, WORDS)[None, :] * CHUNK + lane[:, None]
        # A row that is decided already needs no word, nor any row a word of later boxes.
        needed = (waiting[:, None] != 0) & (tl.arange(0, WORDS)[None, :] * 32 < lane[:, None])
        higher = tl.load(overlap_ptr + matrix + words, mask=needed, other=0).to(tl.uint32, bitcast=True)
        kept = tl.zeros([CHUNK], dtype=tl.int32)
        while tl.sum(waiting, axis=0) > 0:
            under_kept = tl.reduce(higher & _words(kept, CHUNK), 1, _or)
            under_waiting = tl.reduce(higher & _words(waiting, CHUNK), 1, _or)
            waiting = tl.where(under_kept != 0, 0, waiting)
            newly_kept = tl.where(under_waiting == 0, waiting, 0)
            kept += newly_kept
            waiting -= newly_kept

        rank = count + tl.cumsum(kept, axis=0) - 1
        write = (kept != 0) & (rank < max_keep)
        target = group * max_keep + rank
        tl.store(index_ptr + target, row.to(tl.int64), mask=write)
        store_fours(kept_ptr, target, x1, y1, x2, y2, write)
        count = tl.minimum(count + tl.sum(kept, axis=0), max_keep)
    tl.store(count_ptr + group, count)


def launch(
    boxes: torch.Tensor,
    valid: torch.Tensor,
    overlap: torch.Tensor,
    removed: torch.Tensor,
    kept: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    *,
    iou_threshold: float,
    config: Config,
) -> None:
    """Write to `index` [groups, max_keep], zeros before, and `count` [groups] what `boxes` keep.

    `boxes` [groups, N, 4] and `valid` [groups, N] are in descending priority, `iou_threshold` an fp32 number. Scratch:
    `overlap` [groups, chunks, chunk / 32, chunk] int32, `removed` [groups, N] int8, `kept` [groups, max_keep, 4] fp32.
    """
    groups, num_boxes, _ = boxes.shape
    max_keep, chunk = index.shape[1], config.chunk
    chunks, longest = overlap.shape[1], min(num_boxes, chunk)
    numbers = {
        "iou_threshold": iou_threshold,
        # Of 24 digits the first is worth half of 2 to the exponent.
        "half_ulp": math.ldexp(1.0, math.frexp(iou_threshold)[1] - 25) if iou_threshold else 0.0,
        "num_boxes": num_boxes,
        "CHUNK": chunk,
        # The interpreter rounds twice in a multiply-add, so there the quotient is compared.
        "FUSED": isinstance(_overlap_kernel, JITFunction),
        "enable_fp_fusion": False,
    }
    # The first axis of a grid is the only one that may be long.
    _overlap_kernel[(groups * chunks * (chunk // config.overlap_rows), triton.cdiv(longest, 32))](
        boxes_ptr=boxes,
        valid_ptr=valid,
        overlap_ptr=overlap,
        removed_ptr=removed,
        num_chunks=chunks,
        BLOCK_ROWS=config.overlap_rows,
        num_warps=max(config.overlap_rows // 32, 1),
        **numbers,
    )
    for which in range(chunks):
        if which > 0:
            spans = triton.cdiv(min(max_keep, which * chunk), config.filter_span)
            _filter_kernel[(groups * (chunk // config.filter_rows), spans)](
                boxes_ptr=boxes,
                kept_ptr=kept,
                count_ptr=count,
                removed_ptr=removed,
                max_keep=max_keep,
                start=which * chunk,
                BLOCK_ROWS=config.filter_rows,
                BLOCK_KEPT=config.filter_kept,
                SPAN=config.filter_span,
                **numbers,
            )
        _settle_kernel[(groups,)](
            boxes_ptr=boxes,
            valid_ptr=valid,
            overlap_ptr=overlap,
            removed_ptr=removed,
            kept_ptr=kept,
            index_ptr=index,
            count_ptr=count,
            num_boxes=num_boxes,
            max_keep=max_keep,
            num_chunks=chunks,
            chunk=which,
            CHUNK=chunk,
            FIRST=which == 0,
            num_warps=config.settle_warps,
            enable_fp_fusion=False,
        )
