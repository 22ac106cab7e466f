"""RoI align over channels-last levels of a pyramid, all levels in one launch.

Launched with `enable_fp_fusion=False`: a fused multiply-add moves a sample.
"""
# mypy: disable-error-code="assignment, var-annotated"
# (Triton tuples grow in a loop, which Python's types cannot express)

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.pyramid import (
    SIZES,
    arguments_by_level,
    roi_level,
    scale_arguments,
    select_pointer,
    select_value,
    size_arguments,
    sizes_of,
)
from fastdet.kernels.common.roi_bins import roi_image
from fastdet.kernels.common.roi_samples import bilinear_cells, bin_geometry, sample_position, samples_on_map


class Config(NamedTuple):
    """Channels per program, a power of two, and its warps."""

    block_c: int
    num_warps: int


def config(channels: int, itemsize: int) -> Config:
    """16 bytes per thread, of values of `itemsize` bytes, and at most two warps."""
    block = min(triton.next_power_of_2(channels), 256)
    return Config(block, num_warps=max(block * itemsize // 512, 1))


@triton.jit
def _load_cells(
    plane_ptr,  # [BLOCK_C] pointers to cell (0, 0) of a map [H, W, C]
    width,
    channels,
    top,  # rows and columns of the four cells
    bottom,
    left,
    right,
    mask,  # [BLOCK_C] bool
):
    """Features of the cells around a sample, top left, top right, bottom left and bottom right, each [BLOCK_C] fp32."""
    top_row = top.to(tl.int64) * width
    bottom_row = bottom.to(tl.int64) * width
    top_left = tl.load(plane_ptr + (top_row + left) * channels, mask=mask, other=0.0).to(tl.float32)
    top_right = tl.load(plane_ptr + (top_row + right) * channels, mask=mask, other=0.0).to(tl.float32)
    bottom_left = tl.load(plane_ptr + (bottom_row + left) * channels, mask=mask, other=0.0).to(tl.float32)
    bottom_right = tl.load(plane_ptr + (bottom_row + right) * channels, mask=mask, other=0.0).to(tl.float32)
    return top_left, top_right, bottom_left, bottom_right


@triton.jit
def _interpolate(
    cells,  # the four of `_load_cells`
    weight_y,  # weights of the bottom cells and of the right cells
    weight_x,
):
    """Bilinear interpolation, [BLOCK_C] fp32."""
    top = 1.0 - weight_y
    left = 1.0 - weight_x
    return (
        top * left * cells[0] + top * weight_x * cells[1] + weight_y * left * cells[2] + weight_y * weight_x * cells[3]
    )


@triton.jit(do_not_specialize=["num_images", *SIZES])
def _roi_align_kernel(
    # Tensors, all contiguous
    input_0_ptr,  # [B, H, W, C] fp32, fp16 or bf16 (a channels-last [B, C, H, W]) of each level, None past the last
    input_1_ptr,
    input_2_ptr,
    input_3_ptr,
    input_4_ptr,
    rois_ptr,  # [R, 5] fp32: image index, x1, y1, x2, y2 in pixels
    pooled_ptr,  # [R, PH, PW, C] dtype of input, output
    # Sizes
    num_images,
    channels,
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
    BLOCK_C: tl.constexpr,
):
    """One bin of one RoI, for one block of channels.

    +-------+-------+         program (bin of all RoIs, channel block)
    | x   x | x   x |
    |       |       |         Each x is a sample, interpolated between the four cells around it; a bin is the
    | x   x | x   x |         mean of its samples, those off the map counting 0. Up to 2 x 2 samples are
    +-------+-------+         loaded at once, more one after another.
    """
    # The program's bin and channels [BLOCK_C].
    index = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    roi = index // (POOLED_HEIGHT * POOLED_WIDTH)
    bin_row = index // POOLED_WIDTH % POOLED_HEIGHT
    bin_column = index % POOLED_WIDTH

    # The RoI's image and level, and its bins there: start and size in cells, samples per bin.
    image = roi_image(rois_ptr, roi, num_images)
    level = roi_level(rois_ptr, roi, edge_1, edge_2, edge_3, edge_4)
    scale = select_value(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    height = select_value(level, height_0, height_1, height_2, height_3, height_4)
    width = select_value(level, width_0, width_1, width_2, width_3, width_4)
    start_h, size_h, num_h = bin_geometry(rois_ptr, roi, 2, scale, POOLED_HEIGHT, SAMPLING, ALIGNED)
    start_w, size_w, num_w = bin_geometry(rois_ptr, roi, 1, scale, POOLED_WIDTH, SAMPLING, ALIGNED)

    # [BLOCK_C] pointers to cell (0, 0) of the image.
    plane_ptr = select_pointer(level, input_0_ptr, input_1_ptr, input_2_ptr, input_3_ptr, input_4_ptr)
    plane_ptr += tl.maximum(image, 0).to(tl.int64) * height * width * channels + channel
    # A number and not a mask: the interpreter cannot combine a scalar comparison of floats with a block of booleans.
    num_loaded = tl.where(image >= 0, channels, 0)
    total = tl.zeros([BLOCK_C], tl.float32)
    if (SAMPLING == 1) | (SAMPLING == 2):
        # The cells and weights of the sample rows and columns.
        tops, bottoms, weights_y, on_rows = (), (), (), ()
        lefts, rights, weights_x, on_columns = (), (), (), ()
        for sample in tl.static_range(SAMPLING):
            y = sample_position(start_h, size_h, bin_row, sample, num_h)
            top, bottom, weight_y, on_map = bilinear_cells(y, height)
            tops, bottoms = tops + (top,), bottoms + (bottom,)
            weights_y, on_rows = weights_y + (weight_y,), on_rows + (on_map,)
            x = sample_position(start_w, size_w, bin_column, sample, num_w)
            left, right, weight_x, on_map = bilinear_cells(x, width)
            lefts, rights = lefts + (left,), rights + (right,)
            weights_x, on_columns = weights_x + (weight_x,), on_columns + (on_map,)
        # Load the cells of all samples, then sum.
        cells = ()
        for i in tl.static_range(SAMPLING):
            for j in tl.static_range(SAMPLING):
                mask = channel < tl.where(on_rows[i] & on_columns[j], num_loaded, 0)
                cells += (_load_cells(plane_ptr, width, channels, tops[i], bottoms[i], lefts[j], rights[j], mask),)
        for i in tl.static_range(SAMPLING):
            for j in tl.static_range(SAMPLING):
                total += _interpolate(cells[i * SAMPLING + j], weights_y[i], weights_x[j])
    else:
        # Sample after sample, those that may be on the map.
        first_h, last_h = samples_on_map(start_h, size_h, bin_row, num_h, height)
        first_w, last_w = samples_on_map(start_w, size_w, bin_column, num_w, width)
        last_h = tl.where(image < 0, first_h, last_h)
        for row in range(first_h, last_h):
            y = sample_position(start_h, size_h, bin_row, row, num_h)
            top, bottom, weight_y, on_rows = bilinear_cells(y, height)
            for column in range(first_w, last_w):
                x = sample_position(start_w, size_w, bin_column, column, num_w)
                left, right, weight_x, on_columns = bilinear_cells(x, width)
                mask = channel < tl.where(on_rows & on_columns, num_loaded, 0)
                cells = _load_cells(plane_ptr, width, channels, top, bottom, left, right, mask)
                total += _interpolate(cells, weight_y, weight_x)

    # The number of samples as a float: with adaptive bins it may exceed int32.
    mean = tl.div_rn(total, tl.maximum(num_h * 1.0 * num_w, 1.0))
    mean = tl.where(image >= 0, mean, 0.0)  # the weights of a RoI with a NaN corner may be NaN
    out = index.to(tl.int64) * channels + channel
    tl.store(pooled_ptr + out, mean.to(pooled_ptr.dtype.element_ty), mask=inside)


def launch(
    features: list[torch.Tensor],
    rois: torch.Tensor,
    pooled: torch.Tensor,
    *,
    scales: list[float],
    edges: list[float],
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Fill `pooled` [R, C, PH, PW] for `features`, levels [B, C, H, W], all channels-last, and `rois` [R, 5].

    `edges` are the least areas of the levels after the first, in square pixels.
    """
    num_rois, channels, pooled_height, pooled_width = pooled.shape
    block_c, num_warps = config(channels, pooled.element_size())
    _roi_align_kernel[(num_rois * pooled_height * pooled_width, triton.cdiv(channels, block_c))](
        **arguments_by_level("input_{}_ptr", features, None),
        rois_ptr=rois,
        pooled_ptr=pooled,
        num_images=len(features[0]),
        channels=channels,
        **size_arguments(sizes_of(features)),
        **scale_arguments(scales, edges),
        POOLED_HEIGHT=pooled_height,
        POOLED_WIDTH=pooled_width,
        SAMPLING=max(sampling_ratio, 0),
        ALIGNED=aligned,
        BLOCK_C=block_c,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
