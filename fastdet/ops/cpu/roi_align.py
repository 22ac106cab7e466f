"""RoI align on the CPU: torchvision's operator over slices in threads, and a way for boxes that are too vast for it."""

import math
from collections.abc import Sequence

import torch
import torchvision.ops  # noqa: F401  (registers the operators that are called)
from torch import Tensor

from fastdet.ops import _pyramid, _rois

# Corners are held within this many cells: so far out neighbouring fp32 numbers are still an eighth of a cell apart.
FAR = float(1 << 20)
# Products in one call of torchvision's operator, which runs in one thread: about two milliseconds.
SLICE = 1 << 20
# torchvision's operator writes down the samples of a box, 32 bytes each: a box with more of them is pooled otherwise.
VAST = 1 << 20


def _cells(rois: Tensor, spatial_scale: float, num_images: int) -> Tensor:
    """The RoIs with corners in cells; padding becomes a point of image 0 far outside."""
    corners = (rois[:, 1:] * spatial_scale).clamp(-FAR, FAR)
    known = _rois.known(rois, num_images)
    images = rois[:, :1].where(known, rois.new_zeros(()))
    return torch.cat([images, corners.where(known, rois.new_full((), -FAR))], dim=1)


def _bins(low: Tensor, high: Tensor, num_bins: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """Where the first bin begins along one axis and how long each is, in cells."""
    start, end = (low - 0.5, high - 0.5) if aligned else (low, high)
    size = end - start
    return start, (size if aligned else size.clamp(min=1)) / num_bins


def _usual_and_vast(
    cells: Tensor, pooled_height: int, pooled_width: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """bool [K] twice: which boxes torchvision's operator can pool, and which have too many samples for it.

    Adaptive boxes alone can be vast, or have no sample at all: inverted ones, on whose counts that operator trips.
    """
    if sampling_ratio > 0:
        return torch.ones(len(cells), dtype=torch.bool), torch.zeros(len(cells), dtype=torch.bool)
    _, tall = _bins(cells[:, 2], cells[:, 4], pooled_height, aligned)
    _, wide = _bins(cells[:, 1], cells[:, 3], pooled_width, aligned)
    samples = tall.ceil().clamp(min=0) * pooled_height * wide.ceil().clamp(min=0) * pooled_width
    return (samples > 0) & (samples <= VAST), samples > VAST


def _weights(low: Tensor, high: Tensor, num_bins: int, limit: int, aligned: bool) -> Tensor:
    """What the bins of one box take of each cell along one axis, [num_bins, limit], with one sample a cell or more."""
    start, size = _bins(low, high, num_bins, aligned)
    count = max(int(size.ceil()), 1)
    index = torch.arange(num_bins, dtype=low.dtype)[:, None]
    place = start + index * size + (torch.arange(count, dtype=low.dtype) + 0.5) * size / count
    on_map = (place >= -1) & (place <= limit)
    held = place.clamp(0, limit - 1)
    near = held.long()
    share = held - near
    weights = low.new_zeros(num_bins, limit)
    weights.scatter_add_(1, near, (1 - share) * on_map)
    weights.scatter_add_(1, (near + 1).clamp(max=limit - 1), share * on_map)
    return weights / count


def _weights_of(cells: Tensor, bins: tuple[int, int], shape: Sequence[int], aligned: bool) -> tuple[Tensor, Tensor]:
    """What the bins of one row of cells [5] take of the rows and of the columns of a map of `shape` [.., H, W]."""
    _, left, top, right, bottom = cells
    down = _weights(top, bottom, bins[0], shape[-2], aligned)
    return down, _weights(left, right, bins[1], shape[-1], aligned)


def _parts(
    rois: Tensor, shapes: Sequence[Sequence[int]], scales: Sequence[float], edges: list[float]
) -> list[tuple[int, Tensor, Tensor]]:
    """For each level with a cell and a box: its number, which rows of `rois` are its own, and those rows in cells."""
    levels = _pyramid.levels(rois, edges)
    parts = []
    for level, (shape, scale) in enumerate(zip(shapes, scales, strict=True)):
        rows = (levels == level).nonzero()[:, 0]
        if len(rows) and math.prod(shape):
            parts.append((level, rows, _cells(rois[rows], scale, shape[0])))
    return parts


def roi_align_cpu(
    rois: Tensor,
    features: list[Tensor],
    scales: list[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> Tensor:
    bins = (pooled_height, pooled_width)
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], *bins)
    rois = rois.to(_rois.wide(features[0]).dtype)
    edges = _pyramid.edges(scales, canonical_scale, canonical_level, rois.dtype)
    step = SLICE // max(pooled.shape[1:].numel() * max(sampling_ratio, 1) ** 2, 1)
    for level, rows, cells in _parts(rois, [level.shape for level in features], scales, edges):
        map = _rois.wide(features[level]).contiguous()
        usual, vast = _usual_and_vast(cells, *bins, sampling_ratio, aligned)
        for row, cell in zip(rows[vast], cells[vast], strict=True):
            down, across = _weights_of(cell, bins, map.shape, aligned)
            pooled[row] = _between(down, map[int(cell[0])], across.t())
        rows, cells = rows[usual], cells[usual]

        def fill(first: int, last: int, map: Tensor = map, rows: Tensor = rows, cells: Tensor = cells) -> None:
            pooled[rows[first:last]] = torch.ops.torchvision.roi_align(
                map, cells[first:last], 1.0, *bins, sampling_ratio, aligned
            ).to(pooled.dtype)

        _rois.in_slices(len(rows), step, fill)
    return pooled


def roi_align_backward_cpu(
    grad: Tensor,
    rois: Tensor,
    sizes: list[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> list[Tensor]:
    shapes = shapes_of(sizes)
    grads = [grad.new_zeros(shape) for shape in shapes]
    wide = _rois.wide(grad)
    rois = rois.to(wide.dtype)
    edges = _pyramid.edges(scales, canonical_scale, canonical_level, rois.dtype)
    bins = (grad.shape[2], grad.shape[3])
    for level, rows, cells in _parts(rois, shapes, scales, edges):
        _, channels, height, width = shapes[level]
        usual, vast = _usual_and_vast(cells, *bins, sampling_ratio, aligned)
        total = wide.new_zeros(shapes[level])
        part, others = wide[rows[usual]], cells[usual]

        # A slice of channels, never of RoIs: a cell's sum keeps its order.
        def fill(
            first: int,
            last: int,
            total: Tensor = total,
            part: Tensor = part,
            cells: Tensor = others,
            map: tuple[int, int] = (height, width),
        ) -> None:
            total[:, first:last] = torch.ops.torchvision._roi_align_backward(
                part[:, first:last], cells, 1.0, *bins, len(total), last - first, *map, sampling_ratio, aligned
            )

        _rois.in_slices(channels, SLICE // max(part[:, :1].numel() * max(sampling_ratio, 1) ** 2, 1), fill)
        for row, cell in zip(rows[vast], cells[vast], strict=True):
            down, across = _weights_of(cell, bins, shapes[level], aligned)
            total[int(cell[0])] += _between(down.t(), wide[row], across)
        grads[level].copy_(total)
    return grads


def _between(left: Tensor, maps: Tensor, right: Tensor) -> Tensor:
    """`left @ maps @ right`, in their own dtype under autocast too."""
    with torch.autocast("cpu", enabled=False):
        return left @ maps @ right


def shapes_of(sizes: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The shape of each level of `sizes`: batch, channels, then height and width of one level after another."""
    batch, channels, *sides = sizes
    return [(batch, channels, *side) for side in zip(sides[::2], sides[1::2], strict=True)]
