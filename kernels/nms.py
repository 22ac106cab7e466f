"""Greedy non-maximum suppression of many groups at once, exact, without a host sync and in few launches.

The boxes of a group come in descending order of priority. The first of them are settled among themselves. Then, step
after step, a wide launch lists the boxes of the step that overlap none of those kept, and these survivors are settled
too. A step ends early where more survive than can be settled at a time. The number of steps is fixed and enough for the
boxes of networks, trained or not; the last launch goes on alone where something is left. Of many groups it does all: a
program for each compares no more boxes than it has to.

To settle boxes, a bit matrix of "overlaps a box of higher priority" is written by many programs. Of one group the last
to arrive, and of several a second launch, decides all boxes, a chunk at a time and in rounds: a box is removed once a
kept box of higher priority overlaps it, and kept once every box of higher priority that overlaps it is removed. Each
round decides at least the first undecided box, and no decision is ever revised, so the result is the greedy one for any
data.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.boxes import load_boxes
from fastdet.kernels.common.nms_decide import append_kept, decide
from fastdet.kernels.common.nms_overlap import are_finite, half_ulp, is_compiled, pack_overlaps, pairwise_exceeds
from fastdet.kernels.nms_filter import launch_filter
from fastdet.kernels.nms_settle import launch_settle


class Config(NamedTuple):
    """Block sizes, all powers of two but `steps`.

    settled: boxes that are settled at a time; 0: none are, and the last launch decides all.
    chunk: boxes that are decided at once, from 32 to `settled`.
    overlap_rows: rows that a program compares with 32 columns, from 32 to `settled`.
    step: rows that a step filters.
    steps: how many steps there are after the first rows.
    filter_rows, filter_kept: rows and kept boxes that a program of the filter compares at a time.
    filter_span: kept boxes that it compares in all.
    warps: of the programs that decide.
    at_once: whether one launch compares and decides, or two.
    finish_rows, finish_kept: boxes that the last launch decides at once, and kept ones that it compares them with at a
        time.
    finish_warps: of its programs.
    """

    settled: int
    chunk: int
    overlap_rows: int
    step: int
    steps: int
    filter_rows: int
    filter_kept: int
    filter_span: int
    warps: int
    at_once: bool
    finish_rows: int
    finish_kept: int
    finish_warps: int


# int32 words a group in `state` of `launch`.
STATE_ROWS = 3
# From so many groups on, one program a group keeps a device busy, and compares the fewest pairs.
MANY_GROUPS = 256


def config(groups: int, num_boxes: int, max_keep: int, chunks: int = 2) -> Config:
    """Sizes for groups of `num_boxes` boxes, of which `chunks` chunks at most are settled at a time.

    The matrix of a chunk has to fit the registers of one program. That of 1024 boxes is 128 words in each of 256
    threads. Where few boxes are wanted, one chunk of half as many keeps enough.
    """
    if groups >= MANY_GROUPS:
        warps = 4 if groups < 4 * MANY_GROUPS and num_boxes > 32 else 2
        return Config(0, 0, 0, 0, 0, 0, 0, 0, 0, False, finish_rows=16 * warps, finish_kept=32, finish_warps=warps)
    few = max_keep <= 512
    chunk = min(max(triton.next_power_of_2(num_boxes), 32), 512 if few else 1024)
    settled = chunk if few or num_boxes <= chunk else chunks * chunk
    left = max(num_boxes - settled, 0)
    step = min(max(triton.next_power_of_2(left), 32), 4096)
    return Config(
        settled,
        chunk,
        # Each program of one group has the registers to decide, so that a device holds some 130 of them at a time.
        overlap_rows=max(chunk // 4, 32) if groups == 1 else min(chunk, 128),
        step=step,
        # Enough to pass all rows where hardly a step ends early, as with the boxes of networks, trained or not.
        steps=min(triton.cdiv(left, step) + max_keep // settled, most_steps(num_boxes, settled, step)),
        filter_rows=min(step, 64),
        filter_kept=64,
        filter_span=256,
        # So few that the words of a row are all in one thread, and its warp need not wait for another to combine them.
        warps=max(chunk // 128, 1),
        at_once=groups == 1,
        finish_rows=128,
        finish_kept=32,
        finish_warps=16,
    )


def most_steps(num_boxes: int, settled: int, step: int) -> int:
    """Steps that are enough for any data: each passes `step` rows or settles `settled`."""
    left = max(num_boxes - settled, 0)
    return triton.cdiv(left, step) + left // settled


@triton.jit(do_not_specialize=["num_boxes", "max_keep"])
def _finish_kernel(
    # Tensors, all contiguous
    boxes_ptr,  # [groups, N, 4] fp32, pixels
    valid_ptr,  # [groups, N] bool
    cursor_ptr,  # [groups] int32, the first row that is not decided; not read if FIRST
    kept_ptr,  # [groups, max_keep, 4] fp32, pixels, appended to
    index_ptr,  # [groups, max_keep] int64, appended to; filled up with 0 if FIRST
    count_ptr,  # [groups] int64, updated; not read if FIRST
    # Sizes
    num_boxes,
    max_keep,
    # Scalars
    iou_threshold,
    half_ulp,
    # Constexprs
    ROWS: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    FIRST: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Go on from `cursor`, ROWS boxes at a time, until all are decided or `max_keep` are kept.

    If FIRST, begin with the first row; else mostly nothing is left.

                   ROWS
                 +-------+                +-------+
    BLOCK_KEPT   |  any  |    then   32   |       |   the ROWS among themselves     program (group)
        ...      |overlap|           32   |       |
                 +-------+                +-------+
    """
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, ROWS)
    if FIRST:
        count = tl.full([], 0, dtype=tl.int64)
        start = 0
    else:
        count = tl.load(count_ptr + group)
        start = tl.load(cursor_ptr + group)
    while (start < num_boxes) & (count < max_keep):
        row = start + lane
        source = group * num_boxes + row
        eligible = (row < num_boxes) & (tl.load(valid_ptr + source, mask=row < num_boxes, other=0) != 0)
        x1, y1, x2, y2 = load_boxes(boxes_ptr, source, eligible)
        eligible &= are_finite(x1, y1, x2, y2)
        overlaps = tl.zeros([BLOCK_KEPT, ROWS], dtype=tl.int32)
        for first in range(0, count, BLOCK_KEPT):
            kept = first + tl.arange(0, BLOCK_KEPT)
            kx1, ky1, kx2, ky2 = load_boxes(kept_ptr, group * max_keep + kept, kept < count)
            overlaps |= pairwise_exceeds(
                kx1, ky1, kx2, ky2, x1, y1, x2, y2, iou_threshold, half_ulp, FUSED
            ).to(tl.int32)  # fmt: skip
        undecided = (eligible & (tl.max(overlaps, axis=0) == 0)).to(tl.int32)
        words = tl.arange(0, ROWS // 32)
        higher = tl.zeros([ROWS, ROWS // 32], dtype=tl.int32)
        for word in range(0, ROWS // 32):
            column = word * 32 + tl.arange(0, 32)
            # Boxes that are not valid overlap others, but are never undecided nor kept.
            cx1, cy1, cx2, cy2 = load_boxes(boxes_ptr, group * num_boxes + start + column, start + column < num_boxes)
            packed = pack_overlaps(cx1, cy1, cx2, cy2, column, x1, y1, x2, y2, lane, iou_threshold, half_ulp, FUSED)
            higher += tl.where(words[None, :] == word, packed[:, None], 0)
        decided = decide(higher.to(tl.uint32, bitcast=True), undecided)
        count = append_kept(
            kept_ptr + group * max_keep * 4, index_ptr + group * max_keep, count, max_keep, decided, row, x1, y1, x2, y2
        )
        # The boxes just kept are read in the next round, by all threads.
        tl.debug_barrier()
        start += ROWS
    if FIRST:
        for first in range(0, max_keep, ROWS):
            slot = first + lane
            zeros = tl.zeros([ROWS], dtype=tl.int64)
            tl.store(index_ptr + group * max_keep + slot, zeros, mask=(slot >= count) & (slot < max_keep))
    tl.store(count_ptr + group, count)


def launch(
    boxes: torch.Tensor,
    valid: torch.Tensor,
    survivors: torch.Tensor,
    overlap: torch.Tensor,
    removed: torch.Tensor,
    state: torch.Tensor,
    kept: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    *,
    iou_threshold: float,
    config: Config,
) -> None:
    """Write to `index` [groups, max_keep], padded with 0, and `count` [groups] what `boxes` keep.

    `boxes` [groups, N, 4] and `valid` [groups, N] are in descending priority, `iou_threshold` an fp32 number. Scratch:
    `survivors` [groups, settled] int32, `overlap` [groups, settled / 32, settled] int32, `removed` [groups, step]
    int8, `state` [STATE_ROWS, groups] int32 of which the first row is 0, `kept` [groups, max_keep, 4] fp32.
    """
    groups, num_boxes, _ = boxes.shape
    max_keep = index.shape[1]
    arrivals, cursor, number = state.unbind()
    for step in range(config.steps + 1 if config.settled else 0):
        if step:
            launch_filter(
                boxes, valid, kept, count, removed, cursor, survivors, number, arrivals,
                most_kept=min(max_keep, step * config.settled), iou_threshold=iou_threshold, rows=config.filter_rows,
                block_kept=config.filter_kept, span=config.filter_span,
            )  # fmt: skip
        launch_settle(
            boxes, valid, survivors, number, overlap, removed, cursor, kept, index, count, arrivals,
            first=step == 0, iou_threshold=iou_threshold, chunk=config.chunk, rows=config.overlap_rows,
            warps=config.warps, at_once=config.at_once,
        )  # fmt: skip
    if not config.settled or config.steps < most_steps(num_boxes, config.settled, config.step):
        _finish_kernel[(groups,)](
            boxes_ptr=boxes,
            valid_ptr=valid,
            cursor_ptr=cursor,
            kept_ptr=kept,
            index_ptr=index,
            count_ptr=count,
            num_boxes=num_boxes,
            max_keep=max_keep,
            iou_threshold=iou_threshold,
            half_ulp=half_ulp(iou_threshold),
            ROWS=config.finish_rows,
            BLOCK_KEPT=config.finish_kept,
            FIRST=not config.settled,
            FUSED=is_compiled(_finish_kernel),
            num_warps=config.finish_warps,
            enable_fp_fusion=False,
        )
