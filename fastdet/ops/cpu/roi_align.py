"""RoI align on the CPU: torchvision's operators over slices in threads, and matrix products for the largest boxes."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torchvision.ops  # noqa: F401  (registers the operators that are called)
from torch import Tensor

from fastdet.ops import _pyramid, _rois
from fastdet.ops.cpu.threads import run_in_slices

# Corners are clamped to this many cells: up to there neighboring fp32 numbers are at most an eighth of a cell apart.
CELL_LIMIT = float(1 << 20)
# Products in one call of torchvision's operator, which runs in one thread: about two milliseconds.
SLICE = 1 << 20
# torchvision's operator stores the samples of a box, 32 bytes each: a box with more of them is pooled by products.
MAX_SAMPLES = 1 << 20


def _split_axis(low: Tensor, high: Tensor, num_bins: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """The start of the first bin along one axis and the length of each bin, in cells."""
    start, end = (low - 0.5, high - 0.5) if aligned else (low, high)
    size = end - start
    return start, (size if aligned else size.clamp(min=1)) / num_bins


def _split_by_samples(
    cells: Tensor, pooled_height: int, pooled_width: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """bool [K] twice: the boxes that torchvision's operator can pool, and those with too many samples for it.

    Only adaptive boxes can be large, or have no sample at all: inverted ones, whose counts that operator mishandles.
    """
    if sampling_ratio > 0:
        return torch.ones(len(cells), dtype=torch.bool), torch.zeros(len(cells), dtype=torch.bool)
    _, height = _split_axis(cells[:, 2], cells[:, 4], pooled_height, aligned)
    _, width = _split_axis(cells[:, 1], cells[:, 3], pooled_width, aligned)
    samples = height.ceil().clamp(min=0) * pooled_height * width.ceil().clamp(min=0) * pooled_width
    return (samples > 0) & (samples <= MAX_SAMPLES), samples > MAX_SAMPLES


def _axis_weights(low: Tensor, high: Tensor, num_bins: int, limit: int, aligned: bool) -> Tensor:
    """The weights of the cells along one axis in the bins of one box, [num_bins, limit]; a sample a cell or more."""
    start, size = _split_axis(low, high, num_bins, aligned)
    count = max(int(size.ceil()), 1)
    index = torch.arange(num_bins, dtype=low.dtype, device="cpu")[:, None]
    place = start + index * size + (torch.arange(count, dtype=low.dtype, device="cpu") + 0.5) * size / count
    on_map = (place >= -1) & (place <= limit)
    place = place.clamp(0, limit - 1)
    cell = place.long()
    fraction = place - cell
    weights = low.new_zeros(num_bins, limit)
    weights.scatter_add_(1, cell, (1 - fraction) * on_map)
    weights.scatter_add_(1, (cell + 1).clamp(max=limit - 1), fraction * on_map)
    return weights / count


def _box_weights(cells: Tensor, bins: tuple[int, int], shape: Sequence[int], aligned: bool) -> tuple[Tensor, Tensor]:
    """Of one box, a row [5], the weights of the rows [bins, H] and of the columns [bins, W] of a map [..., H, W]."""
    _, left, top, right, bottom = cells
    return (
        _axis_weights(top, bottom, bins[0], shape[-2], aligned),
        _axis_weights(left, right, bins[1], shape[-1], aligned),
    )


def _product(left: Tensor, maps: Tensor, right: Tensor) -> Tensor:
    """`left @ maps @ right`, in their own dtype under autocast too."""
    with torch.autocast("cpu", enabled=False):
        return left @ maps @ right


def _rows_by_level(
    rois: Tensor, shapes: Sequence[Sequence[int]], scales: Sequence[float], canonical: tuple[Any, ...]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each level that has cells and boxes: its index, the indices of its rows in `rois`, the rows in cells."""
    levels = _pyramid.assign_levels(rois, _pyramid.level_edges(scales, *canonical, dtype=rois.dtype))
    for level, (shape, scale) in enumerate(zip(shapes, scales, strict=True)):
        rows = (levels == level).nonzero()[:, 0]
        if len(rows) and math.prod(shape):
            _rois.check_counts("features", shape)
            corners = (rois[rows, 1:] * scale).clamp(-CELL_LIMIT, CELL_LIMIT)
            yield level, rows, _rois.rois_in_cells(rois[rows], corners, shape[0], CELL_LIMIT)


def roi_align_cpu(
    rois: Tensor,
    features: list[Tensor],
    scales: list[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    *canonical: Any,
) -> Tensor:
    bins = (pooled_height, pooled_width)
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], *bins)
    rois = rois.to(_rois.widen(features[0]).dtype)
    products = pooled.shape[1:].numel() * max(sampling_ratio, 1) ** 2
    for level, rows, cells in _rows_by_level(rois, [level.shape for level in features], scales, canonical):
        map = _rois.widen(features[level]).contiguous()
        regular, large = _split_by_samples(cells, *bins, sampling_ratio, aligned)
        for row, cell in zip(rows[large], cells[large], strict=True):
            down, across = _box_weights(cell, bins, map.shape, aligned)
            pooled[row] = _product(down, map[int(cell[0])], across.t())
        rows, cells = rows[regular], cells[regular]

        def fill(first: int, last: int, map: Tensor = map, rows: Tensor = rows, cells: Tensor = cells) -> None:
            pooled[rows[first:last]] = torch.ops.torchvision.roi_align(
                map, cells[first:last], 1.0, *bins, sampling_ratio, aligned
            ).to(pooled.dtype)

        run_in_slices(len(rows), products, SLICE, fill)
    return pooled


def roi_align_backward_cpu(
    grad: Tensor,
    rois: Tensor,
    sizes: list[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    *canonical: Any,
) -> list[Tensor]:
    _rois.check_counts("grad", grad.shape)
    shapes = _rois.level_shapes(sizes)
    grads = [grad.new_zeros(shape) for shape in shapes]
    wide, bins = _rois.widen(grad), (grad.shape[2], grad.shape[3])
    for level, rows, cells in _rows_by_level(rois.to(wide.dtype), shapes, scales, canonical):
        regular, large = _split_by_samples(cells, *bins, sampling_ratio, aligned)
        total = wide.new_zeros(shapes[level])

        # A slice of channels, never of RoIs: a cell's sum keeps its order.
        def fill(
            first: int,
            last: int,
            total: Tensor = total,
            part: Tensor = wide[rows[regular]],
            cells: Tensor = cells[regular],
        ) -> None:
            batch, _, *sides = total.shape
            total[:, first:last] = torch.ops.torchvision._roi_align_backward(
                part[:, first:last], cells, 1.0, *bins, batch, last - first, *sides, sampling_ratio, aligned
            )

        products = int(regular.sum()) * math.prod(bins) * max(sampling_ratio, 1) ** 2
        run_in_slices(total.shape[1], products, SLICE, fill)
        for row, cell in zip(rows[large], cells[large], strict=True):
            down, across = _box_weights(cell, bins, total.shape, aligned)
            total[int(cell[0])] += _product(down.t(), wide[row], across)
        grads[level].copy_(total)
    return grads
