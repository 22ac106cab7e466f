"""RoI max-pool: the largest value of each bin of each region of interest, as torchvision computes it.

Source: Girshick 2015 (arXiv:1504.08083), section 2.1. Corners round half away from zero and the cells of both belong to
the region, neighbouring bins may share a row or column of cells, the first maximum in scan order takes the gradient.
"""

from typing import Any

import torch
import torchvision.ops  # noqa: F401  (registers the operators that the CPU implementation calls)
from torch import Tensor

from fastdet.ops import _checks, _rois
from fastdet.ops._library import define

# Corners are held within this many cells, so that no sum of int32 cells wraps around.
FAR = 1e9
# Values pooled by one call of torchvision's operator, which runs in one thread: about two milliseconds.
SLICE = 1 << 17


def _cells(rois: Tensor, spatial_scale: float, num_images: int) -> Tensor:
    """The RoIs with corners in whole cells; padding becomes a cell of image 0 far outside."""
    corners = rois[:, 1:] * spatial_scale
    size = corners.abs()
    whole = size.floor()
    whole += size - whole >= 0.5
    images = rois[:, :1]
    known = _rois.known(rois, num_images)
    return torch.cat(
        [
            images.where(known, images.new_zeros(())),
            whole.clamp(max=FAR).copysign(corners).where(known, images.new_full((), -FAR)),
        ],
        dim=1,
    )


