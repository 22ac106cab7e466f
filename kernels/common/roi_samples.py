"""Where the sampling points of a region of interest (RoI) lie on a feature map, for RoI align.

All of it along one axis: a RoI's bins, and so its samples, are products of rows and columns.

For kernels launched with `enable_fp_fusion=False` only: a fused multiply-add moves a sample.
"""

import triton
import triton.language as tl

# Corners are clamped to this many cells from 0, where adjacent fp32 numbers are still an eighth of a cell apart.
MAX_POSITION = tl.constexpr(1048576.0)
# With at most this many samples along an axis of a bin, skipping those off the map does not pay.
MAX_UNSKIPPED = tl.constexpr(32)


@triton.jit
def bin_geometry(
    rois_ptr,  # [R, 5] fp32: image index, x1, y1, x2, y2 in pixels
    roi,  # int32
    column,  # 1 for x, 2 for y
    scale,  # cells per pixel
    num_bins,
    SAMPLING: tl.constexpr,  # samples per bin, 0 for adaptive: the cells of a bin, rounded up
    ALIGNED: tl.constexpr,
):
    """Start of a RoI in cells, size of its bins in cells (both fp32), and samples per bin (int32)."""
    corner_ptr = rois_ptr + roi.to(tl.int64) * 5 + column
    start = tl.minimum(tl.maximum(tl.load(corner_ptr) * scale, -MAX_POSITION), MAX_POSITION)
    end = tl.minimum(tl.maximum(tl.load(corner_ptr + 2) * scale, -MAX_POSITION), MAX_POSITION)
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
        # Compiled, `ceil` takes a subnormal size for 0.
        count = tl.maximum(tl.ceil(size), tl.where(size > 0.0, 1.0, 0.0)).to(tl.int32)
    return start, size, count


@triton.jit
def sample_position(start, size, index, sample, num_samples):
    """Position in cells of a sample of bin `index`."""
    return start + index * size + tl.div_rn((sample + 0.5) * size, num_samples * 1.0)


@triton.jit
def samples_on_map(start, size, index, num_samples, limit):
    """A range [first, last) of the samples of bin `index` that has all those on the map.

    It is all samples if they are at most MAX_UNSKIPPED, else it has at most a few that are off the map.
    """
    skip = num_samples > MAX_UNSKIPPED
    samples_per_cell = tl.div_rn(num_samples * 1.0, tl.where(skip, size, 1.0))
    # The map accepts positions in [-1, limit]; 3 samples on either side outweigh the rounding.
    to_map = (-1.0 - (start + index * size)) * samples_per_cell
    past_map = to_map + (limit + 1) * samples_per_cell
    lower = tl.minimum(to_map, past_map) - 3.0
    upper = tl.maximum(to_map, past_map) + 3.0
    first = tl.where(skip, tl.minimum(tl.maximum(lower, 0.0), num_samples * 1.0), 0.0)
    last = tl.where(skip, tl.minimum(tl.maximum(upper, 0.0), num_samples * 1.0), num_samples * 1.0)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def bilinear_cells(position, limit):
    """The two cells around a position, the weight of the second, and whether the position is on the map at all."""
    on_map = (position >= -1.0) & (position <= limit) & (limit > 0)
    last_cell = tl.maximum(limit - 1, 0)
    clamped = tl.minimum(tl.maximum(position, 0.0), last_cell * 1.0)
    low = clamped.to(tl.int32)
    return low, tl.minimum(low + 1, last_cell), clamped - low, on_map
