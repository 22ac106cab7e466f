"""Non-maximum suppression in one cooperative launch, as `fastdet.kernels.nms` in several. Never run on a GPU yet.

The same blocks do the same work in the same phases. A grid barrier between two phases stands for the end of a launch,
so the programs know what is left after each step and go on until nothing is: no step is launched in vain.

    first rows | filter | settle | filter | settle | ...    programs go through their blocks of a phase side by side,
               B        B        B        B        B         and wait for each other at each B

Programs that wait for each other have to run at the same time, so there are no more of them than the GPU holds.
"""

import torch
import triton
import triton.language as tl

from fastdet.kernels import nms
from fastdet.kernels.common.nms_overlap import half_ulp, is_compiled
from fastdet.kernels.nms_filter import filter_block
from fastdet.kernels.nms_settle import pairs_of_blocks, settle_block, words_of_pair

# As of `fastdet.kernels.nms`, and two of the barrier.
STATE_ROWS = nms.STATE_ROWS + 2


@triton.jit
def _grid_barrier(
    barrier_ptr,  # int32, 0 or -2^31 before and after
):
    """Return when all programs of the launch have come here; each then sees what any stored before.

    Together they add 2^31, which changes the sign and nothing else: it is seen by all, and the next barrier can start.
    """
    rest = tl.where(tl.program_id(0) == 0, (1 - tl.num_programs(0)) ^ -2147483648, 1)
    # The stores of all threads come before the one that adds.
    tl.debug_barrier()
    before = tl.atomic_add(barrier_ptr, rest, sem="release")
    now = before
    while (now ^ before) >= 0:
        now = tl.atomic_add(barrier_ptr, 0, sem="acquire")
    # The loads of all threads come after the one that saw the sign change.
    tl.debug_barrier()


@triton.jit
def _share(blocks):
    """Begin and end of this program's part of a phase: neighbors, so that who decides one group delays few others."""
    size = tl.cdiv(blocks, tl.num_programs(0))
    begin = tl.program_id(0) * size
    return begin, tl.minimum(begin + size, blocks)


