"""The gradient of RoI align by owner: no atomics, the same bits on every run.

What a bin takes of a cell is the product of what its row takes of the cell's row and its column of the cell's column.
All of it is meant for kernels launched with `enable_fp_fusion=False`: a fused multiply-add moves a sample.
"""
# mypy: disable-error-code="assignment, var-annotated"
# (a Triton tuple grows, which Python's types do not say)

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.csr import launch_spans, launch_visits
from fastdet.kernels.common.pyramid import SIZES, by_level, geometry, level_of, pick, pick_pointer, sizes_of
from fastdet.kernels.common.roi_bins import image_of
from fastdet.kernels.common.roi_samples import bins_of, cells_of, position, reaching

# A program of the gradient owns a square of so many cells a side: it reads a bin once for all that the bin reaches.
TILE = 4
# Cells of one bin that are weighed at once.
BLOCK_W = 32


class Config(NamedTuple):
    """Channels of a program, a power of two; bins that it loads at a time; its warps."""

    block_c: int
    unroll: int
    num_warps: int


def config(channels: int) -> Config:
    """Four channels a thread, 16 bytes in fp32, and two warps at most."""
    block = min(triton.next_power_of_2(channels), 256)
    return Config(block, unroll=4, num_warps=max(block // 128, 1))


def tiles(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns of tiles: the levels, each (height, width) in cells, stand on one another."""
    return sum(triton.cdiv(height, TILE) for height, _ in sizes), max(triton.cdiv(width, TILE) for _, width in sizes)


def visits_bound(num_rois: int, sizes: list[tuple[int, int]], pooled_height: int, pooled_width: int) -> int:
    """No list of (bin, tile of that bin) is longer: neighbouring bins share two rows or columns of tiles at most."""
    rows = max(triton.cdiv(height, TILE) for height, _ in sizes) + 2 * (pooled_height - 1)
    columns = max(triton.cdiv(width, TILE) for _, width in sizes) + 2 * (pooled_width - 1)
    return num_rois * rows * columns


@triton.jit
def _rows_above(level, height_0, height_1, height_2, height_3, TILE: tl.constexpr):
    """Rows of tiles of the levels before this one."""
    first = tl.cdiv(height_0, TILE)
    second = first + tl.cdiv(height_1, TILE)
    third = second + tl.cdiv(height_2, TILE)
    return pick(level, 0, first, second, third, third + tl.cdiv(height_3, TILE))


@triton.jit(do_not_specialize=SIZES)
def _weights_kernel(
    rois_ptr,
    images_ptr,
    ranges_ptr,
    weights_h_ptr,
    weights_w_ptr,
    num_rois,
    num_images,
    padded_height,
    padded_width,
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
    TILE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """How much of each row of cells a row of bins takes, and the same for columns: a bin takes of a cell the product.

    Program (RoI and bin row or bin column): PH rows, then PW columns.

    rois_ptr [R, 5]: fp32, image index and corners in pixels, contiguous.
    images_ptr [R]: int32, the image of each RoI, -1 for padding.
    ranges_ptr [2, PH + PW, R]: int32, contiguous. [0]: first row (or column) of tiles with a cell that the bins take
        of, counted over all levels from the first; [1]: one past the last. From bin to bin neither falls, nor rises
        where a box is inverted.
    weights_h_ptr [R, PH, padded_height], weights_w_ptr [R, PW, padded_width]: fp32, contiguous; what a mean over the
        samples takes of each row or column of the RoI's level. Outside the tiles of the range nothing is written.
    """
    program = tl.program_id(0)
    roi = program // (POOLED_HEIGHT + POOLED_WIDTH)
    line = program % (POOLED_HEIGHT + POOLED_WIDTH)
    is_row = line < POOLED_HEIGHT
    num_bins = tl.where(is_row, POOLED_HEIGHT, POOLED_WIDTH)
    index = tl.where(is_row, line, line - POOLED_HEIGHT)

    image = image_of(rois_ptr, roi, num_images)
    level = level_of(rois_ptr, roi, edge_1, edge_2, edge_3, edge_4)
    scale = pick(level, scale_0, scale_1, scale_2, scale_3, scale_4)
    height = pick(level, height_0, height_1, height_2, height_3, height_4)
    width = pick(level, width_0, width_1, width_2, width_3, width_4)
    limit = tl.where(is_row, height, width)
    above = tl.where(is_row, _rows_above(level, height_0, height_1, height_2, height_3, TILE), 0)
    start, size, count = bins_of(rois_ptr, roi, tl.where(is_row, 2, 1), scale, num_bins, SAMPLING, ALIGNED)

    one = position(start, size, index, 0, tl.maximum(count, 1))
    other = position(start, size, index, count - 1, tl.maximum(count, 1))
    nearest = tl.minimum(one, other)
    furthest = tl.maximum(one, other)
    taken = (image >= 0) & (count > 0) & (furthest >= -1.0) & (nearest <= limit) & (limit > 0)
    low, _, _, _ = cells_of(nearest, limit)
    _, high, _, _ = cells_of(furthest, limit)
    first_tile = tl.where(taken, low // TILE, 0)
    last_tile = tl.where(taken, high // TILE + 1, 0)
    range_ptr = ranges_ptr + line.to(tl.int64) * num_rois + roi
    tl.store(range_ptr, above + first_tile)
    tl.store(range_ptr + (POOLED_HEIGHT + POOLED_WIDTH) * tl.cast(num_rois, tl.int64), above + last_tile)
    tl.store(images_ptr + roi, image, mask=line == 0)

    row_ptr = weights_h_ptr + (roi.to(tl.int64) * POOLED_HEIGHT + index) * padded_height
    column_ptr = weights_w_ptr + (roi.to(tl.int64) * POOLED_WIDTH + index) * padded_width
    weights_ptr = tl.where(is_row, row_ptr, column_ptr)
    first, last = reaching(start, size, index, count, limit)
    for block in range(first_tile * TILE, last_tile * TILE, BLOCK_W):
        cell = block + tl.arange(0, BLOCK_W)
        weight = tl.zeros([BLOCK_W], tl.float32)
        for sample in range(first, last):
            near, far, share, on_map = cells_of(position(start, size, index, sample, count), limit)
            weight += tl.where(cell == near, tl.where(on_map, 1.0 - share, 0.0), 0.0)
            weight += tl.where(cell == far, tl.where(on_map, share, 0.0), 0.0)
        tl.store(weights_ptr + cell, tl.div_rn(weight, count * 1.0), mask=cell < last_tile * TILE)


@triton.jit(do_not_specialize=SIZES)
def _roi_align_backward_kernel(
    grad_ptr,
    bounds_ptr,
    visits_ptr,
    weights_h_ptr,
    weights_w_ptr,
    grad_input_0_ptr,
    grad_input_1_ptr,
    grad_input_2_ptr,
    grad_input_3_ptr,
    grad_input_4_ptr,
    channels,
    rows,
    columns,
    padded_height,
    padded_width,
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
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The gradient of one tile of cells, for one block of channels: the sum over the bins that took of its cells.

    Program (tile of all images, channel block); UNROLL bins of its list in flight, added in ascending order in fp32.

            level 0  +---+---+---+       The tiles of an image: level upon level, all as wide as the widest. Tiles, and
                     +---+---+---+       cells of a tile, that lie beyond the map of their level are not written.
            level 1  +---+-. . . .
                     +---+-. . . .

    grad_ptr [R, PH, PW, C]: fp32, fp16 or bf16, contiguous.
    bounds_ptr [B * rows * columns, 2], visits_ptr [visits_bound]: as `launch_visits` wrote them.
    weights_h_ptr [R, PH, padded_height], weights_w_ptr [R, PW, padded_width]: as the weights kernel wrote them.
    grad_input_0_ptr .. grad_input_4_ptr [B, H, W, C]: the dtype of grad, contiguous; None past the last level.
    """
    tile = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    image = tile // (rows * columns)
    row = tile // columns % rows
    level = tl.zeros_like(row)
    for before in tl.static_range(1, 5):
        level += (row >= _rows_above(before, height_0, height_1, height_2, height_3, TILE)).to(tl.int32)
    height = pick(level, height_0, height_1, height_2, height_3, height_4)
    width = pick(level, width_0, width_1, width_2, width_3, width_4)
    top = (row - _rows_above(level, height_0, height_1, height_2, height_3, TILE)) * TILE
    left = tile % columns * TILE

    begin = tl.load(bounds_ptr + tile.to(tl.int64) * 2)
    end = tl.load(bounds_ptr + tile.to(tl.int64) * 2 + 1)
    totals = ()
    for _ in tl.static_range(TILE * TILE):
        totals += (tl.zeros([BLOCK_C], tl.float32),)
    for first in range(begin, end, UNROLL):
        grads, talls, wides = (), (), ()
        for step in tl.static_range(UNROLL):
            mask = first + step < end
            visit = tl.load(visits_ptr + first + step, mask=mask, other=0)
            bin_row = (visit // POOLED_WIDTH).to(tl.int64)
            bin_column = (visit // (POOLED_HEIGHT * POOLED_WIDTH)).to(tl.int64) * POOLED_WIDTH + visit % POOLED_WIDTH
            grads += (tl.load(grad_ptr + visit.to(tl.int64) * channels + channel, mask=inside & mask, other=0.0),)
            for k in tl.static_range(TILE):
                talls += (tl.load(weights_h_ptr + bin_row * padded_height + top + k, mask=mask, other=0.0),)
                wides += (tl.load(weights_w_ptr + bin_column * padded_width + left + k, mask=mask, other=0.0),)
        for step in tl.static_range(UNROLL):
            grad = grads[step].to(tl.float32)
            sums = ()
            for cell in tl.static_range(TILE * TILE):
                weight = talls[step * TILE + cell // TILE] * wides[step * TILE + cell % TILE]
                sums += (totals[cell] + weight * grad,)
            totals = sums

    grad_input_ptr = pick_pointer(
        level, grad_input_0_ptr, grad_input_1_ptr, grad_input_2_ptr, grad_input_3_ptr, grad_input_4_ptr
    )
    grad_input_ptr += image.to(tl.int64) * height * width * channels + channel
    for cell in tl.static_range(TILE * TILE):
        y = top + cell // TILE
        x = left + cell % TILE
        place = (y.to(tl.int64) * width + x) * channels
        total = totals[cell].to(grad_input_ptr.dtype.element_ty)
        tl.store(grad_input_ptr + place, total, mask=inside & (y < height) & (x < width))


def launch(
    grad: torch.Tensor,
    rois: torch.Tensor,
    grad_inputs: list[torch.Tensor],
    images: torch.Tensor,
    ranges: torch.Tensor,
    weights_h: torch.Tensor,
    weights_w: torch.Tensor,
    extents: torch.Tensor,
    spans: torch.Tensor,
    bounds: torch.Tensor,
    visits: torch.Tensor,
    *,
    scales: list[float],
    edges: list[float],
    sampling_ratio: int,
    aligned: bool,
) -> None:
    """Fill `grad_inputs`, levels [B, C, H, W], from `grad` [R, C, PH, PW], all channels-last, and `rois` [R, 5].

    Scratch, with (TH, TW) = `tiles`: int32 `images` [R], `ranges` [2, PH + PW, R], `spans` [2, TH + TW + 2, R] and
    `visits` [visits_bound]; int64 `extents` [B, 3] and `bounds` [B * TH * TW, 2]; fp32 `weights_h` [R, PH, whole tiles
    of the highest level] and `weights_w` [R, PW, whole tiles of the widest].
    """
    num_rois, channels, pooled_height, pooled_width = grad.shape
    pooled = (pooled_height, pooled_width)
    sizes = sizes_of(grad_inputs)
    rows, columns = tiles(sizes)
    shared = geometry(sizes, scales, edges)
    _weights_kernel[(num_rois * sum(pooled),)](
        rois_ptr=rois,
        images_ptr=images,
        ranges_ptr=ranges,
        weights_h_ptr=weights_h,
        weights_w_ptr=weights_w,
        num_rois=num_rois,
        num_images=len(grad_inputs[0]),
        padded_height=weights_h.shape[2],
        padded_width=weights_w.shape[2],
        **shared,
        POOLED_HEIGHT=pooled_height,
        POOLED_WIDTH=pooled_width,
        SAMPLING=max(sampling_ratio, 0),
        ALIGNED=aligned,
        TILE=TILE,
        BLOCK_W=BLOCK_W,
        num_warps=1,
        enable_fp_fusion=False,
    )
    launch_spans(ranges, spans, grid=(rows, columns), pooled=pooled)
    launch_visits(images, extents, spans, bounds, visits, grid=(rows, columns), pooled=pooled)
    block_c, unroll, num_warps = config(channels)
    _roi_align_backward_kernel[(len(bounds), triton.cdiv(channels, block_c))](
        grad_ptr=grad,
        bounds_ptr=bounds,
        visits_ptr=visits,
        weights_h_ptr=weights_h,
        weights_w_ptr=weights_w,
        **by_level("grad_input_{}_ptr", grad_inputs, None),
        channels=channels,
        rows=rows,
        columns=columns,
        padded_height=weights_h.shape[2],
        padded_width=weights_w.shape[2],
        **{name: shared[name] for name in SIZES},
        POOLED_HEIGHT=pooled_height,
        POOLED_WIDTH=pooled_width,
        TILE=TILE,
        BLOCK_C=block_c,
        UNROLL=unroll,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
