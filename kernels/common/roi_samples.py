"""Where the samples of a region of interest lie on the feature maps of a pyramid.

All of it is meant for kernels launched with `enable_fp_fusion=False`: a fused multiply-add moves a sample.
"""

import triton
import triton.language as tl

# Corners are held within this many cells: so far out neighbouring fp32 numbers are still an eighth of a cell apart.
FAR = tl.constexpr(1048576.0)
# Up to so many samples a bin has along one axis, nothing is gained by looking for those on the map.
FEW = tl.constexpr(32)


@triton.jit
def bins_of(rois_ptr, roi, column, scale, num_bins, SAMPLING: tl.constexpr, ALIGNED: tl.constexpr):
    """First cell and cells a bin of a RoI along one axis, and samples a bin; `column` is 1 for x and 2 for y."""
    base = rois_ptr + roi.to(tl.int64) * 5 + column
    start = tl.minimum(tl.maximum(tl.load(base) * scale, -FAR), FAR)
    end = tl.minimum(tl.maximum(tl.load(base + 2) * scale, -FAR), FAR)
    if ALIGNED:
        start -= 0.5
        end -= 0.5
        size = end - start
    else:
        size = tl.maximum(end - start, 1.0)
    size = tl.div_rn(size, num_bins * 1.0)
    if SAMPLING > 0:
        count = tl.cast(SAMPLING, tl.int32)
    else:
        count = tl.maximum(tl.ceil(size), 0.0).to(tl.int32)
    return start, size, count


@triton.jit
def position(start, size, index, sample, num_samples):
    """Where a sample of bin `index` lies, in cells."""
    return start + index * size + tl.div_rn((sample + 0.5) * size, num_samples * 1.0)


@triton.jit
def reaching(start, size, index, num_samples, limit):
    """Samples [first, last) of bin `index`: all that lie on the map, and of many samples few others."""
    many = num_samples > FEW
    per_cell = tl.div_rn(num_samples * 1.0, tl.where(many, size, 1.0))
    to_map = (-1.0 - (start + index * size)) * per_cell
    past_map = to_map + (limit + 1) * per_cell
    lower = tl.minimum(to_map, past_map) - 3.0
    upper = tl.maximum(to_map, past_map) + 3.0
    first = tl.where(many, tl.minimum(tl.maximum(lower, 0.0), num_samples * 1.0), 0.0)
    last = tl.where(many, tl.minimum(tl.maximum(upper, 0.0), num_samples * 1.0), num_samples * 1.0)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def cells_of(y, limit):
    """The two cells that a sample lies between, the share of the second, and whether it lies on the map at all."""
    on_map = (y >= -1.0) & (y <= limit) & (limit > 0)
    final = tl.maximum(limit - 1, 0)
    held = tl.minimum(tl.maximum(y, 0.0), final * 1.0)
    low = held.to(tl.int32)
    return low, tl.minimum(low + 1, final), held - low, on_map
