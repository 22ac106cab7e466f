"""The spans that `launch_visits` reads, computed from the bins of RoI max-pool.

Launched with `enable_fp_fusion=False`: a fused multiply-add moves the edge of a bin.
"""

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.csr import BLOCK_R
from fastdet.kernels.common.roi_bins import bin_edges, roi_image, roi_start_size


@triton.jit(do_not_specialize=["num_rois", "num_images", "height", "width"])
def _spans_kernel(
    # Tensors, all contiguous
    rois_ptr,  # [R, 5] fp32: image index, x1, y1, x2, y2 in pixels
    images_ptr,  # [R] int32, output: image of each RoI, -1 for padding
    spans_ptr,  # [2, TH + TW + 2, R] int32, output; TH = cdiv(height, TILE) and TW = cdiv(width, TILE)
    # Sizes
    num_rois,
    num_images,
    height,  # cells
    width,
    # Scalars
    spatial_scale,  # cells per pixel
    # Constexprs
    POOLED_HEIGHT: tl.constexpr,
    POOLED_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """How the bins of each RoI lie along each axis, so that the programs of the next kernel need not walk the bins.

    Program (line and block of RoIs): lines 0 .. TH are positions in rows of tiles, TH + 1 .. TH + TW + 1 in columns.

    spans[0, p] is the number of (bin, tile of that bin) pairs along the axis before position p, so that
    spans[0, p + 1] - spans[0, p] bins reach p; spans[1, p] is the first bin that has not ended before p.
    """
    # The line's axis, and its position along it.
    num_blocks = tl.cdiv(num_rois, BLOCK_R)
    line = tl.program_id(0) // num_blocks
    lane = tl.program_id(0) % num_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    roi = tl.minimum(lane, num_rois - 1)
    rows = tl.cdiv(height, TILE)
    is_row = line <= rows
    position = tl.where(is_row, line, line - rows - 1)
    limit = tl.where(is_row, height, width)
    num_bins = tl.where(is_row, POOLED_HEIGHT, POOLED_WIDTH)

    # Count the tiles before the position, bin after bin.
    start, size = roi_start_size(rois_ptr, roi, tl.where(is_row, 2, 1), spatial_scale)
    num_before = tl.zeros([BLOCK_R], tl.int32)
    num_ended = tl.zeros([BLOCK_R], tl.int32)
    for index in range(0, num_bins):
        first_cell, end_cell = bin_edges(start, size, index, num_bins.to(tl.float32), limit)
        high = tl.cdiv(end_cell, TILE)
        # A bin beyond the map has no tile.
        low = tl.where(first_cell < end_cell, first_cell // TILE, high)
        num_before += tl.minimum(tl.maximum(position - low, 0), high - low)
        num_ended += tl.where(high <= position, 1, 0)

    mask = lane < num_rois
    out = line.to(tl.int64) * num_rois + lane
    tl.store(spans_ptr + out, num_before, mask=mask)
    num_lines = (rows + tl.cdiv(width, TILE) + 2).to(tl.int64)
    tl.store(spans_ptr + num_lines * num_rois + out, num_ended, mask=mask)
    tl.store(images_ptr + lane, roi_image(rois_ptr, roi, num_images), mask=mask & (line == 0))


def launch_spans(
    rois: torch.Tensor,
    images: torch.Tensor,
    spans: torch.Tensor,
    *,
    num_images: int,
    cells: tuple[int, int],
    pooled: tuple[int, int],
    spatial_scale: float,
    tile: int,
) -> None:
    """Fill `images` [R] and `spans` [2, TH + TW + 2, R] from `rois` [R, 5]; `pooled` is (PH, PW).

    `cells` are (height, width) of the map, `tile` the cells of a tile along each axis.
    """
    num_rois = len(rois)
    # Lines and blocks share the first axis of the grid, the only one that is not limited to 65535.
    _spans_kernel[(spans.shape[1] * triton.cdiv(num_rois, BLOCK_R),)](
        rois_ptr=rois,
        images_ptr=images,
        spans_ptr=spans,
        num_rois=num_rois,
        num_images=num_images,
        height=cells[0],
        width=cells[1],
        spatial_scale=spatial_scale,
        POOLED_HEIGHT=pooled[0],
        POOLED_WIDTH=pooled[1],
        TILE=tile,
        BLOCK_R=BLOCK_R,
        enable_fp_fusion=False,
    )
