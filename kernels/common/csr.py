"""Which bins of which regions of interest reach which place of a map: lists that no two programs share.

A place is a cell or a tile of cells, and the bins that reach a row of places are neighbours; so are those that reach a
column. From these spans each program finds its own part of one CSR array, without waiting for another.
"""

import torch
import triton
import triton.language as tl

BLOCK_R = 128
# RoIs that are looked through at once for those of one image.
BLOCK_EXTENT = 512


@triton.jit
def _spans_kernel(
    ranges_ptr,
    spans_ptr,
    num_rois,
    height,
    width,
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """How the bins of each RoI lie along each axis, so that the programs of the next kernel need not walk them.

    Program (block of RoIs, position): positions 0 .. H are rows of places, H + 1 .. H + W + 1 columns.

    ranges_ptr [2, PH + PW, R]: int32, contiguous; [0] is the first place of a bin row or bin column, [1] is one past
        its last. Neither ever falls, or neither ever rises, from bin to bin.
    spans_ptr [2, H + W + 2, R]: int32, contiguous. [0, p]: places that the bins have before position p, each bin
        counted by itself; [1, p]: the first bin at p, if there is one. Bins at p: [0, p + 1] - [0, p].
    """
    lane = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = lane < num_rois
    line = tl.program_id(1)
    is_row = line <= height
    position = tl.where(is_row, line, line - height - 1)
    num_bins = tl.where(is_row, POOLED_HEIGHT, POOLED_WIDTH)
    axis = tl.where(is_row, 0, POOLED_HEIGHT)

    before = tl.zeros([BLOCK_R], tl.int32)
    first = tl.zeros([BLOCK_R], tl.int32) + num_bins
    for index in range(0, num_bins):
        place = (axis + index).to(tl.int64) * num_rois + lane
        low = tl.load(ranges_ptr + place, mask=mask, other=0)
        high = tl.load(ranges_ptr + (POOLED_HEIGHT + POOLED_WIDTH) * tl.cast(num_rois, tl.int64) + place, mask, other=0)
        before += tl.minimum(tl.maximum(position - low, 0), high - low)
        first = tl.minimum(first, tl.where((low <= position) & (position < high), index, num_bins))

    out = line.to(tl.int64) * num_rois + lane
    tl.store(spans_ptr + out, before, mask=mask)
    tl.store(spans_ptr + tl.num_programs(1).to(tl.int64) * num_rois + out, first, mask=mask)


@triton.jit
def _at(spans_ptr, line, num_rois, roi, mask):
    return tl.load(spans_ptr + tl.cast(line, tl.int64) * num_rois + roi, mask=mask, other=0)


@triton.jit
def _extents_kernel(
    images_ptr,
    spans_ptr,
    extents_ptr,
    num_rois,
    height,
    width,
    BLOCK_R: tl.constexpr,
):
    """Where the RoIs of one image lie and how long its lists are, so that its places need not look at the others.

    Program (image).

    images_ptr [R]: int32, the image of each RoI, -1 for padding.
    spans_ptr [2, H + W + 2, R]: int32, contiguous, as above.
    extents_ptr [B, 3]: int64, the first RoI of the image, one past its last, and its (bin, place of that bin). RoIs of
        other images may lie between.
    """
    image = tl.program_id(0)
    low = tl.zeros([BLOCK_R], tl.int32) + num_rois
    high = tl.zeros([BLOCK_R], tl.int32)
    count = tl.zeros([BLOCK_R], tl.int64)
    for first in range(0, num_rois, BLOCK_R):
        roi = first + tl.arange(0, BLOCK_R)
        mine = tl.load(images_ptr + roi, mask=roi < num_rois, other=-1) == image
        rows = _at(spans_ptr, height, num_rois, roi, mine).to(tl.int64)
        count += rows * _at(spans_ptr, height + 1 + width, num_rois, roi, mine)
        low = tl.minimum(low, tl.where(mine, roi, num_rois))
        high = tl.maximum(high, tl.where(mine, roi + 1, 0))
    extent_ptr = extents_ptr + image.to(tl.int64) * 3
    tl.store(extent_ptr, tl.min(low, axis=0).to(tl.int64))
    tl.store(extent_ptr + 1, tl.max(high, axis=0).to(tl.int64))
    tl.store(extent_ptr + 2, tl.sum(count, axis=0))


@triton.jit
def _visits_kernel(
    images_ptr,
    extents_ptr,
    spans_ptr,
    bounds_ptr,
    visits_ptr,
    num_rois,
    height,
    width,
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The bins that reach one place, in ascending order: one list of a CSR array that no two programs share.

    Program (place of all images). Where its list begins follows from extents and spans, so programs need not wait for
    each other:  all bins of earlier images  +  the rows above this one  +  this row, left of the place.

    images_ptr [R]: int32, the image of each RoI, -1 for padding.
    extents_ptr [B, 3]: as the extents kernel wrote them; None where there is one image.
    spans_ptr [2, H + W + 2, R]: int32, contiguous. [0, p]: places that the bins have before position p; [1, p]: the
        first bin at p, if there is one. Positions 0 .. H are rows of places, H + 1 .. H + W + 1 columns.
    bounds_ptr [B * H * W, 2]: int64, where the list of a place begins and ends.
    visits_ptr [as many as the lists may hold]: int32, (roi * PH + bin row) * PW + bin column.
    """
    place = tl.program_id(0)
    image = place // (height * width)
    row = place // width % height
    column = height + 1 + place % width
    right = height + 1 + width
    num_lines = height + width + 2

    low = 0
    high = num_rois
    ahead = tl.zeros([BLOCK_R], tl.int64)
    if extents_ptr is not None:
        extent_ptr = extents_ptr + image.to(tl.int64) * 3
        # From a whole block on, so that a thread loads its images in one.
        low = tl.load(extent_ptr).to(tl.int32) // BLOCK_R * BLOCK_R
        high = tl.load(extent_ptr + 1).to(tl.int32)
        for first in range(0, image, BLOCK_R):
            earlier = first + tl.arange(0, BLOCK_R)
            ahead += tl.load(extents_ptr + earlier.to(tl.int64) * 3 + 2, mask=earlier < image, other=0)

    for first in range(low, high, BLOCK_R):
        roi = first + tl.arange(0, BLOCK_R)
        mine = tl.load(images_ptr + roi, mask=roi < num_rois, other=-1) == image
        rows = _at(spans_ptr, row, num_rois, roi, mine).to(tl.int64)
        here = _at(spans_ptr, row + 1, num_rois, roi, mine) - rows
        columns = _at(spans_ptr, right, num_rois, roi, mine)
        before = _at(spans_ptr, column, num_rois, roi, mine)
        ahead += rows * columns + here * before

    at = tl.sum(ahead, axis=0)
    tl.store(bounds_ptr + place.to(tl.int64) * 2, at)
    for first in range(low, high, BLOCK_R):
        roi = first + tl.arange(0, BLOCK_R)
        mine = tl.load(images_ptr + roi, mask=roi < num_rois, other=-1) == image
        tall = _at(spans_ptr, row + 1, num_rois, roi, mine) - _at(spans_ptr, row, num_rois, roi, mine)
        wide = _at(spans_ptr, column + 1, num_rois, roi, mine) - _at(spans_ptr, column, num_rois, roi, mine)
        count = tall * wide
        top = _at(spans_ptr, num_lines + row, num_rois, roi, mine)
        left = _at(spans_ptr, num_lines + column, num_rois, roi, mine)
        corner = (roi * POOLED_HEIGHT + top) * POOLED_WIDTH + left
        wide = tl.maximum(wide, 1)
        mine_ptr = visits_ptr + at + (tl.cumsum(count, axis=0) - count)
        for k in range(0, tl.max(count, axis=0)):
            tl.store(mine_ptr + k, corner + k // wide * POOLED_WIDTH + k % wide, mask=k < count)
        at += tl.sum(count, axis=0)
    tl.store(bounds_ptr + place.to(tl.int64) * 2 + 1, at)


def launch_spans(ranges: torch.Tensor, spans: torch.Tensor, *, grid: tuple[int, int], pooled: tuple[int, int]) -> None:
    """Fill `spans` [2, H + W + 2, R] from `ranges` [2, PH + PW, R]; `grid` is (H, W), `pooled` (PH, PW)."""
    num_rois = ranges.shape[2]
    _spans_kernel[(triton.cdiv(num_rois, BLOCK_R), sum(grid) + 2)](
        ranges_ptr=ranges,
        spans_ptr=spans,
        num_rois=num_rois,
        height=grid[0],
        width=grid[1],
        POOLED_HEIGHT=pooled[0],
        POOLED_WIDTH=pooled[1],
        BLOCK_R=BLOCK_R,
        enable_fp_fusion=False,
    )


def launch_visits(
    images: torch.Tensor,
    extents: torch.Tensor,
    spans: torch.Tensor,
    bounds: torch.Tensor,
    visits: torch.Tensor,
    *,
    grid: tuple[int, int],
    pooled: tuple[int, int],
) -> None:
    """Fill `bounds` [B * H * W, 2] and `visits` from `images` [R] and `spans` [2, H + W + 2, R].

    Scratch: `extents` [B, 3], int64.
    """
    num_images = len(extents)
    if num_images > 1:
        _extents_kernel[(num_images,)](
            images_ptr=images,
            spans_ptr=spans,
            extents_ptr=extents,
            num_rois=len(images),
            height=grid[0],
            width=grid[1],
            BLOCK_R=BLOCK_EXTENT,
            enable_fp_fusion=False,
        )
    _visits_kernel[(len(bounds),)](
        images_ptr=images,
        extents_ptr=extents if num_images > 1 else None,
        spans_ptr=spans,
        bounds_ptr=bounds,
        visits_ptr=visits,
        num_rois=len(images),
        height=grid[0],
        width=grid[1],
        POOLED_HEIGHT=pooled[0],
        POOLED_WIDTH=pooled[1],
        BLOCK_R=BLOCK_R,
        num_warps=1,
        enable_fp_fusion=False,
    )
