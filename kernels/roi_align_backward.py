"""The gradient of RoI align, gathered per tile of feature cells: no atomics, the same bits on every run."""
# mypy: disable-error-code="assignment, var-annotated"
# (Triton tuples grow in a loop, which Python's types cannot express)

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.csr import launch_spans, launch_visits
from fastdet.kernels.common.pyramid import (
    SIZES,
    arguments_by_level,
    select_pointer,
    select_value,
    size_arguments,
    sizes_of,
    tile_rows_above,
)
from fastdet.kernels.common.roi_align_weights import launch_weights

# A program owns a square of this many cells a side: it reads a bin once for all of them.
TILE = 4


class Config(NamedTuple):
    """Channels per program, a power of two; bins that it loads at a time; its warps."""

    block_c: int
    unroll: int
    num_warps: int


def config(channels: int) -> Config:
    """Four channels per thread, 16 bytes in fp32, and at most two warps."""
    block = min(triton.next_power_of_2(channels), 256)
    return Config(block, unroll=4, num_warps=max(block // 128, 1))


def tiles(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns of tiles of an image: the levels, each (height, width) in cells, are stacked."""
    return sum(triton.cdiv(height, TILE) for height, _ in sizes), max(triton.cdiv(width, TILE) for _, width in sizes)


@functools.lru_cache(maxsize=256)
def visits_bound(
    num_rois: int,
    sizes: tuple[tuple[int, int], ...],
    scales: tuple[float, ...],
    edges: tuple[float, ...],
    pooled_height: int,
    pooled_width: int,
) -> int:
    """Upper bound of the (bin, tile of that bin) pairs: adjacent bins share at most two rows or columns of tiles.

    A RoI of all levels but the last has an area below the next level's edge: it is either narrow or low.
    """
    areas = [edge * scale**2 for edge, scale in zip(edges, scales, strict=False)] + [math.inf]
    longest = 0
    for (height, width), area in zip(sizes, areas, strict=False):
        columns = triton.cdiv(width, TILE)
        for rows in range(1, triton.cdiv(height, TILE) + 1):
            # So many rows of tiles take a height of more than this many cells, as samples read a cell beyond; and
            # what is as wide as this, a cell at least, reaches into so many columns. One more outweighs the rounding.
            cells_high = (rows - 2) * TILE - 1
            cells_wide = max(area / cells_high, 1) if cells_high > 0 else math.inf
            reached = int(min((cells_wide + 1) / TILE + 3, columns))
            longest = max(longest, (rows + 2 * (pooled_height - 1)) * (reached + 2 * (pooled_width - 1)))
    return num_rois * longest


@triton.jit(do_not_specialize=["rows", "columns", "padded_height", "padded_width", *SIZES])
def _roi_align_backward_kernel(
    # Tensors, all contiguous
    grad_ptr,  # [R, PH, PW, C] fp32, fp16 or bf16
    bounds_ptr,  # [B * rows * columns, 2] int64, from `launch_visits`: begin and end of each tile's list in visits
    visits_ptr,  # [visits_bound] int32, from `launch_visits`: (roi * PH + bin row) * PW + bin column
    weights_h_ptr,  # [R, PH, padded_height] fp32, from `launch_weights`
    weights_w_ptr,  # [R, PW, padded_width] fp32, from `launch_weights`
    grad_input_0_ptr,  # [B, H, W, C] dtype of grad, of each level, output; None past the last level
    grad_input_1_ptr,
    grad_input_2_ptr,
    grad_input_3_ptr,
    grad_input_4_ptr,
    # Sizes
    channels,
    rows,  # rows and columns of tiles
    columns,
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
    # Constexprs
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The gradient of one tile of cells, for one block of channels: the sum over the bins that read its cells.

    Program (tile of all images, channel block); UNROLL bins of its list in flight, added in ascending order in fp32.

            level 0  +---+---+---+       The tiles of an image: level upon level, all as wide as the widest. Tiles, and
                     +---+---+---+       cells of a tile, that lie beyond the map of their level are not written.
            level 1  +---+-. . . .
                     +---+-. . . .
    """
    # The program's tile and channels [BLOCK_C].
    tile = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < channels
    image = tile // (rows * columns)
    row = tile // columns % rows
    # Its level, and its first cell there.
    level = tl.zeros_like(row)
    for next_level in tl.static_range(1, 5):
        level += (row >= tile_rows_above(next_level, height_0, height_1, height_2, height_3, TILE)).to(tl.int32)
    height = select_value(level, height_0, height_1, height_2, height_3, height_4)
    width = select_value(level, width_0, width_1, width_2, width_3, width_4)
    top = (row - tile_rows_above(level, height_0, height_1, height_2, height_3, TILE)) * TILE
    left = tile % columns * TILE

    begin = tl.load(bounds_ptr + tile.to(tl.int64) * 2)
    end = tl.load(bounds_ptr + tile.to(tl.int64) * 2 + 1)
    # TILE * TILE sums, row after row, each [BLOCK_C].
    totals = ()
    for _ in tl.static_range(TILE * TILE):
        totals += (tl.zeros([BLOCK_C], tl.float32),)
    for first in range(begin, end, UNROLL):
        # Load UNROLL bins: their gradients [BLOCK_C], and the weights of the tile's rows and columns in them.
        grads, row_weights, column_weights = (), (), ()
        for step in tl.static_range(UNROLL):
            mask = first + step < end
            visit = tl.load(visits_ptr + first + step, mask=mask, other=0)
            bin_row = (visit // POOLED_WIDTH).to(tl.int64)
            bin_column = (visit // (POOLED_HEIGHT * POOLED_WIDTH)).to(tl.int64) * POOLED_WIDTH + visit % POOLED_WIDTH
            grads += (tl.load(grad_ptr + visit.to(tl.int64) * channels + channel, mask=inside & mask, other=0.0),)
            for k in tl.static_range(TILE):
                row_weight_ptr = weights_h_ptr + bin_row * padded_height + top + k
                row_weights += (tl.load(row_weight_ptr, mask=mask, other=0.0),)
                column_weight_ptr = weights_w_ptr + bin_column * padded_width + left + k
                column_weights += (tl.load(column_weight_ptr, mask=mask, other=0.0),)
        # Add them to every cell, in ascending order.
        for step in tl.static_range(UNROLL):
            grad = grads[step].to(tl.float32)
            sums = ()
            for cell in tl.static_range(TILE * TILE):
                weight = row_weights[step * TILE + cell // TILE] * column_weights[step * TILE + cell % TILE]
                sums += (totals[cell] + weight * grad,)
            totals = sums

    # Store the cells that lie on the map.
    grad_input_ptr = select_pointer(
        level, grad_input_0_ptr, grad_input_1_ptr, grad_input_2_ptr, grad_input_3_ptr, grad_input_4_ptr
    )
    grad_input_ptr += image.to(tl.int64) * height * width * channels + channel
    for cell in tl.static_range(TILE * TILE):
        y = top + cell // TILE
        x = left + cell % TILE
        offset = (y.to(tl.int64) * width + x) * channels
        total = totals[cell].to(grad_input_ptr.dtype.element_ty)
        tl.store(grad_input_ptr + offset, total, mask=inside & (y < height) & (x < width))


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
    _, channels, pooled_height, pooled_width = grad.shape
    sizes = sizes_of(grad_inputs)
    rows, columns = tiles(sizes)
    launch_weights(
        rois,
        images,
        ranges,
        weights_h,
        weights_w,
        num_images=len(grad_inputs[0]),
        sizes=sizes,
        scales=scales,
        edges=edges,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        tile=TILE,
    )
    launch_spans(ranges, spans, grid=(rows, columns), pooled=(pooled_height, pooled_width))
    launch_visits(images, extents, spans, bounds, visits, grid=(rows, columns), pooled=(pooled_height, pooled_width))
    block_c, unroll, num_warps = config(channels)
    _roi_align_backward_kernel[(len(bounds), triton.cdiv(channels, block_c))](
        grad_ptr=grad,
        bounds_ptr=bounds,
        visits_ptr=visits,
        weights_h_ptr=weights_h,
        weights_w_ptr=weights_w,
        **arguments_by_level("grad_input_{}_ptr", grad_inputs, None),
        channels=channels,
        rows=rows,
        columns=columns,
        padded_height=weights_h.shape[2],
        padded_width=weights_w.shape[2],
        **size_arguments(sizes),
        POOLED_HEIGHT=pooled_height,
        POOLED_WIDTH=pooled_width,
        TILE=TILE,
        BLOCK_C=block_c,
        UNROLL=unroll,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
