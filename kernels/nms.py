"""Greedy non-maximum suppression of many groups at once, exact, without a host sync.

The boxes of a group come in descending order of priority and are processed in chunks. One wide launch writes for every
chunk a bit matrix of "overlaps a box of higher priority in the chunk". Then, chunk after chunk, a wide launch marks the
boxes that overlap a box kept from an earlier chunk, and one program per group settles the rest in rounds: a box is
removed once a kept box of higher priority overlaps it, and kept once every box of higher priority that overlaps it is
removed. Each round decides at least the first undecided box, and no decision is ever revised, so the result is the
greedy one for any data. A group that has kept `max_keep` boxes skips its later chunks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.boxes import load_boxes, store_rows_of_4
from fastdet.kernels.common.nms_overlap import launch_filter, launch_overlap


class Config(NamedTuple):
    """Block sizes, all powers of two.

    chunk: boxes per chunk, at least 32.
    overlap_rows: rows that a program of the overlap kernel compares with 32 columns.
    filter_rows, filter_kept: rows and kept boxes that a program of the filter compares at a time.
    filter_span: kept boxes that it compares in all.
    settle_warps: warps of the program that settles a chunk.
    """

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
def _bitwise_or(a, b):
    return a | b


@triton.jit
def _pack_words(
    flags,  # [CHUNK] int32, 0 or 1
    CHUNK: tl.constexpr,
):
    """uint32 [1, CHUNK / 32]: 32 flags to a word, the first of them in bit 0."""
    bits = tl.reshape(flags, [CHUNK // 32, 32]) << tl.arange(0, 32)[None, :]
    return tl.sum(bits, axis=1).to(tl.uint32, bitcast=True)[None, :]


@triton.jit(do_not_specialize=["num_boxes", "num_chunks", "max_keep", "chunk"])
def _settle_kernel(
    # Tensors, all contiguous
    boxes_ptr,  # [groups, N, 4] fp32, pixels
    valid_ptr,  # [groups, N] bool
    overlap_ptr,  # [groups, num_chunks, CHUNK / 32, CHUNK] int32, from the overlap kernel
    removed_ptr,  # [groups, N] int8, from the filter kernel; not read if FIRST
    kept_ptr,  # [groups, max_keep, 4] fp32, pixels, appended to
    index_ptr,  # [groups, max_keep] int64, appended to
    count_ptr,  # [groups] int64, kept boxes, updated; not read if FIRST
    # Sizes
    num_boxes,
    num_chunks,
    max_keep,
    chunk,  # index of the chunk
    # Constexprs
    CHUNK: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Decide the chunk of one group and append what is kept.

      one row a box:  undecided -> kept | removed

          word 0   word 1  ...   the matrix stays in registers; each round meets every row with the packed states of
         +--------+--------+     all boxes: kept ones remove it, undecided ones hold it back
    row  |        |        |
         +--------+--------+     program (group)
    """
    WORDS: tl.constexpr = CHUNK // 32
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    row = chunk * CHUNK + lane  # [CHUNK]
    if FIRST:
        count = tl.full([], 0, dtype=tl.int64)
    else:
        count = tl.load(count_ptr + group)

    # Select the boxes to decide: valid, finite and not removed by a kept box; none if max_keep boxes are kept already.
    inside = (row < num_boxes) & (count < max_keep)
    source = group * num_boxes + row
    eligible = inside & (tl.load(valid_ptr + source, mask=inside, other=0) != 0)
    if not FIRST:
        eligible &= tl.load(removed_ptr + source, mask=inside, other=1) == 0
    x1, y1, x2, y2 = load_boxes(boxes_ptr, source, eligible)
    # Zero times a finite number is 0; times NaN or infinity it is NaN, which equals nothing.
    eligible &= (x1 * 0.0 == 0.0) & (y1 * 0.0 == 0.0) & (x2 * 0.0 == 0.0) & (y2 * 0.0 == 0.0)

    undecided = eligible.to(tl.int32)
    if tl.sum(undecided, axis=0) > 0:
        # Load the matrix, [CHUNK, WORDS]: no words of rows that are decided already, nor words of later boxes.
        matrix = (group * num_chunks + chunk) * (WORDS * CHUNK)
        words = tl.arange(0, WORDS)[None, :] * CHUNK + lane[:, None]
        needed = (undecided[:, None] != 0) & (tl.arange(0, WORDS)[None, :] * 32 < lane[:, None])
        higher = tl.load(overlap_ptr + matrix + words, mask=needed, other=0).to(tl.uint32, bitcast=True)

        # Decide in rounds.
        kept = tl.zeros([CHUNK], dtype=tl.int32)
        while tl.sum(undecided, axis=0) > 0:
            overlaps_kept = tl.reduce(higher & _pack_words(kept, CHUNK), 1, _bitwise_or)
            overlaps_undecided = tl.reduce(higher & _pack_words(undecided, CHUNK), 1, _bitwise_or)
            undecided = tl.where(overlaps_kept != 0, 0, undecided)
            newly_kept = tl.where(overlaps_undecided == 0, undecided, 0)
            kept += newly_kept
            undecided -= newly_kept

        # Append the kept boxes in order of priority.
        rank = count + tl.cumsum(kept, axis=0) - 1
        write = (kept != 0) & (rank < max_keep)
        target = group * max_keep + rank
        tl.store(index_ptr + target, row.to(tl.int64), mask=write)
        store_rows_of_4(kept_ptr, target, x1, y1, x2, y2, write)
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
    launch_overlap(boxes, valid, overlap, removed, iou_threshold=iou_threshold, rows=config.overlap_rows)
    for chunk in range(overlap.shape[1]):
        if chunk > 0:
            launch_filter(
                boxes,
                kept,
                count,
                removed,
                start=chunk * config.chunk,
                iou_threshold=iou_threshold,
                chunk=config.chunk,
                rows=config.filter_rows,
                block_kept=config.filter_kept,
                span=config.filter_span,
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
            num_chunks=overlap.shape[1],
            max_keep=index.shape[1],
            chunk=chunk,
            CHUNK=config.chunk,
            FIRST=chunk == 0,
            num_warps=config.settle_warps,
            enable_fp_fusion=False,
        )
