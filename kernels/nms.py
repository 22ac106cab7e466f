"""Greedy non-maximum suppression of many groups at once, exact, without a wait of the host.

The boxes of a group come in descending order of priority and are worked through in chunks. A chunk is first filtered
against the boxes kept so far (wide), then a bit matrix of "overlaps a box of higher priority" is written for the chunk
(wide), and one program a group settles it in rounds: a box is removed once a kept box of higher priority overlaps it,
and kept once every box of higher priority that overlaps it is removed. Each round decides at least the first undecided
box, and no decision is ever revised, so the result is the greedy one whatever the data. A group that has kept
`max_keep` boxes skips its later chunks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .overlap import iou, load_boxes


class Config(NamedTuple):
    """Sizes of the work: boxes a chunk (a power of two, at least 32), rows and kept boxes of a tile, warps."""

    chunk: int
    block_rows: int
    block_kept: int
    num_warps: int


def config(num_boxes: int) -> Config:
    """Block sizes for groups of `num_boxes` boxes."""
    chunk = min(max(triton.next_power_of_2(num_boxes), 32), 1024)
    return Config(chunk=chunk, block_rows=32, block_kept=64, num_warps=4 if chunk <= 256 else 8)


@triton.jit
def _filter_kernel(
    boxes_ptr,
    valid_ptr,
    kept_ptr,
    count_ptr,
    alive_ptr,
    num_boxes,
    max_keep,
    start,
    iou_threshold,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
):
    """Which boxes of the chunk are valid, finite, and free of every box kept before.

                 kept boxes, up to count
                 BLOCK_KEPT  BLOCK_KEPT ...
                +----------+----------+
    BLOCK_ROWS  |  -> any overlap ->  |    program (group and row block)
                +----------+----------+

    boxes_ptr [groups, N, 4] fp32, pixels; valid_ptr [groups, N] bool; kept_ptr [groups, max_keep, 4] fp32;
    count_ptr [groups] int64; alive_ptr [groups, CHUNK] int8, written.
    """
    row_blocks: tl.constexpr = CHUNK // BLOCK_ROWS
    group = (tl.program_id(0) // row_blocks).to(tl.int64)
    slot = tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = start + slot
    count = tl.load(count_ptr + group)
    inside = (row < num_boxes) & (count < max_keep)
    alive = tl.load(valid_ptr + group * num_boxes + row, mask=inside, other=0).to(tl.int1)
    x1, y1, x2, y2 = load_boxes(boxes_ptr, group * num_boxes + row, inside)
    # Zero times a finite number is 0; times NaN or infinity it is NaN, which equals nothing.
    alive &= (x1 * 0.0 == 0.0) & (y1 * 0.0 == 0.0) & (x2 * 0.0 == 0.0) & (y2 * 0.0 == 0.0)
    overlapped = tl.zeros([BLOCK_ROWS], dtype=tl.int32)
    for first in range(0, tl.where(count < max_keep, count, 0), BLOCK_KEPT):
        other = first + tl.arange(0, BLOCK_KEPT)
        kx1, ky1, kx2, ky2 = load_boxes(kept_ptr, group * max_keep + other, other < count)
        value = iou(
            x1[:, None], y1[:, None], x2[:, None], y2[:, None], kx1[None, :], ky1[None, :], kx2[None, :], ky2[None, :]
        )
        hit = (value > iou_threshold) & (other < count)[None, :]
        overlapped |= tl.max(hit.to(tl.int32), axis=1)
    tl.store(alive_ptr + group * CHUNK + slot, (alive & (overlapped == 0)).to(tl.int8))


@triton.jit
def _overlap_kernel(
    boxes_ptr,
    count_ptr,
    overlap_ptr,
    num_boxes,
    max_keep,
    start,
    iou_threshold,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """The lower triangle of the chunk's overlap matrix, 32 columns to a word.

                 word 0   word 1   word 2
                +--------+--------+--------+
    BLOCK_ROWS  |program |        |        |    program (group and row block, word)
                +--------+--------+        |
    BLOCK_ROWS  |        |        |        |    bit c of word w in row r: box 32 w + c has a higher priority
                +--------+--------+--------+    than box r and overlaps it by more than the threshold

    boxes_ptr [groups, N, 4] fp32, pixels; count_ptr [groups] int64; overlap_ptr [groups, CHUNK / 32, CHUNK] int32,
    written, words of one column together.
    """
    row_blocks: tl.constexpr = CHUNK // BLOCK_ROWS
    group = (tl.program_id(0) // row_blocks).to(tl.int64)
    row_block = tl.program_id(0) % row_blocks
    word = tl.program_id(1)
    slot = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    bit = tl.arange(0, 32)
    other = word * 32 + bit
    count = tl.load(count_ptr + group)
    wanted = (count < max_keep) & (word * 32 < (row_block + 1) * BLOCK_ROWS)
    row_mask = (start + slot < num_boxes) & wanted
    other_mask = (start + other < num_boxes) & wanted
    x1, y1, x2, y2 = load_boxes(boxes_ptr, group * num_boxes + start + slot, row_mask)
    ox1, oy1, ox2, oy2 = load_boxes(boxes_ptr, group * num_boxes + start + other, other_mask)
    value = iou(
        x1[:, None], y1[:, None], x2[:, None], y2[:, None], ox1[None, :], oy1[None, :], ox2[None, :], oy2[None, :]
    )
    hit = (value > iou_threshold) & (other[None, :] < slot[:, None]) & row_mask[:, None] & other_mask[None, :]
    packed = tl.sum(hit.to(tl.int32) << bit[None, :], axis=1)
    tl.store(overlap_ptr + (group * (CHUNK // 32) + word) * CHUNK + slot, packed)


@triton.jit
def _settle_kernel(
    boxes_ptr,
    overlap_ptr,
    alive_ptr,
    kept_ptr,
    index_ptr,
    count_ptr,
    num_boxes,
    max_keep,
    start,
    CHUNK: tl.constexpr,
):
    """Decide the chunk of one group and append what is kept.

      one lane a box:  undecided -> kept | removed

          word 0   word 1  ...   each round reads every word of the lane's row and meets it with
         +--------+--------+     the packed states of the 32 boxes of that word
    lane |        |        |
         +--------+--------+     program (group)

    boxes_ptr [groups, N, 4] fp32; overlap_ptr [groups, CHUNK / 32, CHUNK] int32; alive_ptr [groups, CHUNK] int8;
    kept_ptr [groups, max_keep, 4] fp32, index_ptr [groups, max_keep] int64, count_ptr [groups] int64: appended to.
    """
    WORDS: tl.constexpr = CHUNK // 32
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    word = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    count = tl.load(count_ptr + group)
    undecided = tl.load(alive_ptr + group * CHUNK + lane).to(tl.int32)
    kept = tl.zeros([CHUNK], dtype=tl.int32)
    left = tl.sum(undecided, axis=0)
    while left > 0:
        undecided_words = tl.sum(tl.reshape(undecided, [WORDS, 32]) << bit[None, :], axis=1)
        kept_words = tl.sum(tl.reshape(kept, [WORDS, 32]) << bit[None, :], axis=1)
        under_kept = tl.zeros([CHUNK], dtype=tl.int32)
        under_undecided = tl.zeros([CHUNK], dtype=tl.int32)
        for w in range(WORDS):
            row = tl.load(overlap_ptr + (group * WORDS + w) * CHUNK + lane)
            under_kept |= row & tl.sum(tl.where(word == w, kept_words, 0), axis=0)
            under_undecided |= row & tl.sum(tl.where(word == w, undecided_words, 0), axis=0)
        undecided = tl.where(under_kept != 0, 0, undecided)
        newly_kept = tl.where(under_undecided == 0, undecided, 0)
        kept |= newly_kept
        undecided -= newly_kept
        left = tl.sum(undecided, axis=0)

    rank = count + tl.cumsum(kept, axis=0) - 1
    write = (kept != 0) & (rank < max_keep)
    source = group * num_boxes + start + lane
    x1, y1, x2, y2 = load_boxes(boxes_ptr, source, write)
    target = group * max_keep + rank
    tl.store(index_ptr + target, (start + lane).to(tl.int64), mask=write)
    tl.store(kept_ptr + target * 4, x1, mask=write)
    tl.store(kept_ptr + target * 4 + 1, y1, mask=write)
    tl.store(kept_ptr + target * 4 + 2, x2, mask=write)
    tl.store(kept_ptr + target * 4 + 3, y2, mask=write)
    tl.store(count_ptr + group, tl.minimum(count + tl.sum(kept, axis=0), max_keep))


def launch(
    boxes: torch.Tensor,
    valid: torch.Tensor,
    alive: torch.Tensor,
    overlap: torch.Tensor,
    kept: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    *,
    iou_threshold: float,
    config: Config,
) -> None:
    """Append to `index` [groups, max_keep] and `count` [groups], both zero at the start, what `boxes` keep.

    `boxes` [groups, N, 4] and `valid` [groups, N] are in descending priority. `alive` [groups, chunk] int8, `overlap`
    [groups, chunk / 32, chunk] int32 and `kept` [groups, max_keep, 4] fp32 are scratch.
    """
    groups, num_boxes, _ = boxes.shape
    max_keep = index.shape[1]
    # The first axis of a grid is the only one that may be long.
    tiles = groups * (config.chunk // config.block_rows)
    for start in range(0, num_boxes, config.chunk):
        _filter_kernel[(tiles,)](
            boxes_ptr=boxes,
            valid_ptr=valid,
            kept_ptr=kept,
            count_ptr=count,
            alive_ptr=alive,
            num_boxes=num_boxes,
            max_keep=max_keep,
            start=start,
            iou_threshold=iou_threshold,
            CHUNK=config.chunk,
            BLOCK_ROWS=config.block_rows,
            BLOCK_KEPT=config.block_kept,
            enable_fp_fusion=False,
        )
        _overlap_kernel[(tiles, config.chunk // 32)](
            boxes_ptr=boxes,
            count_ptr=count,
            overlap_ptr=overlap,
            num_boxes=num_boxes,
            max_keep=max_keep,
            start=start,
            iou_threshold=iou_threshold,
            CHUNK=config.chunk,
            BLOCK_ROWS=config.block_rows,
            enable_fp_fusion=False,
        )
        _settle_kernel[(groups,)](
            boxes_ptr=boxes,
            overlap_ptr=overlap,
            alive_ptr=alive,
            kept_ptr=kept,
            index_ptr=index,
            count_ptr=count,
            num_boxes=num_boxes,
            max_keep=max_keep,
            start=start,
            CHUNK=config.chunk,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
