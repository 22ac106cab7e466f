"""Greedy non-maximum suppression of many groups at once, exact, without a host sync and in few launches.

The boxes of a group come in descending order of priority. The first chunk of them is settled among itself. Then, step
after step, a wide launch lists the boxes of the step that overlap none of those kept, a chunk at most, and a second
launch settles these. A step ends early where more boxes survive than a chunk holds. The number of steps is fixed and
enough but for data made to defeat it; the last launch goes on alone where something is left.

To settle a chunk, a bit matrix of "overlaps a box of higher priority in the chunk" is written by many programs; the
last of a group to arrive decides all boxes in rounds: a box is removed once a kept box of higher priority overlaps it,
and kept once every box of higher priority that overlaps it is removed. Each round decides at least the first undecided
box, and no decision is ever revised, so the result is the greedy one for any data.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.boxes import load_boxes
from fastdet.kernels.common.nms_overlap import are_finite, half_ulp, is_compiled, pairwise_exceeds
from fastdet.kernels.nms_filter import launch_filter
from fastdet.kernels.nms_settle import append_kept, decide, launch_settle, pack_words


class Config(NamedTuple):
    """Block sizes, all powers of two but `steps`.

    chunk: boxes that are settled at once, at least 32.
    overlap_rows: rows that a program compares with 32 columns.
    step: rows that a step filters.
    steps: how many steps there are after the first chunk.
    filter_rows, filter_kept: rows and kept boxes that a program of the filter compares at a time.
    filter_span: kept boxes that it compares in all.
    warps: of the programs that settle.
    finish_rows: boxes that the last launch settles at once.
    """

    chunk: int
    overlap_rows: int
    step: int
    steps: int
    filter_rows: int
    filter_kept: int
    filter_span: int
    warps: int
    finish_rows: int


# int32 words a group in `state` of `launch`.
STATE_ROWS = 3
# Bytes of the bit matrices of all groups, beyond which chunks become smaller.
MOST_OVERLAP = 64 << 20


def config(groups: int, num_boxes: int, max_keep: int) -> Config:
    """Sizes for groups of `num_boxes` boxes: the matrix of a chunk has to fit the registers of one program.

    That of 1024 boxes is 64 words in each of 512 threads. Of many groups all matrices together are bounded too: there
    the groups keep the device busy, however small their chunks.
    """
    chunk = min(max(triton.next_power_of_2(num_boxes), 32), 1024)
    while chunk > 32 and groups * chunk**2 // 8 > MOST_OVERLAP:
        chunk //= 2
    left = max(num_boxes - chunk, 0)
    step = min(max(triton.next_power_of_2(left), 32), 4096)
    # Steps that pass all rows where each has at most a chunk of survivors; and steps of full chunks that are enough to
    # keep `max_keep` boxes where three in four of those settled are kept.
    passing, keeping = triton.cdiv(left, step), triton.cdiv(4 * max_keep, 3 * chunk)
    return Config(
        chunk,
        overlap_rows=min(chunk, 128),
        step=step,
        steps=min(max(passing, keeping), most_steps(num_boxes, chunk, step)),
        filter_rows=min(step, 64),
        filter_kept=64,
        filter_span=256,
        warps=max(chunk // 64, 1),
        finish_rows=32,
    )


def most_steps(num_boxes: int, chunk: int, step: int) -> int:
    """Steps that are enough for any data: each passes `step` rows or settles a chunk."""
    left = max(num_boxes - chunk, 0)
    return triton.cdiv(left, step) + left // chunk


@triton.jit(do_not_specialize=["num_boxes", "max_keep"])
def _finish_kernel(
    # Tensors, all contiguous
    boxes_ptr,  # [groups, N, 4] fp32, pixels
    valid_ptr,  # [groups, N] bool
    cursor_ptr,  # [groups] int32, the first row that is not decided
    kept_ptr,  # [groups, max_keep, 4] fp32, pixels, appended to
    index_ptr,  # [groups, max_keep] int64, appended to
    count_ptr,  # [groups] int64, updated
    # Sizes
    num_boxes,
    max_keep,
    # Scalars
    iou_threshold,
    half_ulp,
    # Constexprs
    ROWS: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Go on from `cursor`, ROWS boxes at a time, until all are decided or `max_keep` are kept: mostly at once.

              kept boxes, BLOCK_KEPT at a time      the ROWS among themselves
            +------------+------------+            +------+
    ROWS    |  ->   any overlap   ->  |    then    |      |     program (group)
            +------------+------------+            +------+
    """
    group = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + group)
    start = tl.load(cursor_ptr + group)
    lane = tl.arange(0, ROWS)
    while (start < num_boxes) & (count < max_keep):
        row = start + lane
        source = group * num_boxes + row
        eligible = (row < num_boxes) & (tl.load(valid_ptr + source, mask=row < num_boxes, other=0) != 0)
        x1, y1, x2, y2 = load_boxes(boxes_ptr, source, eligible)
        eligible &= are_finite(x1, y1, x2, y2)
        overlaps = tl.zeros([ROWS, BLOCK_KEPT], dtype=tl.int32)
        for first in range(0, count, BLOCK_KEPT):
            kept = first + tl.arange(0, BLOCK_KEPT)
            kx1, ky1, kx2, ky2 = load_boxes(kept_ptr, group * max_keep + kept, kept < count)
            overlaps |= pairwise_exceeds(
                x1, y1, x2, y2, kx1, ky1, kx2, ky2, iou_threshold, half_ulp, FUSED
            ).to(tl.int32)  # fmt: skip
        undecided = (eligible & (tl.max(overlaps, axis=1) == 0)).to(tl.int32)
        among = pairwise_exceeds(x1, y1, x2, y2, x1, y1, x2, y2, iou_threshold, half_ulp, FUSED)
        among &= lane[None, :] < lane[:, None]
        decided = decide(pack_words(among.to(tl.int32), ROWS), undecided)
        count = append_kept(
            kept_ptr + group * max_keep * 4, index_ptr + group * max_keep, count, max_keep, decided, row, x1, y1, x2, y2
        )
        # The boxes just kept are read in the next round, by all threads.
        tl.debug_barrier()
        start += ROWS
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
    `survivors` [groups, chunk] int32, `overlap` [groups, chunk / 32, chunk] int32, `removed` [groups, step] int8,
    `state` [STATE_ROWS, groups] int32 of which the first row is 0, `kept` [groups, max_keep, 4] fp32.
    """
    groups, num_boxes, _ = boxes.shape
    max_keep = index.shape[1]
    arrivals, cursor, number = state.unbind()
    for step in range(config.steps + 1):
        if step:
            launch_filter(
                boxes, valid, kept, count, removed, cursor, survivors, number, arrivals,
                most_kept=min(max_keep, step * config.chunk), iou_threshold=iou_threshold, rows=config.filter_rows,
                block_kept=config.filter_kept, span=config.filter_span,
            )  # fmt: skip
        launch_settle(
            boxes, valid, survivors, number, overlap, removed, cursor, kept, index, count, arrivals,
            first=step == 0, iou_threshold=iou_threshold, rows=config.overlap_rows,
            warps=config.warps,
        )  # fmt: skip
    if config.steps < most_steps(num_boxes, config.chunk, config.step):
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
            BLOCK_KEPT=config.filter_kept,
            FUSED=is_compiled(_finish_kernel),
            enable_fp_fusion=False,
        )
