"""RoI align over channels-last levels of a pyramid, all levels in one launch.

All of it is meant for kernels launched with `enable_fp_fusion=False`: a fused multiply-add moves a sample.
"""
# mypy: disable-error-code="assignment, var-annotated"
# (a Triton tuple grows, which Python's types do not say)

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.pyramid import SIZES, by_level, geometry, level_of, pick, pick_pointer, sizes_of
from fastdet.kernels.common.roi_bins import image_of
from fastdet.kernels.common.roi_samples import bins_of, cells_of, position, reaching


class Config(NamedTuple):
    """Channels of a program, a power of two, and its warps."""

    block_c: int
    num_warps: int


def config(channels: int, itemsize: int) -> Config:
    """16 bytes a thread, of values of `itemsize` bytes, and two warps at most."""
    block = min(triton.next_power_of_2(channels), 256)
    return Config(block, num_warps=max(block * itemsize // 512, 1))


@triton.jit
def _four_cells(plane_ptr, width, channels, top, bottom, left, right, mask):
    """The features of the cells around a sample, in fp32."""
    upper = top.to(tl.int64) * width
    lower = bottom.to(tl.int64) * width
    first = tl.load(plane_ptr + (upper + left) * channels, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(plane_ptr + (upper + right) * channels, mask=mask, other=0.0).to(tl.float32)
    third = tl.load(plane_ptr + (lower + left) * channels, mask=mask, other=0.0).to(tl.float32)
    fourth = tl.load(plane_ptr + (lower + right) * channels, mask=mask, other=0.0).to(tl.float32)
    return first, second, third, fourth


@triton.jit
def _between(cells, down, across):
    """Between four cells, `down` and `across` of the way from the first to the last."""
    up = 1.0 - down
    back = 1.0 - across
    return up * back * cells[0] + up * across * cells[1] + down * back * cells[2] + down * across * cells[3]


@triton.jit(do_not_specialize=SIZES)
def _roi_align_kernel(
    input_0_ptr,
    input_1_ptr,
    input_2_ptr,
    input_3_ptr,
    input_4_ptr,
    rois_ptr,
    pooled_ptr,
    num_images,
    channels,
    height_0,
    height_1,
    height_2,
    height_3,
    height_4,
    width_0,
    width_1,
    width_2,
    width_3,
    width_4,
    scale_0,
    scale_1,
    scale_2,
    scale_3,
    scale_4,
    edge_1,
    edge_2,
    edge_3,
    edge_4,
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    SAMPLING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One bin of one RoI, for one block of channels.

              +-------+-------+         program (bin of all RoIs, channel block)
              | x   x | x   x |
              |       |       |         Each x is a sample, the mean of the four cells around it weighted by how near
              | x   x | x   x |         they are; a bin is the mean of its samples, those off the map counting 0.
              +-------+-------+         Up to 2 x 2 samples are loaded at once, more one after another.

    input_0_ptr .. input_4_ptr [B, H, W, C]: fp32, fp16 or bf16, contiguous (a channels-last [B, C, H, W]) of the sizes
        height_0 .. and width_0 ..; None past the last level.
    rois_ptr [R, 5]: fp32, image index and corners in pixels, contiguous.
    pooled_ptr [R, PH, PW, C]: the dtype of input, contiguous.
    scale_0 .. scale_4: cells per pixel of each level. edge_1 .. edge_4: the least area in pixels of each level, rising.
    """
    index = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    roi = index // (POOLED_HEIGHT * POOLED_WIDTH)
    bin_row = index // POOLED_WIDTH % POOLED_HEIGHT
    bin_column = index % POOLED_WIDTH

    image = image_of(rois_ptr, roi, num_images)
    level = level_of(rois_ptr, roi, edge_1, edge_2, edge_3, edge_4)
    scale = pick(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    height = pick(level, height_0, height_1, height_2, height_3, height_4)
    width = pick(level, width_0, width_1, width_2, width_3, width_4)
    start_h, size_h, num_h = bins_of(rois_ptr, roi, 2, scale, POOLED_HEIGHT, SAMPLING, ALIGNED)
    start_w, size_w, num_w = bins_of(rois_ptr, roi, 1, scale, POOLED_WIDTH, SAMPLING, ALIGNED)

    plane_ptr = pick_pointer(level, input_0_ptr, input_1_ptr, input_2_ptr, input_3_ptr, input_4_ptr)
    plane_ptr += tl.maximum(image, 0).to(tl.int64) * height * width * channels + channel
    # Not a mask: the interpreter can't join a scalar comparison of floats with a block of booleans.
    known = tl.where(image >= 0, channels, 0)
    total = tl.zeros([BLOCK_C], tl.float32)
    if (SAMPLING == 1) | (SAMPLING == 2):
        tops, bottoms, downs, on_rows = (), (), (), ()
        lefts, rights, acrosses, on_columns = (), (), (), ()
        for sample in tl.static_range(SAMPLING):
            top, bottom, down, on_map = cells_of(position(start_h, size_h, bin_row, sample, num_h), height)
            tops, bottoms, downs, on_rows = tops + (top,), bottoms + (bottom,), downs + (down,), on_rows + (on_map,)
            left, right, across, on_map = cells_of(position(start_w, size_w, bin_column, sample, num_w), width)
            lefts, rights = lefts + (left,), rights + (right,)
            acrosses, on_columns = acrosses + (across,), on_columns + (on_map,)
        cells = ()
        for i in tl.static_range(SAMPLING):
            for j in tl.static_range(SAMPLING):
                mask = channel < tl.where(on_rows[i] & on_columns[j], known, 0)
                cells += (_four_cells(plane_ptr, width, channels, tops[i], bottoms[i], lefts[j], rights[j], mask),)
        for i in tl.static_range(SAMPLING):
            for j in tl.static_range(SAMPLING):
                total += _between(cells[i * SAMPLING + j], downs[i], acrosses[j])
    else:
        first_h, last_h = reaching(start_h, size_h, bin_row, num_h, height)
        first_w, last_w = reaching(start_w, size_w, bin_column, num_w, width)
        last_h = tl.where(image < 0, first_h, last_h)
        for row in range(first_h, last_h):
            y = position(start_h, size_h, bin_row, row, num_h)
            top, bottom, down, on_rows = cells_of(y, height)
            for column in range(first_w, last_w):
                x = position(start_w, size_w, bin_column, column, num_w)
                left, right, across, on_columns = cells_of(x, width)
                mask = channel < tl.where(on_rows & on_columns, known, 0)
                four = _four_cells(plane_ptr, width, channels, top, bottom, left, right, mask)
                total += _between(four, down, across)

    # As a float: adaptive bins have more samples than int32 counts.
    mean = tl.div_rn(total, tl.maximum(num_h * 1.0 * num_w, 1.0))
    mean = tl.where(image >= 0, mean, 0.0)  # the weights of a box with a NaN corner may be NaN
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

    `edges` are the least areas of the second level and those after it.
    """
    num_rois, channels, pooled_height, pooled_width = pooled.shape
    block_c, num_warps = config(channels, pooled.element_size())
    _roi_align_kernel[(num_rois * pooled_height * pooled_width, triton.cdiv(channels, block_c))](
        **by_level("input_{}_ptr", features, None),
        rois_ptr=rois,
        pooled_ptr=pooled,
        num_images=len(features[0]),
        channels=channels,
        **geometry(sizes_of(features), scales, edges),
        POOLED_HEIGHT=pooled_height,
        POOLED_WIDTH=pooled_width,
        SAMPLING=max(sampling_ratio, 0),
        ALIGNED=aligned,
        BLOCK_C=block_c,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
