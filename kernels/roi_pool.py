"""RoI max-pool over channels-last features, and its gradient by owner: no atomics, the same bits on every run.

All of it is meant for kernels launched with `enable_fp_fusion=False`: a fused multiply-add moves the edge of a bin.
"""
# mypy: disable-error-code="assignment, var-annotated"
# (a Triton tuple grows, which Python's types do not say)

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.csr import BLOCK_R, launch_visits
from fastdet.kernels.common.roi_bins import axis_of, edges, image_of

LOWEST = tl.constexpr(-3.4028234663852886e38)


class Config(NamedTuple):
    """Channels of a program, a power of two; cells (of the gradient: bins) that it loads at a time; its warps."""

    block_c: int
    unroll: int
    num_warps: int


def config(channels: int, itemsize: int) -> Config:
    """16 bytes a thread, of values of `itemsize` bytes, and two warps at most.

    Half precision gets one warp: with two of them the compiler waits for each load before the next.
    """
    block = min(triton.next_power_of_2(channels), 256)
    return Config(block, unroll=4, num_warps=max(block * itemsize // 512, 1))


def config_backward(channels: int, itemsize: int) -> Config:
    """As forward, and more at a time: a cell has about 20 bins, up to some hundreds."""
    return config(channels, itemsize)._replace(unroll=8)


def visits_bound(num_rois: int, height: int, width: int, pooled_height: int, pooled_width: int) -> int:
    """No list of (bin, cell of that bin) is longer: neighbouring bins share one row or column at the most."""
    return num_rois * (height + pooled_height - 1) * (width + pooled_width - 1)


@triton.jit
def _roi_pool_kernel(
    input_ptr,
    rois_ptr,
    pooled_ptr,
    argmax_ptr,
    num_images,
    channels,
    height,
    width,
    spatial_scale,
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One bin of one RoI, for one block of channels.

                left    right
              +---+---+---+           program (bin of all RoIs, channel block)
        top   | 0 | 1 | 2 |
              +---+---+---+           Cells in scan order, UNROLL loads of BLOCK_C channels in flight at a time;
              | 3 | 4 | 5 |           each channel keeps the first of its largest values.
      bottom  +---+---+---+

    input_ptr [B, H, W, C]: fp32, fp16 or bf16, contiguous (a channels-last [B, C, H, W]).
    rois_ptr [R, 5]: fp32, image index and corners in pixels, contiguous.
    pooled_ptr [R, PH, PW, C]: the dtype of input, contiguous.
    argmax_ptr [R, PH, PW, C]: int16 or int32, h * W + w in the plane, -1 where nothing was pooled; contiguous.
    """
    index = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    roi = index // (POOLED_HEIGHT * POOLED_WIDTH)
    bin_row = index // POOLED_WIDTH % POOLED_HEIGHT
    bin_column = index % POOLED_WIDTH

    image = image_of(rois_ptr, roi, num_images)
    start_h, size_h = axis_of(rois_ptr, roi, 2, spatial_scale)
    start_w, size_w = axis_of(rois_ptr, roi, 1, spatial_scale)
    top, bottom = edges(start_h, size_h, bin_row, POOLED_HEIGHT * 1.0, height)
    left, right = edges(start_w, size_w, bin_column, POOLED_WIDTH * 1.0, width)
    num_cells = tl.where(image < 0, 0, (bottom - top) * (right - left))

    plane_ptr = input_ptr + tl.maximum(image, 0).to(tl.int64) * height * width * channels + channel
    best = tl.full([BLOCK_C], LOWEST, tl.float32)
    argmax = tl.full([BLOCK_C], -1, tl.int32)
    y = top
    x = left
    for _ in range(0, num_cells, UNROLL):
        for _step in tl.static_range(UNROLL):
            cell = y * width + x
            value = tl.load(plane_ptr + cell.to(tl.int64) * channels, mask=inside, other=0.0).to(tl.float32)
            better = value > best
            best = tl.where(better, value, best)
            argmax = tl.where(better, cell, argmax)
            # Past the end the last row comes again, and is never larger than itself.
            last = x + 1 == right
            x = tl.where(last, left, x + 1)
            y = tl.minimum(tl.where(last, y + 1, y), bottom - 1)

    best = tl.where(num_cells > 0, best, 0.0)
    out = index.to(tl.int64) * channels + channel
    tl.store(pooled_ptr + out, best.to(pooled_ptr.dtype.element_ty), mask=inside)
    tl.store(argmax_ptr + out, argmax.to(argmax_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _spans_kernel(
    rois_ptr,
    images_ptr,
    spans_ptr,
    num_rois,
    num_images,
    height,
    width,
    spatial_scale,
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """How the bins of each RoI lie along each axis, so that the programs of the next kernel need not walk them.

    Program (block of RoIs, position): positions 0 .. H are rows of cells, H + 1 .. H + W + 1 columns.

    rois_ptr [R, 5]: fp32, image index and corners in pixels, contiguous.
    images_ptr [R]: int32, the image of each RoI, -1 for padding.
    spans_ptr [2, H + W + 2, R]: int32, contiguous. [0, p]: cells that the bins have before position p, each bin
        counted by itself; [1, p]: the first bin that has not ended before p. Bins at p: [0, p + 1] - [0, p].
    """
    lane = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    roi = tl.minimum(lane, num_rois - 1)
    line = tl.program_id(1)
    is_row = line <= height
    position = tl.where(is_row, line, line - height - 1)
    limit = tl.where(is_row, height, width)
    num_bins = tl.where(is_row, POOLED_HEIGHT, POOLED_WIDTH)

    start, size = axis_of(rois_ptr, roi, tl.where(is_row, 2, 1), spatial_scale)
    before = tl.zeros([BLOCK_R], tl.int32)
    ended = tl.zeros([BLOCK_R], tl.int32)
    for index in range(0, num_bins):
        low, high = edges(start, size, index, num_bins.to(tl.float32), limit)
        before += tl.minimum(tl.maximum(position - low, 0), high - low)
        ended += tl.where(high <= position, 1, 0)

    mask = lane < num_rois
    out = line.to(tl.int64) * num_rois + lane
    tl.store(spans_ptr + out, before, mask=mask)
    tl.store(spans_ptr + tl.num_programs(1).to(tl.int64) * num_rois + out, ended, mask=mask)
    tl.store(images_ptr + lane, image_of(rois_ptr, roi, num_images), mask=mask & (line == 0))


@triton.jit
def _roi_pool_backward_kernel(
    grad_ptr,
    argmax_ptr,
    bounds_ptr,
    visits_ptr,
    grad_input_ptr,
    channels,
    height,
    width,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The gradient of one feature cell, for one block of channels: the sum over the bins whose maximum it was.

    Program (cell of all images, channel block); UNROLL bins of its list in flight, added in ascending order in fp32.

    grad_ptr, argmax_ptr [R, PH, PW, C]: fp32, fp16 or bf16, and int16 or int32; contiguous.
    bounds_ptr [B * H * W, 2], visits_ptr [visits_bound]: as `launch_visits` wrote them.
    grad_input_ptr [B, H, W, C]: the dtype of grad, contiguous.
    """
    cell = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    begin = tl.load(bounds_ptr + cell.to(tl.int64) * 2)
    end = tl.load(bounds_ptr + cell.to(tl.int64) * 2 + 1)
    own = cell % (height * width)
    total = tl.zeros([BLOCK_C], tl.float32)
    for first in range(begin, end, UNROLL):
        places, winners, grads = (), (), ()
        for step in tl.static_range(UNROLL):
            visit = tl.load(visits_ptr + first + step, mask=first + step < end, other=0)
            places += (visit.to(tl.int64) * channels + channel,)
        for step in tl.static_range(UNROLL):
            winners += (tl.load(argmax_ptr + places[step], mask=inside & (first + step < end), other=-1),)
        for step in tl.static_range(UNROLL):
            grads += (tl.load(grad_ptr + places[step], mask=winners[step] == own, other=0.0),)
        for step in tl.static_range(UNROLL):
            total += grads[step].to(tl.float32)
    out = cell.to(tl.int64) * channels + channel
    tl.store(grad_input_ptr + out, total.to(grad_input_ptr.dtype.element_ty), mask=inside)


def launch(
    features: torch.Tensor,
    rois: torch.Tensor,
    pooled: torch.Tensor,
    argmax: torch.Tensor,
    *,
    spatial_scale: float,
) -> None:
    """Fill `pooled` and `argmax` [R, C, PH, PW] for `features` [B, C, H, W], all channels-last, and `rois` [R, 5]."""
    num_images, channels, height, width = features.shape
    num_rois, _, pooled_height, pooled_width = pooled.shape
    block_c, unroll, num_warps = config(channels, features.element_size())
    _roi_pool_kernel[(num_rois * pooled_height * pooled_width, triton.cdiv(channels, block_c))](
        input_ptr=features,
        rois_ptr=rois,
        pooled_ptr=pooled,
        argmax_ptr=argmax,
        num_images=num_images,
        channels=channels,
        height=height,
        width=width,
        spatial_scale=spatial_scale,
        POOLED_HEIGHT=pooled_height,
        POOLED_WIDTH=pooled_width,
        BLOCK_C=block_c,
        UNROLL=unroll,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def launch_backward(
    grad: torch.Tensor,
    rois: torch.Tensor,
    argmax: torch.Tensor,
    grad_input: torch.Tensor,
    images: torch.Tensor,
    extents: torch.Tensor,
    spans: torch.Tensor,
    bounds: torch.Tensor,
    visits: torch.Tensor,
    *,
    spatial_scale: float,
) -> None:
    """Fill `grad_input` [B, C, H, W] from `grad` and `argmax` [R, C, PH, PW], all channels-last, and `rois` [R, 5].

    Scratch: `images` [R], `spans` [2, H + W + 2, R] and `visits` [visits_bound], int32; `extents` [B, 3] and `bounds`
    [B * H * W, 2], int64.
    """
    num_images, channels, height, width = grad_input.shape
    num_rois, _, pooled_height, pooled_width = grad.shape
    cells = num_images * height * width
    _spans_kernel[(triton.cdiv(num_rois, BLOCK_R), height + width + 2)](
        rois_ptr=rois,
        images_ptr=images,
        spans_ptr=spans,
        num_rois=num_rois,
        num_images=num_images,
        height=height,
        width=width,
        spatial_scale=spatial_scale,
        POOLED_HEIGHT=pooled_height,
        POOLED_WIDTH=pooled_width,
        BLOCK_R=BLOCK_R,
        enable_fp_fusion=False,
    )
    launch_visits(images, extents, spans, bounds, visits, grid=(height, width), pooled=(pooled_height, pooled_width))
    block_c, unroll, num_warps = config_backward(channels, grad.element_size())
    _roi_pool_backward_kernel[(cells, triton.cdiv(channels, block_c))](
        grad_ptr=grad,
        argmax_ptr=argmax,
        bounds_ptr=bounds,
        visits_ptr=visits,
        grad_input_ptr=grad_input,
        channels=channels,
        height=height,
        width=width,
        BLOCK_C=block_c,
        UNROLL=unroll,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
