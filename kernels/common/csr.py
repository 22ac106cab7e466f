"""For every grid cell, the list of (RoI, bin) pairs whose bin reaches it, as a CSR array: the visits of the cell.

A grid cell is a tile of feature cells. The bins of a RoI that reach a row of grid cells are consecutive, and so are
those that reach a column. From these spans every program finds its own offset into the CSR array, without
communication between programs.
"""

import torch
import triton
import triton.language as tl

# RoIs of a block.
BLOCK_R = 128
# RoIs of a block of the extents kernel, each program of which reads the images of all RoIs.
BLOCK_EXTENT = 512


@triton.jit(do_not_specialize=["num_rois", "height", "width"])
def _spans_kernel(
    # Tensors, all contiguous
    ranges_ptr,  # [2, PH + PW, R] int32: first grid row (or column) of a bin row (or column); one past the last
    spans_ptr,  # [2, H + W + 2, R] int32, output
    # Sizes
    num_rois,
    height,
    width,
    # Constexprs
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """How the bins of each RoI lie along each axis, so that the programs of the next kernels need not walk the bins.

    Program (line and block of RoIs): lines 0 .. H are positions in rows of grid cells, H + 1 .. H + W + 1 in columns.

    spans[0, p] is the number of (bin, grid cell of that bin) pairs along the axis before position p, so that
    spans[0, p + 1] - spans[0, p] bins reach p; spans[1, p] is the first bin at p, if there is one. From bin to bin the
    ranges either never fall or never rise.
    """
    num_blocks = tl.cdiv(num_rois, BLOCK_R)
    line = tl.program_id(0) // num_blocks
    roi = tl.program_id(0) % num_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = roi < num_rois
    # The line's axis, its position along it, and the axis's first line in `ranges`.
    is_row = line <= height
    position = tl.where(is_row, line, line - height - 1)
    num_bins = tl.where(is_row, POOLED_HEIGHT, POOLED_WIDTH)
    first_line = tl.where(is_row, 0, POOLED_HEIGHT)

    # Count the grid cells before the position, bin after bin.
    num_before = tl.zeros([BLOCK_R], tl.int32)
    first_bin = tl.zeros([BLOCK_R], tl.int32) + num_bins
    for index in range(0, num_bins):
        offset = (first_line + index).to(tl.int64) * num_rois + roi
        low = tl.load(ranges_ptr + offset, mask=mask, other=0)
        high = tl.load(
            ranges_ptr + (POOLED_HEIGHT + POOLED_WIDTH) * tl.cast(num_rois, tl.int64) + offset, mask, other=0
        )
        num_before += tl.minimum(tl.maximum(position - low, 0), high - low)
        first_bin = tl.minimum(first_bin, tl.where((low <= position) & (position < high), index, num_bins))

    out = line.to(tl.int64) * num_rois + roi
    tl.store(spans_ptr + out, num_before, mask=mask)
    num_lines = (height + width + 2).to(tl.int64)
    tl.store(spans_ptr + num_lines * num_rois + out, first_bin, mask=mask)


@triton.jit
def _load_span(spans_ptr, line, num_rois, roi, mask):
    """int32 [BLOCK_R] of one line of `spans`, 0 where masked."""
    return tl.load(spans_ptr + tl.cast(line, tl.int64) * num_rois + roi, mask=mask, other=0)


@triton.jit(do_not_specialize=["num_rois", "height", "width"])
def _extents_kernel(
    # Tensors, all contiguous
    images_ptr,  # [R] int32, image of each RoI, -1 for padding
    spans_ptr,  # [2, H + W + 2, R] int32, from the spans kernel
    extents_ptr,  # [B, 3] int64, output: first RoI, one past the last, and number of visits of each image
    # Sizes
    num_rois,
    height,
    width,
    # Constexprs
    BLOCK_R: tl.constexpr,
):
    """The range of RoIs of one image, and the length of its lists, so that its grid cells need not read the others.

    Program (image). RoIs of other images may lie inside the range.
    """
    image = tl.program_id(0)
    low = tl.zeros([BLOCK_R], tl.int32) + num_rois
    high = tl.zeros([BLOCK_R], tl.int32)
    count = tl.zeros([BLOCK_R], tl.int64)
    for first in range(0, num_rois, BLOCK_R):
        roi = first + tl.arange(0, BLOCK_R)
        in_image = tl.load(images_ptr + roi, mask=roi < num_rois, other=-1) == image
        # The visits of a RoI: those along rows times those along columns.
        row_visits = _load_span(spans_ptr, height, num_rois, roi, in_image).to(tl.int64)
        count += row_visits * _load_span(spans_ptr, height + 1 + width, num_rois, roi, in_image)
        low = tl.minimum(low, tl.where(in_image, roi, num_rois))
        high = tl.maximum(high, tl.where(in_image, roi + 1, 0))
    extent_ptr = extents_ptr + image.to(tl.int64) * 3
    tl.store(extent_ptr, tl.min(low, axis=0).to(tl.int64))
    tl.store(extent_ptr + 1, tl.max(high, axis=0).to(tl.int64))
    tl.store(extent_ptr + 2, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["num_rois", "height", "width"])
def _visits_kernel(
    # Tensors, all contiguous
    images_ptr,  # [R] int32, image of each RoI, -1 for padding
    extents_ptr,  # [B, 3] int64, from the extents kernel; None where there is one image
    spans_ptr,  # [2, H + W + 2, R] int32, from the spans kernel
    bounds_ptr,  # [B * H * W, 2] int64, output: begin and end of each grid cell's list in visits
    visits_ptr,  # [upper bound of all lists] int32, output: (roi * PH + bin row) * PW + bin column
    # Sizes
    num_rois,
    height,
    width,
    # Constexprs
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The bins that reach one grid cell, in ascending order: one list of a CSR array, written by one program.

    Program (grid cell of all images). Where its list begins follows from extents and spans alone:
    all visits of earlier images  +  those of the rows above this one  +  those of this row, left of the cell.
    """
    cell = tl.program_id(0)
    # The lines of `spans` at the cell's row, at its column, and at the end of all columns.
    image = cell // (height * width)
    row = cell // width % height
    column = height + 1 + cell % width
    end_of_columns = height + 1 + width
    num_lines = height + width + 2

    # The range of RoIs of the image, and the visits of earlier images.
    low = 0
    high = num_rois
    num_before = tl.zeros([BLOCK_R], tl.int64)
    if extents_ptr is not None:
        extent_ptr = extents_ptr + image.to(tl.int64) * 3
        # Aligned to a block, so that the loads of `images` are vectorized.
        low = tl.load(extent_ptr).to(tl.int32) // BLOCK_R * BLOCK_R
        high = tl.load(extent_ptr + 1).to(tl.int32)
        for first in range(0, image, BLOCK_R):
            earlier = first + tl.arange(0, BLOCK_R)
            num_before += tl.load(extents_ptr + earlier.to(tl.int64) * 3 + 2, mask=earlier < image, other=0)

    # Add the visits of the image's earlier cells.
    for first in range(low, high, BLOCK_R):
        roi = first + tl.arange(0, BLOCK_R)
        in_image = tl.load(images_ptr + roi, mask=roi < num_rois, other=-1) == image
        rows_above = _load_span(spans_ptr, row, num_rois, roi, in_image).to(tl.int64)
        bin_rows = _load_span(spans_ptr, row + 1, num_rois, roi, in_image) - rows_above
        all_columns = _load_span(spans_ptr, end_of_columns, num_rois, roi, in_image)
        columns_left = _load_span(spans_ptr, column, num_rois, roi, in_image)
        num_before += rows_above * all_columns + bin_rows * columns_left
    offset = tl.sum(num_before, axis=0)
    tl.store(bounds_ptr + cell.to(tl.int64) * 2, offset)

    # Write the list, RoI after RoI.
    for first in range(low, high, BLOCK_R):
        roi = first + tl.arange(0, BLOCK_R)
        in_image = tl.load(images_ptr + roi, mask=roi < num_rois, other=-1) == image
        # The block of bins of each RoI that reaches the cell: its size and its first bin.
        bin_rows = _load_span(spans_ptr, row + 1, num_rois, roi, in_image) - _load_span(
            spans_ptr, row, num_rois, roi, in_image
        )
        bin_columns = _load_span(spans_ptr, column + 1, num_rois, roi, in_image) - _load_span(
            spans_ptr, column, num_rois, roi, in_image
        )
        count = bin_rows * bin_columns
        top = _load_span(spans_ptr, num_lines + row, num_rois, roi, in_image)
        left = _load_span(spans_ptr, num_lines + column, num_rois, roi, in_image)
        first_bin = (roi * POOLED_HEIGHT + top) * POOLED_WIDTH + left
        # The k-th bin of every RoI at a time, each to its part of the list.
        bin_columns = tl.maximum(bin_columns, 1)
        list_ptrs = visits_ptr + offset + (tl.cumsum(count, axis=0) - count)  # [BLOCK_R]
        for k in range(0, tl.max(count, axis=0)):
            tl.store(list_ptrs + k, first_bin + k // bin_columns * POOLED_WIDTH + k % bin_columns, mask=k < count)
        offset += tl.sum(count, axis=0)
    tl.store(bounds_ptr + cell.to(tl.int64) * 2 + 1, offset)


def launch_spans(ranges: torch.Tensor, spans: torch.Tensor, *, grid: tuple[int, int], pooled: tuple[int, int]) -> None:
    """Fill `spans` [2, H + W + 2, R] from `ranges` [2, PH + PW, R]; `grid` is (H, W), `pooled` (PH, PW)."""
    num_rois = ranges.shape[2]
    # Lines and blocks share the first axis of the grid, the only one that is not limited to 65535.
    _spans_kernel[((sum(grid) + 2) * triton.cdiv(num_rois, BLOCK_R),)](
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
