"""How the bins of a region of interest lie on the cells of a feature map.

All of it is meant for kernels launched with `enable_fp_fusion=False`: a fused multiply-add moves the edge of a bin.
"""

import triton
import triton.language as tl

# Corners are held within this many cells, so that no sum of int32 cells wraps around; fp32 holds the number exactly.
FAR = tl.constexpr(1e9)


@triton.jit
def round_away(x):
    """To the nearest cell, half away from zero, as int32."""
    size = tl.abs(x)
    whole = tl.floor(size)
    whole = tl.minimum(tl.where(size - whole >= 0.5, whole + 1.0, whole), FAR)
    return tl.where(x < 0.0, -whole, whole).to(tl.int32)


@triton.jit
def image_of(rois_ptr, roi, num_images):
    """The image that a RoI lies in; -1 for padding: an index outside [0, num_images), or a NaN."""
    base = rois_ptr + roi.to(tl.int64) * 5
    image = tl.load(base)
    x1 = tl.load(base + 1)
    y1 = tl.load(base + 2)
    x2 = tl.load(base + 3)
    y2 = tl.load(base + 4)
    known = (x1 == x1) & (y1 == y1) & (x2 == x2) & (y2 == y2)
    return tl.where(known & (image >= 0.0) & (image < num_images), image, -1.0).to(tl.int32)


@triton.jit
def axis_of(rois_ptr, roi, column, spatial_scale):
    """First cell of a RoI along one axis and how many it spans; `column` is 1 for x and 2 for y."""
    base = rois_ptr + roi.to(tl.int64) * 5 + column
    start = round_away(tl.load(base) * spatial_scale)
    end = round_away(tl.load(base + 2) * spatial_scale)
    return start, tl.maximum(end - start + 1, 1)


@triton.jit
def edges(start, size, index, num_bins, limit):
    """Cells [low, high) of bin `index`, cut to [0, limit); `num_bins` is a float."""
    step = tl.div_rn(size.to(tl.float32), num_bins)
    low = start + tl.floor(index * step).to(tl.int32)
    high = start + tl.ceil((index + 1) * step).to(tl.int32)
    return tl.minimum(tl.maximum(low, 0), limit), tl.minimum(tl.maximum(high, 0), limit)