@triton.jit
def _settle_all(
    boxes_ptr,  # all as in the kernel
    valid_ptr,
    survivors_ptr,
    overlap_ptr,
    removed_ptr,
    arrivals_ptr,
    cursor_ptr,
    number_ptr,
    barrier_ptr,
    needed_ptr,
    kept_ptr,
    index_ptr,
    count_ptr,
    groups,
    num_boxes,
    max_keep,
    iou_threshold,
    half_ulp,
    step,  # of which these are the survivors; 0: the first rows
    SETTLED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Settle the survivors of every group. `needed` is above `step` from then on if any group has something left."""
    words: tl.constexpr = words_of_pair(SETTLED, BLOCK_ROWS)
    items: tl.constexpr = pairs_of_blocks(SETTLED, BLOCK_ROWS) * words
    begin, end = _share(groups * items)
    # What depends on the thread alone would else take registers in all phases.
    for item in tl.range(begin, end, disable_licm=True):
        decided = settle_block(
            boxes_ptr, valid_ptr, survivors_ptr, number_ptr, overlap_ptr, removed_ptr, cursor_ptr, kept_ptr, index_ptr,
            count_ptr, arrivals_ptr, num_boxes, max_keep, iou_threshold, half_ulp, item // words, item % words,
            SETTLED, CHUNK, STEP, BLOCK_ROWS, FIRST, True, FUSED,
        )  # fmt: skip
        if decided:
            # One thread has stored what all read.
            tl.debug_barrier()
            group = item // items
            if (tl.load(count_ptr + group) < max_keep) & (tl.load(cursor_ptr + group) < num_boxes):
                # It never shrinks, so that a program which reads it late, in the next step, goes on all the same.
                tl.store(needed_ptr, step + 1)
    _grid_barrier(barrier_ptr)


@triton.jit(do_not_specialize=["groups", "num_boxes", "max_keep"])
def _suppress_kernel(
    # Tensors, all contiguous
    boxes_ptr,  # [groups, N, 4] fp32, pixels
    valid_ptr,  # [groups, N] bool
    survivors_ptr,  # [groups, SETTLED] int32, scratch, as are overlap, removed, cursor, number and kept
    overlap_ptr,  # [groups, SETTLED / 32, SETTLED] int32
    removed_ptr,  # [groups, STEP] int8
    arrivals_ptr,  # [groups] int32, 0 before and after
    cursor_ptr,  # [groups] int32, the first row that is not decided
    number_ptr,  # [groups] int32, survivors to settle
    barrier_ptr,  # int32, 0 or -2^31 before and after
    needed_ptr,  # int32, how many steps are known to be needed; 0 before and after
    kept_ptr,  # [groups, max_keep, 4] fp32, pixels
    index_ptr,  # [groups, max_keep] int64, output
    count_ptr,  # [groups] int64, output
    # Sizes
    groups,
    num_boxes,
    max_keep,
    # Scalars
    iou_threshold,
    half_ulp,
    # Constexprs
    SETTLED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAP_ROWS: tl.constexpr,
    FILTER_ROWS: tl.constexpr,
    FILTER_KEPT: tl.constexpr,
    SPAN: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Suppress in all groups; the programs share the blocks of a phase.

    block 0    ..    k - 1    k     ..   2 k - 1
    +-------+------+-------+-------+----+-------+----
    |       program 0      |      program 1     | ..    (group, rows, columns) of one block of
    +-------+------+-------+-------+----+-------+----   `settle_block` or `filter_block`
    """
    _settle_all(
        boxes_ptr, valid_ptr, survivors_ptr, overlap_ptr, removed_ptr, arrivals_ptr, cursor_ptr, number_ptr,
        barrier_ptr, needed_ptr, kept_ptr, index_ptr, count_ptr, groups, num_boxes, max_keep, iou_threshold, half_ulp,
        0, SETTLED, CHUNK, STEP, OVERLAP_ROWS, True, FUSED,
    )  # fmt: skip
    step = 0
    while tl.load(needed_ptr) > step:
        step += 1
        # No group keeps more than SETTLED a step.
        spans = tl.cdiv(tl.minimum(max_keep, step * SETTLED), SPAN)
        begin, end = _share(groups * (STEP // FILTER_ROWS) * spans)
        for item in tl.range(begin, end, disable_licm=True):
            filter_block(
                boxes_ptr, valid_ptr, kept_ptr, count_ptr, removed_ptr, cursor_ptr, survivors_ptr, number_ptr,
                arrivals_ptr, num_boxes, max_keep, iou_threshold, half_ulp, item // spans, item % spans,
                SETTLED, STEP, FILTER_ROWS, FILTER_KEPT, SPAN, FUSED,
            )  # fmt: skip
        _grid_barrier(barrier_ptr)
        _settle_all(
            boxes_ptr, valid_ptr, survivors_ptr, overlap_ptr, removed_ptr, arrivals_ptr, cursor_ptr, number_ptr,
            barrier_ptr, needed_ptr, kept_ptr, index_ptr, count_ptr, groups, num_boxes, max_keep, iou_threshold,
            half_ulp, step, SETTLED, CHUNK, STEP, OVERLAP_ROWS, False, FUSED,
        )  # fmt: skip
    # All threads of this program have compared it with `step`; those of a slower one stop at 0 too.
    tl.debug_barrier()
    if tl.program_id(0) == 0:
        tl.store(needed_ptr, 0)


def config(groups: int, num_boxes: int, max_keep: int) -> nms.Config:
    """As of the other form, but that the filter has the warps that settle, and as many registers a thread.

    No launch would be saved by settling more than a chunk at a time.
    """
    sizes = nms.config(groups, num_boxes, max_keep, 1)
    if not sizes.settled:
        return sizes
    return sizes._replace(filter_rows=min(8 * sizes.warps, sizes.step), filter_kept=sizes.filter_kept // 2)


def num_programs(groups: int, max_keep: int, config: nms.Config, multiprocessors: int) -> int:
    """How many programs to launch: no more than all fit at the same time, nor than a phase has blocks.

    One always fits a multiprocessor; 16 warps that take 128 registers a thread fill it.
    """
    sizes = config.settled, config.overlap_rows
    settle = pairs_of_blocks(*sizes) * words_of_pair(*sizes)
    filters = config.step // config.filter_rows * triton.cdiv(max_keep, config.filter_span)
    return min(multiprocessors, groups * max(settle, filters))


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
    config: nms.Config,
) -> None:
    """As `fastdet.kernels.nms.launch`, but that `state` is [STATE_ROWS, groups], of which rows 0, 3 and 4 are 0."""
    if boxes.shape[1] <= config.settled:
        # Those are few launches, and their programs need not wait.
        scratch = survivors, overlap, removed, state[:3], kept
        nms.launch(boxes, valid, *scratch, index, count, iou_threshold=iou_threshold, config=config)
        return
    arrivals, cursor, number, barrier, needed = state.unbind()
    # Interpreted, programs run one after another.
    multiprocessors = torch.cuda.get_device_properties(boxes.device).multi_processor_count if boxes.is_cuda else 1
    _suppress_kernel[(num_programs(len(boxes), index.shape[1], config, multiprocessors),)](
        boxes_ptr=boxes,
        valid_ptr=valid,
        survivors_ptr=survivors,
        overlap_ptr=overlap,
        removed_ptr=removed,
        arrivals_ptr=arrivals,
        cursor_ptr=cursor,
        number_ptr=number,
        barrier_ptr=barrier,
        needed_ptr=needed,
        kept_ptr=kept,
        index_ptr=index,
        count_ptr=count,
        groups=boxes.shape[0],
        num_boxes=boxes.shape[1],
        max_keep=index.shape[1],
        iou_threshold=iou_threshold,
        half_ulp=half_ulp(iou_threshold),
        SETTLED=config.settled,
        CHUNK=config.chunk,
        STEP=config.step,
        OVERLAP_ROWS=config.overlap_rows,
        FILTER_ROWS=config.filter_rows,
        FILTER_KEPT=config.filter_kept,
        SPAN=config.filter_span,
        FUSED=is_compiled(_suppress_kernel),
        num_warps=config.warps,
        launch_cooperative_grid=True,
        enable_fp_fusion=False,
    )
