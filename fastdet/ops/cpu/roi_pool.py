"""RoI max-pool on the CPU: torchvision's operators over slices, in threads."""

import torch
import torchvision.ops  # noqa: F401  (registers the operators that are called)
from torch import Tensor

from fastdet.ops import _rois
from fastdet.ops.cpu.threads import run_in_slices

# Corners are clamped to this many cells, so that no sum of int32 cells wraps around.
CELL_LIMIT = 1e9
# Values pooled by one call of torchvision's operator, which runs in one thread: about two milliseconds.
SLICE = 1 << 17


def _to_cells(rois: Tensor, spatial_scale: float, num_images: int) -> Tensor:
    """The RoIs with corners in whole cells, rounded half away from zero."""
    corners = rois[:, 1:] * spatial_scale
    size = corners.abs()
    whole = size.floor()
    whole += size - whole >= 0.5
    return _rois.rois_in_cells(rois, whole.clamp(max=CELL_LIMIT).copysign(corners), num_images, CELL_LIMIT)


def empty_outputs(
    input: Tensor, rois: Tensor, pooled_height: int, pooled_width: int, layout: torch.memory_format | None = None
) -> tuple[Tensor, Tensor]:
    """Unwritten: pooled features, and the cell that each came from, in the smaller type that holds every cell."""
    shape = (rois.shape[0], input.shape[1], pooled_height, pooled_width)
    small = input.shape[2] * input.shape[3] <= torch.iinfo(torch.int16).max
    return _rois.empty(input, shape, layout), _rois.empty(input, shape, layout, torch.int16 if small else torch.int32)


def roi_pool_cpu(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    pooled, argmax = empty_outputs(input, rois, pooled_height, pooled_width)
    if pooled.numel():
        _rois.check_counts("input", input.shape)
        features = _rois.widen(input).contiguous()
        cells = _to_cells(rois.to(features.dtype), spatial_scale, input.shape[0])

        def fill(first: int, last: int) -> None:
            pooled[first:last], argmax[first:last] = torch.ops.torchvision.roi_pool(
                features, cells[first:last], 1.0, pooled_height, pooled_width
            )

        run_in_slices(len(rois), pooled[0].numel(), SLICE, fill)
    return pooled, argmax


def roi_pool_backward_cpu(
    grad: Tensor, rois: Tensor, argmax: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, *size: int
) -> Tensor:
    """`size` of the features: batch, channels, height, width."""
    grad_input = grad.new_empty(size)
    if not grad.numel() or not grad_input.numel():
        return grad_input.zero_()
    _rois.check_counts("grad", grad.shape)
    _rois.check_counts("input", size)
    batch, channels, height, width = size
    wide = _rois.widen(grad)
    cells = _to_cells(rois.to(wide.dtype), spatial_scale, batch)

    # A slice of channels, never of RoIs: a cell's sum keeps its order.
    def fill(first: int, last: int) -> None:
        places = argmax[:, first:last].to(torch.int32, memory_format=torch.contiguous_format)
        bins, shape = (pooled_height, pooled_width), (batch, last - first, height, width)
        grad_input[:, first:last] = torch.ops.torchvision._roi_pool_backward(
            wide[:, first:last], cells, places, 1.0, *bins, *shape
        )

    run_in_slices(channels, grad.numel() // channels, SLICE, fill)
    return grad_input
