"""RoI max-pool over channels-last features, and its gradient, gathered per tile of feature cells.

The gradient needs no atomics and has the same bits on every run. The kernels are launched with
`enable_fp_fusion=False`, as a fused multiply-add moves the edge of a bin.
"""
# mypy: disable-error-code="assignment, var-annotated"
# (Triton tuples grow in a loop, which Python's types cannot express)

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.csr import launch_visits
from fastdet.kernels.common.roi_bins import bin_edges, roi_image, roi_start_size
from fastdet.kernels.common.roi_pool_spans import launch_spans

# -FLT_MAX, from which torchvision's search for the maximum starts too.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# A program of the gradient owns a square of this many cells a side: it reads a bin once for all of them.
TILE = 2


class Config(NamedTuple):
    """Channels per program, a power of two; cells (backward: bins) that it loads at a time; its warps."""

    block_c: int
    unroll: int
    num_warps: int


def config(channels: int) -> Config:
    """One warp, with 16 bytes per thread of half precision: with two, a thread has fewer loads to keep in flight."""
    return Config(min(triton.next_power_of_2(channels), 256), unroll=4, num_warps=1)


def config_backward(channels: int) -> Config:
    """Two channels per thread, so that registers hold all loads of a round: the longest list, of up to some hundred
    bins, decides the time."""
    block = min(triton.next_power_of_2(channels), 256)
    return Config(block, unroll=8, num_warps=max(block // 64, 1))


def tiles(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles of a map of `height` x `width` cells."""
    return triton.cdiv(height, TILE), triton.cdiv(width, TILE)


def visits_bound(num_rois: int, height: int, width: int, pooled_height: int, pooled_width: int) -> int:
    """Upper bound of the (bin, tile of that bin) pairs: adjacent bins share at most one row or column of tiles."""
    rows, columns = tiles(height, width)
    return num_rois * (rows + pooled_height - 1) * (columns + pooled_width - 1)


@triton.jit(do_not_specialize=["num_images", "height", "width"])
def _roi_pool_kernel(
    # Tensors, all contiguous
    input_ptr,  # [B, H, W, C] fp32, fp16 or bf16 (a channels-last [B, C, H, W])
    rois_ptr,  # [R, 5] fp32: image index, x1, y1, x2, y2 in pixels
    pooled_ptr,  # [R, PH, PW, C] dtype of input, output
    argmax_ptr,  # [R, PH, PW, C] int16 or int32, output: h * W + w of the maximum, -1 where nothing was pooled
    # Sizes
    num_images,
    channels,
    height,
    width,
    # Scalars
    spatial_scale,  # cells per pixel
    # Constexprs
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
    """
    # The program's bin and channels [BLOCK_C].
    index = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    roi = index // (POOLED_HEIGHT * POOLED_WIDTH)
    bin_row = index // POOLED_WIDTH % POOLED_HEIGHT
    bin_column = index % POOLED_WIDTH

    # The cells of the bin.
    image = roi_image(rois_ptr, roi, num_images)
    start_h, size_h = roi_start_size(rois_ptr, roi, 2, spatial_scale)
    start_w, size_w = roi_start_size(rois_ptr, roi, 1, spatial_scale)
    top, bottom = bin_edges(start_h, size_h, bin_row, POOLED_HEIGHT * 1.0, height)
    left, right = bin_edges(start_w, size_w, bin_column, POOLED_WIDTH * 1.0, width)
    num_cells = tl.where(image < 0, 0, (bottom - top) * (right - left))

    # Find the maximum of each channel, [BLOCK_C].
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
            # The next cell; past the end that is the last row again, which is never larger than itself.
            end_of_row = x + 1 == right
            x = tl.where(end_of_row, left, x + 1)
            y = tl.minimum(tl.where(end_of_row, y + 1, y), bottom - 1)

    # An empty bin gives 0.
    best = tl.where(num_cells > 0, best, 0.0)
    out = index.to(tl.int64) * channels + channel
    tl.store(pooled_ptr + out, best.to(pooled_ptr.dtype.element_ty), mask=inside)
    tl.store(argmax_ptr + out, argmax.to(argmax_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["height", "width", "rows", "columns"])
def _roi_pool_backward_kernel(
    # Tensors, all contiguous
    grad_ptr,  # [R, PH, PW, C] fp32, fp16 or bf16
    argmax_ptr,  # [R, PH, PW, C] int16 or int32, from the forward kernel
    bounds_ptr,  # [B * rows * columns, 2] int64, from `launch_visits`: begin and end of each tile's list in visits
    visits_ptr,  # [visits_bound] int32, from `launch_visits`: (roi * PH + bin row) * PW + bin column
    grad_input_ptr,  # [B, H, W, C] dtype of grad, output
    # Sizes
    channels,
    height,
    width,
    rows,  # rows and columns of tiles
    columns,
    # Constexprs
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The gradient of one tile of cells, for one block of channels: of each cell the sum over the bins whose maximum
    it was.

        +---+---+---+-          Program (tile of all images, channel block); UNROLL bins of the tile's list in flight,
        | tile  |               each added to the cell that is its maximum, in ascending order in fp32. Cells of a tile
        +   +   +   +-          that lie beyond the map are not written.
        |       |
        +---+---+---+-
    """
    # The program's tile and channels [BLOCK_C].
    tile = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    image = tile // (rows * columns)
    top = tile // columns % rows * TILE
    left = tile % columns * TILE
    begin = tl.load(bounds_ptr + tile.to(tl.int64) * 2)
    end = tl.load(bounds_ptr + tile.to(tl.int64) * 2 + 1)
    # The places of the cells in the map, row after row; of those beyond it one that is no maximum. Sums, [BLOCK_C].
    cells, totals = (), ()
    for k in tl.static_range(TILE * TILE):
        y = top + k // TILE
        x = left + k % TILE
        cells += (tl.where((y < height) & (x < width), y * width + x, -2),)
        totals += (tl.zeros([BLOCK_C], tl.float32),)
    # The bins of the first round, and in each round those of the next, so that no load of values waits for them. Past
    # the end of the list they are its last bin, which is not added: a mask for each bin would take more predicates than
    # there are, and the compiler would complete the loads one after another.
    list_ptr = visits_ptr + begin
    length = (end - begin).to(tl.int32)
    visits = ()
    for step in tl.static_range(UNROLL):
        visits += (tl.load(list_ptr + tl.minimum(step, length - 1), mask=length > 0, other=0),)
    for first in range(0, length, UNROLL):
        # Load UNROLL bins, each [BLOCK_C]. Of a sector of gradients some channel nearly always belongs to the tile.
        argmaxes, grads, next_visits = (), (), ()
        for step in tl.static_range(UNROLL):
            offset = visits[step].to(tl.int64) * channels + channel
            argmaxes += (tl.load(argmax_ptr + offset, mask=inside, other=-1),)
            grads += (tl.load(grad_ptr + offset, mask=inside, other=0.0),)
        for step in tl.static_range(UNROLL):
            next_visits += (tl.load(list_ptr + tl.minimum(first + UNROLL + step, length - 1)),)
        for step in tl.static_range(UNROLL):
            argmax = tl.where(first + step < length, argmaxes[step].to(tl.int32), -1)
            sums = ()
            for k in tl.static_range(TILE * TILE):
                sums += (tl.where(argmax == cells[k], totals[k] + grads[step].to(tl.float32), totals[k]),)
            totals = sums
        visits = next_visits
    # Store the cells that lie on the map.
    plane_ptr = grad_input_ptr + image.to(tl.int64) * height * width * channels + channel
    for k in tl.static_range(TILE * TILE):
        total = totals[k].to(grad_input_ptr.dtype.element_ty)
        tl.store(plane_ptr + cells[k].to(tl.int64) * channels, total, mask=inside & (cells[k] >= 0))


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
    block_c, unroll, num_warps = config(channels)
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

    Scratch, with (TH, TW) = `tiles`: `images` [R], `spans` [2, TH + TW + 2, R] and `visits` [visits_bound], int32;
    `extents` [B, 3] and `bounds` [B * TH * TW, 2], int64.
    """
    num_images, channels, height, width = grad_input.shape
    pooled_height, pooled_width = grad.shape[2:]
    grid, pooled = tiles(height, width), (pooled_height, pooled_width)
    launch_spans(
        rois, images, spans, num_images=num_images, cells=(height, width), pooled=pooled, spatial_scale=spatial_scale,
        tile=TILE,
    )  # fmt: skip
    launch_visits(images, extents, spans, bounds, visits, grid=grid, pooled=pooled)
    block_c, unroll, num_warps = config_backward(channels)
    _roi_pool_backward_kernel[(len(bounds), triton.cdiv(channels, block_c))](
        grad_ptr=grad,
        argmax_ptr=argmax,
        bounds_ptr=bounds,
        visits_ptr=visits,
        grad_input_ptr=grad_input,
        channels=channels,
        height=height,
        width=width,
        rows=grid[0],
        columns=grid[1],
        TILE=TILE,
        BLOCK_C=block_c,
        UNROLL=unroll,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
