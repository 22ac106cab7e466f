"""How the bins of a region of interest (RoI) lie on the cells of a feature map, for RoI max-pool.

For kernels launched with `enable_fp_fusion=False` only: a fused multiply-add moves the edge of a bin.
"""

import triton
import triton.language as tl

# Rounded corners are clamped to this many cells, so that no sum of int32 cells wraps around; exact in fp32.
MAX_CELL = tl.constexpr(1e9)


@triton.jit
def round_half_away(x):
    """The nearest cell, half away from zero as C's `round`, as int32."""
    magnitude = tl.abs(x)
    rounded = tl.floor(magnitude)
    rounded = tl.minimum(tl.where(magnitude - rounded >= 0.5, rounded + 1.0, rounded), MAX_CELL)
    return tl.where(x < 0.0, -rounded, rounded).to(tl.int32)


@triton.jit
def roi_image(
    rois_ptr,  # [R, 5] fp32: image index, x1, y1, x2, y2 in pixels
    roi,  # int32, scalar or block
    num_images,
):
    """The image that a RoI lies in; -1 for padding: an index outside [0, num_images), or a NaN corner."""
    roi_ptr = rois_ptr + roi.to(tl.int64) * 5
    image = tl.load(roi_ptr)
    x1 = tl.load(roi_ptr + 1)
    y1 = tl.load(roi_ptr + 2)
    x2 = tl.load(roi_ptr + 3)
    y2 = tl.load(roi_ptr + 4)
    no_nan = (x1 == x1) & (y1 == y1) & (x2 == x2) & (y2 == y2)
    return tl.where(no_nan & (image >= 0.0) & (image < num_images), image, -1.0).to(tl.int32)


@triton.jit
def roi_start_size(
    rois_ptr,  # [R, 5] fp32: image index, x1, y1, x2, y2 in pixels
    roi,  # int32, scalar or block
    column,  # 1 for x, 2 for y
    spatial_scale,
):
    """First cell of a RoI along one axis and the number of cells it spans, at least 1, both int32."""
    corner_ptr = rois_ptr + roi.to(tl.int64) * 5 + column
    start = round_half_away(tl.load(corner_ptr) * spatial_scale)
    end = round_half_away(tl.load(corner_ptr + 2) * spatial_scale)
    return start, tl.maximum(end - start + 1, 1)


@triton.jit
def bin_edges(start, size, index, num_bins, limit):
    """Cells [low, high) of bin `index`, clipped to [0, limit); `num_bins` is a float."""
    step = tl.div_rn(size.to(tl.float32), num_bins)
    low = start + tl.floor(index * step).to(tl.int32)
    high = start + tl.ceil((index + 1) * step).to(tl.int32)
    return tl.minimum(tl.maximum(low, 0), limit), tl.minimum(tl.maximum(high, 0), limit)
