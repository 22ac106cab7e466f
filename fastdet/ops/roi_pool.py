"""RoI max-pool: the largest value of each bin of each region of interest, as torchvision computes it.

Source: Girshick 2015 (arXiv:1504.08083), section 2.1. Corners round half away from zero and the cells of both belong to
the region, neighboring bins may share a row or column of cells, the first maximum in scan order takes the gradient.
"""

from typing import Any

import torch
from torch import Tensor

from fastdet.ops import _checks, _rois
from fastdet.ops._library import define, overridable
from fastdet.ops.cpu.roi_pool import empty_outputs, roi_pool_backward_cpu, roi_pool_cpu


def roi_pool_cuda(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    from fastdet.kernels import roi_pool as kernel

    pooled, argmax = empty_outputs(input, rois, pooled_height, pooled_width, torch.channels_last)
    if pooled.numel():
        features = input.contiguous(memory_format=torch.channels_last)
        kernel.launch(features, rois.contiguous(), pooled, argmax, spatial_scale=spatial_scale)
    return pooled, argmax


def roi_pool_backward_cuda(
    grad: Tensor, rois: Tensor, argmax: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, *size: int
) -> Tensor:
    """`size` of the features: batch, channels, height, width."""
    from fastdet.kernels import roi_pool as kernel

    grad_input = _rois.empty(grad, size, torch.channels_last)
    if not grad.numel() or not grad_input.numel():
        return grad_input.zero_()
    batch, _, height, width = size
    num_rois = len(rois)
    rows, columns = kernel.tiles(height, width)
    longest = kernel.visits_bound(num_rois, height, width, pooled_height, pooled_width)
    kernel.launch_backward(
        grad.contiguous(memory_format=torch.channels_last),
        rois.contiguous(),
        argmax.contiguous(memory_format=torch.channels_last),
        grad_input,
        images=grad.new_empty(num_rois, dtype=torch.int32),
        extents=grad.new_empty(batch, 3, dtype=torch.int64),
        spans=grad.new_empty(2, rows + columns + 2, num_rois, dtype=torch.int32),
        bounds=grad.new_empty(batch * rows * columns, 2, dtype=torch.int64),
        visits=grad.new_empty(longest, dtype=torch.int32),
        spatial_scale=spatial_scale,
    )
    return grad_input


def roi_pool_fake(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    return empty_outputs(input, rois, pooled_height, pooled_width)


def roi_pool_backward_fake(grad: Tensor, *args: Any) -> Tensor:
    return _rois.empty(grad, args[-4:])


define(
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width)"
    " -> (Tensor, Tensor)",
    cpu=roi_pool_cpu,
    cuda=roi_pool_cuda,
    fake=roi_pool_fake,
    autograd=_rois.roi_pool_autograd,
)


define(
    "roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, SymInt batch, SymInt channels, SymInt height, SymInt width) -> Tensor",
    cpu=roi_pool_backward_cpu,
    cuda=roi_pool_backward_cuda,
    fake=roi_pool_backward_fake,
    autograd=_rois.roi_pool_backward_autograd,
)


@overridable
def roi_pool(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int] | list[int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """The largest feature in each bin of each box, [K, C, height, width]; torchvision's `roi_pool`, bit for bit.

    Args:
        input: features [B, C, H, W], fp32, fp16 or bf16; float64 on the CPU.
        boxes: [K, 5], index of the image and x1, y1, x2, y2 in pixels; or one [L, 4] for each image. Floating
            point, also of another dtype than `input`.
        output_size: bins along height and width, or one int for both.
        spatial_scale: cells per pixel.

    A corner rounds half away from zero to a cell, and the cells of both corners belong to the box. A bin outside the
    features is 0; NaN features are ignored. Differentiable in `input`; the gradient has the same bits on every
    run. A box with a NaN corner pools nothing, and so does one on the GPU whose image does not exist.

    Raises:
        TypeError: an argument is not a floating-point tensor; float64 on a GPU.
        ValueError: shapes or devices that do not fit, a list not as long as the batch, an output size below 1, a scale
            that is not positive; on the CPU, an image index outside the batch, or 2**31 features or more.
    """
    features, bins = _rois.check_features(input), _rois.check_output_size(output_size)
    scale = _checks.positive("spatial_scale", spatial_scale)
    return torch.ops.fastdet.roi_pool(features, _rois.check_rois(boxes, features), scale, *bins)[0]


def batched_roi_pool(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int] | list[int],
    spatial_scale: float,
    valid: Tensor | None = None,
) -> Tensor:
    """`roi_pool` of equally many boxes of each image, [B, S, C, height, width], without a host sync.

    Args:
        input, output_size, spatial_scale: as of `roi_pool`.
        boxes: [B, S, 4], x1, y1, x2, y2 in pixels; floating point.
        valid: bool [B, S]; a box where it is False is padding, gives zeros and no gradient. None: all are valid.

    Raises:
        TypeError: an argument is not a floating-point tensor, or `valid` is not bool; else as `roi_pool`.
        ValueError: shapes or devices that do not fit, an output size below 1, a scale that is not positive.
    """
    features, bins = _rois.check_features(input), _rois.check_output_size(output_size)
    scale = _checks.positive("spatial_scale", spatial_scale)
    rois = _rois.check_batched_rois(boxes, valid, features)
    return torch.ops.fastdet.roi_pool(features, rois, scale, *bins)[0].unflatten(0, boxes.shape[:2])
