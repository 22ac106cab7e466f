"""The weights of RoI align's samples along each axis, for its gradient.

A bin is the mean of its samples, which are products of rows and columns; so the weight of a cell in a bin is the
product of the weight of the cell's row in the bin's row and that of its column in the bin's column.

Launched with `enable_fp_fusion=False`: a fused multiply-add moves a sample.
"""

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.pyramid import (
    SIZES,
    roi_level,
    scale_arguments,
    select_value,
    size_arguments,
    tile_rows_above,
)
from fastdet.kernels.common.roi_bins import roi_image
from fastdet.kernels.common.roi_samples import bilinear_cells, bin_geometry, sample_position, samples_on_map

# Cells of one bin row or bin column whose weights are summed at once.
BLOCK_W = 32


@triton.jit(do_not_specialize=["num_rois", "num_images", "padded_height", "padded_width", *SIZES])
def _weights_kernel(
    # Tensors, all contiguous
    rois_ptr,  # [R, 5] fp32: image index, x1, y1, x2, y2 in pixels
    images_ptr,  # [R] int32, output: image of each RoI, -1 for padding
    ranges_ptr,  # [2, PH + PW, R] int32, output: first tile row (or column) with a weight; one past the last
    weights_h_ptr,  # [R, PH, padded_height] fp32, output: weight of each row of cells of the RoI's level
    weights_w_ptr,  # [R, PW, padded_width] fp32, output: weight of each column of cells
    # Sizes
    num_rois,
    num_images,
    padded_height,
    padded_width,
    height_0,  # cells of each level
    height_1,
    height_2,
    height_3,
    height_4,
    width_0,
    width_1,
    width_2,
    width_3,
    width_4,
    # Scalars
    scale_0,  # cells per pixel of each level
    scale_1,
    scale_2,
    scale_3,
    scale_4,
    edge_1,  # least area of a RoI of each level after the first, square pixels, ascending
    edge_2,
    edge_3,
    edge_4,
    # Constexprs
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    SAMPLING: tl.constexpr,  # samples per bin along each axis, 0 for adaptive
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The weights of one bin row (or bin column) of one RoI, and the range of tiles that have any.

    Program (RoI and bin row or bin column): PH rows, then PW columns.

    Weights outside the tiles of the range are left unwritten. Tile rows are counted over all levels, which are stacked.
    From bin to bin neither end of the range falls, or, where a box is inverted, neither rises.
    """
    # The program's RoI, axis and bin.
    program = tl.program_id(0)
    roi = program // (POOLED_HEIGHT + POOLED_WIDTH)
    line = program % (POOLED_HEIGHT + POOLED_WIDTH)
    is_row = line < POOLED_HEIGHT
    num_bins = tl.where(is_row, POOLED_HEIGHT, POOLED_WIDTH)
    index = tl.where(is_row, line, line - POOLED_HEIGHT)

    # The RoI's image and level, and its bins along the axis: start and size in cells, samples per bin.
    image = roi_image(rois_ptr, roi, num_images)
    level = roi_level(rois_ptr, roi, edge_1, edge_2, edge_3, edge_4)
    scale = select_value(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    height = select_value(level, height_0, height_1, height_2, height_3, height_4)
    width = select_value(level, width_0, width_1, width_2, width_3, width_4)
    limit = tl.where(is_row, height, width)
    first_of_level = tl.where(is_row, tile_rows_above(level, height_0, height_1, height_2, height_3, TILE), 0)
    start, size, count = bin_geometry(rois_ptr, roi, tl.where(is_row, 2, 1), scale, num_bins, SAMPLING, ALIGNED)

    # The tiles between the first and the last sample (in reverse order where a box is inverted).
    first_sample = sample_position(start, size, index, 0, tl.maximum(count, 1))
    last_sample = sample_position(start, size, index, count - 1, tl.maximum(count, 1))
    lowest = tl.minimum(first_sample, last_sample)
    highest = tl.maximum(first_sample, last_sample)
    on_map = (image >= 0) & (count > 0) & (highest >= -1.0) & (lowest <= limit) & (limit > 0)
    first_cell, _, _, _ = bilinear_cells(lowest, limit)
    _, last_cell, _, _ = bilinear_cells(highest, limit)
    first_tile = tl.where(on_map, first_cell // TILE, 0)
    end_tile = tl.where(on_map, last_cell // TILE + 1, 0)
    range_ptr = ranges_ptr + line.to(tl.int64) * num_rois + roi
    tl.store(range_ptr, first_of_level + first_tile)
    tl.store(range_ptr + (POOLED_HEIGHT + POOLED_WIDTH) * tl.cast(num_rois, tl.int64), first_of_level + end_tile)
    tl.store(images_ptr + roi, image, mask=line == 0)

    # Sum the weights of all samples, BLOCK_W cells at a time.
    row_ptr = weights_h_ptr + (roi.to(tl.int64) * POOLED_HEIGHT + index) * padded_height
    column_ptr = weights_w_ptr + (roi.to(tl.int64) * POOLED_WIDTH + index) * padded_width
    weights_ptr = tl.where(is_row, row_ptr, column_ptr)
    first, last = samples_on_map(start, size, index, count, limit)
    for block in range(first_tile * TILE, end_tile * TILE, BLOCK_W):
        cell = block + tl.arange(0, BLOCK_W)
        weight = tl.zeros([BLOCK_W], tl.float32)
        for sample in range(first, last):
            low, high, high_weight, inside = bilinear_cells(sample_position(start, size, index, sample, count), limit)
            weight += tl.where(cell == low, tl.where(inside, 1.0 - high_weight, 0.0), 0.0)
            weight += tl.where(cell == high, tl.where(inside, high_weight, 0.0), 0.0)
        tl.store(weights_ptr + cell, tl.div_rn(weight, count * 1.0), mask=cell < end_tile * TILE)


def launch_weights(
    rois: torch.Tensor,
    images: torch.Tensor,
    ranges: torch.Tensor,
    weights_h: torch.Tensor,
    weights_w: torch.Tensor,
    *,
    num_images: int,
    sizes: list[tuple[int, int]],
    scales: list[float],
    edges: list[float],
    sampling_ratio: int,
    aligned: bool,
    tile: int,
) -> None:
    """Fill `images` [R], `ranges` [2, PH + PW, R], `weights_h` [R, PH, ..], `weights_w` [R, PW, ..] for `rois` [R, 5].

    `sizes` are (height, width) of each level in cells, `tile` the cells of a tile along each axis.
    """
    num_rois, pooled_height, padded_height = weights_h.shape
    _, pooled_width, padded_width = weights_w.shape
    _weights_kernel[(num_rois * (pooled_height + pooled_width),)](
        rois_ptr=rois,
        images_ptr=images,
        ranges_ptr=ranges,
        weights_h_ptr=weights_h,
        weights_w_ptr=weights_w,
        num_rois=num_rois,
        num_images=num_images,
        padded_height=padded_height,
        padded_width=padded_width,
        **size_arguments(sizes),
        **scale_arguments(scales, edges),
        POOLED_HEIGHT=pooled_height,
        POOLED_WIDTH=pooled_width,
        SAMPLING=max(sampling_ratio, 0),
        ALIGNED=aligned,
        TILE=tile,
        BLOCK_W=BLOCK_W,
        num_warps=1,
        enable_fp_fusion=False,
    )
