"""What the kernels of non-maximum suppression keep of some boxes, decided from the bits of their overlaps."""
# mypy: disable-error-code="assignment"
# (Triton tuples grow in a loop, which Python's types cannot express)

import triton
import triton.language as tl

from fastdet.kernels.common.boxes import load_boxes, store_rows_of_4
from fastdet.kernels.common.nms_overlap import are_finite


@triton.jit
def _bitwise_or_both(a, b, c, d):
    return a | c, b | d


@triton.jit
def pack_bits(bits):
    """int32 [N / 32], of which bit c of word w is bit 32 w + c of [N] int32, each 0 or 1."""
    return tl.sum(tl.reshape(bits, [bits.shape[0] // 32, 32]) << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def decide(
    higher,  # [N, N / 32] uint32: bit c of word w is set if box 32 w + c overlaps the row's and has a higher priority
    undecided,  # [N] int32, 1 for the boxes to decide, 0 for the others
):
    """int32 [N], 1 for the boxes that are kept. Each round meets every row with the packed states of all boxes: kept
    ones remove it, undecided ones hold it back."""
    words: tl.constexpr = higher.shape[1]
    kept = undecided * 0
    left = tl.sum(undecided, axis=0)
    while left > 0:
        # Both states of 32 boxes are packed into one word, for one exchange between the threads. `pack_bits` would do
        # it too, in a layout that takes 30 registers more.
        states = tl.reshape(kept.to(tl.int64) | (undecided.to(tl.int64) << 32), [1, words, 32])
        packed = tl.sum(states << tl.arange(0, 32)[None, None, :], axis=2).to(tl.uint64, bitcast=True)
        overlaps_kept, overlaps_undecided = tl.reduce(
            (higher & packed.to(tl.uint32), higher & (packed >> 32).to(tl.uint32)), 1, _bitwise_or_both
        )
        undecided = tl.where(overlaps_kept != 0, 0, undecided)
        newly_kept = tl.where(overlaps_undecided == 0, undecided, 0)
        kept += newly_kept
        undecided -= newly_kept
        left = tl.sum(undecided, axis=0)
    return kept


@triton.jit
def append_kept(
    kept_ptr,  # [max_keep, 4] fp32, pixels, of the group
    index_ptr,  # [max_keep] int64, of the group
    count,  # int64, boxes kept before
    max_keep,
    kept,  # [N] int32, 1 for the boxes to append
    row,  # [N], their index
    x1,  # [N] fp32, pixels, as are y1, x2 and y2
    y1,
    x2,
    y2,
):
    """Append the kept boxes in order of priority; the number of boxes kept, int64."""
    rank = count + tl.cumsum(kept, axis=0) - 1
    write = (kept != 0) & (rank < max_keep)
    tl.store(index_ptr + rank, row.to(tl.int64), mask=write)
    store_rows_of_4(kept_ptr, rank, x1, y1, x2, y2, write)
    return tl.minimum(count + tl.sum(kept, axis=0), max_keep)


@triton.jit
def load_candidates(
    boxes_ptr,  # as in `decide_group`
    valid_ptr,
    survivors_ptr,
    group,
    lane,  # [N], places among the survivors
    num_boxes,
    number,
    SETTLED: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Index, eligibility and corners [N] of survivors; those that are not eligible overlap nothing."""
    if FIRST:
        row = lane
        eligible = row < num_boxes
        eligible &= tl.load(valid_ptr + group * num_boxes + row, mask=eligible, other=0) != 0
    else:
        eligible = lane < number
        row = tl.load(survivors_ptr + group * SETTLED + lane, mask=eligible, other=0)
    x1, y1, x2, y2 = load_boxes(boxes_ptr, group * num_boxes + row, eligible)
    return row, eligible & are_finite(x1, y1, x2, y2), x1, y1, x2, y2


@triton.jit
def decide_group(
    # Tensors, all contiguous
    boxes_ptr,  # [groups, N, 4] fp32, pixels
    valid_ptr,  # [groups, N] bool
    survivors_ptr,  # [groups, SETTLED] int32, rows, from the filter; not read if FIRST
    number_ptr,  # [groups] int32, survivors; set to 0
    overlap_ptr,  # [groups, SETTLED / 32, SETTLED] int32: bit c of word w of a row is set if survivor 32 w + c has a
    # higher priority and overlaps it
    removed_ptr,  # [groups, STEP] int8, set to 0 if FIRST
    cursor_ptr,  # [groups] int32, set to SETTLED if FIRST
    kept_ptr,  # [groups, max_keep, 4] fp32, pixels, appended to
    index_ptr,  # [groups, max_keep] int64, appended to; filled up with 0 if FIRST
    count_ptr,  # [groups] int64, kept boxes, updated; not read if FIRST
    # Sizes
    num_boxes,
    number,
    max_keep,
    group,
    # Constexprs
    SETTLED: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Decide the survivors of a group, a chunk at a time, and append what is kept.

                 word of 32 columns
               +-------+-------+
    CHUNK rows |   d   |       |     d: decided in rounds, read into registers, one row a box
               +-------+-------+     k: met with the bits of the boxes that are kept of an earlier chunk
    CHUNK rows |   k   |   d   |
               +-------+-------+
    """
    WORDS: tl.constexpr = CHUNK // 32
    lane = tl.arange(0, CHUNK)
    word = tl.arange(0, WORDS)[None, :]
    overlap_ptr += group * (SETTLED // 32 * SETTLED)
    if FIRST:
        count = tl.full([], 0, dtype=tl.int64)
    else:
        count = tl.load(count_ptr + group)
    kept_bits = ()
    for chunk in tl.static_range(SETTLED // CHUNK):
        place = chunk * CHUNK + lane
        row, eligible, x1, y1, x2, y2 = load_candidates(
            boxes_ptr, valid_ptr, survivors_ptr, group, place, num_boxes, number, SETTLED, FIRST
        )
        undecided = (eligible & (count < max_keep)).to(tl.int32)
        for earlier in tl.static_range(chunk):
            words = overlap_ptr + (earlier * WORDS + word) * SETTLED + place[:, None]
            overlaps = tl.load(words, mask=undecided[:, None] != 0, other=0) & kept_bits[earlier][None, :]
            undecided = tl.where(tl.max((overlaps != 0).to(tl.int32), axis=1) != 0, 0, undecided)
        # No words of rows that are decided already, nor words of later boxes.
        words = overlap_ptr + (chunk * WORDS + word) * SETTLED + place[:, None]
        needed = (undecided[:, None] != 0) & (word * 32 < lane[:, None])
        kept = decide(tl.load(words, mask=needed, other=0).to(tl.uint32, bitcast=True), undecided)
        kept_bits += (pack_bits(kept),)
        count = append_kept(
            kept_ptr + group * max_keep * 4, index_ptr + group * max_keep, count, max_keep, kept, row, x1, y1, x2, y2
        )
    tl.store(count_ptr + group, count)
    tl.store(number_ptr + group, 0)
    if FIRST:
        tl.store(cursor_ptr + group, SETTLED)
        tl.store(removed_ptr + group * STEP + tl.arange(0, STEP), tl.zeros([STEP], dtype=tl.int8))
        for first in range(0, max_keep, CHUNK):
            slot = first + lane
            padding = (slot >= count) & (slot < max_keep)
            tl.store(index_ptr + group * max_keep + slot, tl.zeros([CHUNK], dtype=tl.int64), mask=padding)