def roi_pool_cpu(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    pooled, argmax = _outputs(input, rois, pooled_height, pooled_width, torch.contiguous_format)
    if pooled.numel():
        features = _rois.wide(input).contiguous()
        cells = _cells(rois.to(features.dtype), spatial_scale, input.shape[0])

        def fill(first: int, last: int) -> None:
            values, indices = torch.ops.torchvision.roi_pool(
                features, cells[first:last], 1.0, pooled_height, pooled_width
            )
            pooled[first:last] = values
            argmax[first:last] = indices

        _rois.in_slices(len(rois), SLICE // pooled[0].numel(), fill)
    return pooled, argmax


def roi_pool_backward_cpu(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
) -> Tensor:
    grad_input = grad.new_empty(batch, channels, height, width)
    if not grad.numel() or not grad_input.numel():
        return grad_input.zero_()
    wide = _rois.wide(grad)
    cells = _cells(rois.to(wide.dtype), spatial_scale, batch)

    # A slice of channels, never of RoIs: a cell's sum keeps its order.
    def fill(first: int, last: int) -> None:
        grad_input[:, first:last] = torch.ops.torchvision._roi_pool_backward(
            wide[:, first:last],
            cells,
            argmax[:, first:last].to(torch.int32, memory_format=torch.contiguous_format),
            1.0,
            pooled_height,
            pooled_width,
            batch,
            last - first,
            height,
            width,
        )

    _rois.in_slices(channels, SLICE // (grad.numel() // channels), fill)
    return grad_input


def roi_pool_cuda(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    from fastdet.kernels import roi_pool as kernel

    pooled, argmax = _outputs(input, rois, pooled_height, pooled_width, torch.channels_last)
    if pooled.numel():
        features = input.contiguous(memory_format=torch.channels_last)
        kernel.launch(features, rois.contiguous(), pooled, argmax, spatial_scale=spatial_scale)
    return pooled, argmax


def roi_pool_backward_cuda(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
) -> Tensor:
    from fastdet.kernels import roi_pool as kernel

    grad_input = _empty(grad, (batch, channels, height, width), torch.channels_last)
    if not grad.numel() or not grad_input.numel():
        return grad_input.zero_()
    num_rois = len(rois)
    longest = kernel.visits_bound(num_rois, height, width, pooled_height, pooled_width)
    kernel.launch_backward(
        grad.contiguous(memory_format=torch.channels_last),
        rois.contiguous(),
        argmax.contiguous(memory_format=torch.channels_last),
        grad_input,
        images=grad.new_empty(num_rois, dtype=torch.int32),
        extents=grad.new_empty(batch, 3, dtype=torch.int64),
        spans=grad.new_empty(2, height + width + 2, num_rois, dtype=torch.int32),
        bounds=grad.new_empty(batch * height * width, 2, dtype=torch.int64),
        visits=grad.new_empty(longest, dtype=torch.int32),
        spatial_scale=spatial_scale,
    )
    return grad_input


def _empty(
    like: Tensor, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def _outputs(
    input: Tensor, rois: Tensor, pooled_height: int, pooled_width: int, layout: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """Unwritten: pooled features, and of each the cell that it came from, in the smaller type where that holds every
    cell of the map."""
    shape = (rois.shape[0], input.shape[1], pooled_height, pooled_width)
    small = input.shape[2] * input.shape[3] <= torch.iinfo(torch.int16).max
    return _empty(input, shape, layout), _empty(input, shape, layout, torch.int16 if small else torch.int32)


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.device.type == "cuda" else torch.contiguous_format


def roi_pool_fake(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Tensor, Tensor]:
    return _outputs(input, rois, pooled_height, pooled_width, _layout(input))


def roi_pool_backward_fake(
    grad: Tensor,
    rois: Tensor,
    argmax: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
) -> Tensor:
    return _empty(grad, (batch, channels, height, width), _layout(grad))


class _RoiPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int
    ) -> tuple[Tensor, Tensor]:
        pooled, argmax = _below_autograd(input, rois, spatial_scale, pooled_height, pooled_width)
        ctx.save_for_backward(rois, argmax)
        ctx.scalars = (spatial_scale, pooled_height, pooled_width, *input.shape)
        ctx.mark_non_differentiable(argmax)
        return pooled, argmax

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_input = torch.ops.fastdet.roi_pool_backward(grad, *ctx.saved_tensors, *ctx.scalars)
        return grad_input, None, None, None, None


def _below_autograd(*args: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastdet.roi_pool(*args)


def roi_pool_autograd(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and input.requires_grad:
        return _RoiPool.apply(input, *args)
    return _below_autograd(input, *args)


define(
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width)"
    " -> (Tensor, Tensor)",
    cpu=roi_pool_cpu,
    cuda=roi_pool_cuda,
    fake=roi_pool_fake,
    autograd=roi_pool_autograd,
)
define(
    "roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, SymInt pooled_height,"
    " SymInt pooled_width, SymInt batch, SymInt channels, SymInt height, SymInt width) -> Tensor",
    cpu=roi_pool_backward_cpu,
    cuda=roi_pool_backward_cuda,
    fake=roi_pool_backward_fake,
)


def roi_pool(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """The largest feature in each bin of each box, [K, C, height, width]; torchvision's `roi_pool`, bit for bit.

    Args:
        input: features [B, C, H, W], fp32, fp16 or bf16; float64 on the CPU.
        boxes: [K, 5], index of the image and x1, y1, x2, y2 in pixels; or one [L, 4] for each image. fp32, or
            the dtype of `input`.
        output_size: bins along height and width, or one number for both.
        spatial_scale: cells per pixel.

    A corner rounds half away from zero to a cell, and the cells of both corners belong to the box. A bin outside the
    features is 0; NaN features are passed over. Differentiable once, in `input`; the gradient has the same bits on
    every run. A box with a NaN corner pools nothing, and so does one on the GPU whose image does not exist.

    Raises:
        TypeError: an argument is not a floating-point tensor; float64 on a GPU, or boxes of a dtype that is neither
            fp32 nor that of `input`.
        ValueError: shapes or devices that do not fit, a list not as long as the batch, an output size below 1, a scale
            that is not positive; on the CPU, an image index outside the batch.
    """
    features = _rois.features(input)
    pooled_height, pooled_width = _rois.output_size(output_size)
    scale = _checks.positive("spatial_scale", spatial_scale)
    rois = _rois.of_any(boxes, features)
    pooled, _ = torch.ops.fastdet.roi_pool(features, rois, scale, pooled_height, pooled_width)
    return pooled


def batched_roi_pool(
    input: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    valid: Tensor | None = None,
) -> Tensor:
    """`roi_pool` of equally many boxes of each image, [B, S, C, height, width], without waiting for the device.

    Args:
        input: features [B, C, H, W], fp32, fp16 or bf16; float64 on the CPU.
        boxes: [B, S, 4], x1, y1, x2, y2 in pixels; fp32, or the dtype of `input`.
        output_size: bins along height and width, or one number for both.
        spatial_scale: cells per pixel.
        valid: bool [B, S]; a box where it is False is padding, gives zeros and takes no gradient. None: all count.

    Raises:
        TypeError: an argument is not a floating-point tensor, or `valid` is not bool; else as `roi_pool`.
        ValueError: shapes or devices that do not fit, an output size below 1, a scale that is not positive.
    """
    features = _rois.features(input)
    pooled_height, pooled_width = _rois.output_size(output_size)
    scale = _checks.positive("spatial_scale", spatial_scale)
    rois = _rois.of_batch(boxes, valid, features)
    pooled, _ = torch.ops.fastdet.roi_pool(features, rois, scale, pooled_height, pooled_width)
    return pooled.unflatten(0, boxes.shape[:2])
