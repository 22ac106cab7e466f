"""What the operations on regions of interest share: argument checks, rows of boxes, outputs and derivatives.

The derivatives are of both modes and any order: where the operations are smooth, they are linear in the features.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from fastdet.ops import _checks
from fastdet.ops._library import apply_function, call_below_autograd, call_in_forward, needs_derivative

# Bins of a RoI along an axis, and its samples there: the square is what a list of the samples of one RoI can hold.
_MOST_BINS = MOST_SAMPLES = 1 << 10


def widen(tensor: Tensor) -> Tensor:
    """In the dtype of the computation: float64 stays, the rest becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def empty(
    like: Tensor, shape: Sequence[int], layout: torch.memory_format | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """An unwritten [N, C, H, W]. `layout` None: that of the results of the device, on a GPU channels last."""
    if layout is None:
        layout = torch.channels_last if like.device.type == "cuda" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def check_features(value: object, name: str = "input") -> Tensor:
    """Features [B, C, H, W] of a dtype that can be pooled."""
    tensor = _checks.tensor(name, value)
    if tensor.ndim != 4:
        raise ValueError(f"{name} must have the shape [B, C, H, W], got {list(tensor.shape)}")
    if tensor.dtype == torch.float64:
        if tensor.device.type == "cuda":
            raise TypeError(f"{name} must be float32, float16 or bfloat16 on a GPU, got torch.float64")
    elif tensor.dtype not in _checks.FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    return tensor


def check_counts(name: str, shape: Sequence[int]) -> None:
    """torchvision's operators on the CPU count values in int32, and would read outside a tensor of more."""
    if math.prod(shape) >= 1 << 31:
        raise ValueError(f"{name} must hold fewer than 2**31 values on the CPU, got the shape {list(shape)}")


def check_output_size(value: object) -> tuple[int, int]:
    """(height, width) of one int or two, each from 1 to `_MOST_BINS`."""
    sizes = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(sizes, tuple | list):
        raise TypeError(f"output_size must be an int or a pair of them, got {value!r}")
    if len(sizes) != 2:
        raise ValueError(f"output_size must be one number or (height, width), got {value}")
    height, width = (_checks.integer("output_size", size, 1, _MOST_BINS) for size in sizes)
    return height, width


def _check_boxes(name: str, value: object, shape: tuple[str, ...], input: Tensor, input_name: str) -> Tensor:
    """Boxes in the dtype of the computation, of the rank and the last dimension of `shape`."""
    tensor = _checks.floats(name, value, double=True)
    tensor = tensor.double() if input.dtype == torch.float64 else tensor.float()
    if tensor.ndim != len(shape) or tensor.shape[-1] != int(shape[-1]):
        raise ValueError(f"{name} must have the shape [{', '.join(shape)}], got {list(tensor.shape)}")
    _checks.same_device(**{input_name: input, name: tensor})
    return tensor


def check_rois(boxes: object, input: Tensor, input_name: str = "input") -> Tensor:
    """Rows [K, 5] of image index and corners, from such rows or from one tensor [L, 4] for each image."""
    if isinstance(boxes, list | tuple):
        if len(boxes) != input.shape[0]:
            raise ValueError(f"boxes must hold one tensor an image: got {len(boxes)} for {input.shape[0]} images")
        rois = [input.new_empty(0, 5, dtype=widen(input).dtype)]
        for image, value in enumerate(boxes):
            corners = _check_boxes(f"boxes[{image}]", value, ("L", "4"), input, input_name)
            rois.append(torch.nn.functional.pad(corners, (1, 0), value=image))
        return torch.cat(rois)
    rows = _check_boxes("boxes", boxes, ("K", "5"), input, input_name)
    # The values are inspected only where that is no host sync.
    if rows.is_cpu and not _checks.is_recorded(rows):
        images, num_images = rows[:, 0], input.shape[0]
        wrong = ~((images >= 0) & (images < num_images) & (images == images.floor()))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            place = f"image {images[row].item():g}, but {input_name} holds {num_images} images"
            raise ValueError(f"boxes[{row}] lies in {place}")
    return rows


def check_batched_rois(boxes: object, valid: object, input: Tensor, input_name: str = "input") -> Tensor:
    """Rows [B * S, 5] of image index and corners, from boxes [B, S, 4]; image -1 where `valid` [B, S] is False."""
    corners = _check_boxes("boxes", boxes, ("B", "S", "4"), input, input_name)
    batch, num_boxes = corners.shape[:2]
    if batch != input.shape[0]:
        raise ValueError(f"boxes holds {batch} images, but {input_name} holds {input.shape[0]}")
    images = torch.arange(batch, dtype=corners.dtype, device=corners.device)[:, None].expand(batch, num_boxes)
    if valid is not None:
        mask = _checks.tensor("valid", valid, (batch, num_boxes), torch.bool)
        _checks.same_device(**{input_name: input, "valid": mask})
        images = images.masked_fill(~mask, -1)
    return torch.cat([images[..., None], corners], dim=2).reshape(batch * num_boxes, 5)


def rois_in_cells(rois: Tensor, corners: Tensor, num_images: int, limit: float) -> Tensor:
    """`rois` [K, 5] with `corners` [K, 4] in cells. Padding, an image outside [0, num_images) or a NaN corner becomes a
    point of image 0 at -`limit`, outside the features."""
    images = rois[:, :1]
    valid = (images >= 0) & (images < num_images) & ~rois[:, 1:].isnan().any(1, keepdim=True)
    return torch.cat([images.where(valid, 0.0), corners.where(valid, -limit)], dim=1)


def level_sizes(features: Sequence[Tensor]) -> list[int]:
    """Batch, channels, then height and width of one level after another."""
    return [*features[0].shape[:2], *(side for level in features for side in level.shape[2:])]


def level_shapes(sizes: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The shape of each level, from `level_sizes`."""
    batch, channels, *sides = sizes
    return [(batch, channels, *side) for side in zip(sides[::2], sides[1::2], strict=True)]


class _Function(_SingleLevelFunction):
    """`autograd.Function` but for its `apply`, which `apply_function` stands in for."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


class _RoiAlign(_Function):
    @staticmethod
    def forward(rois: Tensor, scales: list[float], rules: tuple[Any, ...], *features: Tensor) -> Tensor:
        return call_in_forward(torch.ops.fastdet.roi_align, rois, list(features), scales, *rules)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rois, scales, rules, *features = inputs
        ctx.save_for_backward(rois)
        ctx.save_for_forward(rois)
        ctx.arguments = (level_sizes(features), scales, *rules[2:])
        ctx.rules = rules

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Linear in the features."""
        sizes, scales, *_ = ctx.arguments
        return torch.ops.fastdet.roi_align(*ctx.saved_tensors, _fill(tangents[3:], sizes), scales, *ctx.rules)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.fastdet.roi_align_backward(grad, *ctx.saved_tensors, *ctx.arguments)
        return None, None, None, *grads


class _RoiAlignBackward(_Function):
    """Linear in the gradient, and so its derivatives are the two operations."""

    @staticmethod
    def forward(grad: Tensor, rois: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(call_in_forward(torch.ops.fastdet.roi_align_backward, grad, rois, *arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, rois, *ctx.arguments = inputs
        ctx.save_for_backward(rois)
        ctx.save_for_forward(rois)
        ctx.bins = grad.shape[2:]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.fastdet.roi_align_backward(tangent, *ctx.saved_tensors, *ctx.arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sizes, scales, *rules = ctx.arguments
        levels = _fill(grads, sizes)
        grad = torch.ops.fastdet.roi_align(*ctx.saved_tensors, levels, scales, *ctx.bins, *rules)
        return grad, *[None] * (1 + len(ctx.arguments))


def _fill(levels: Sequence[Tensor | None], sizes: list[int]) -> list[Tensor]:
    """The levels of an image [B, C, H_l, W_l], zeros where there is none; at least one is there."""
    given = next(level for level in levels if level is not None)
    shapes = level_shapes(sizes)
    return [given.new_zeros(shape) if level is None else level for level, shape in zip(levels, shapes, strict=True)]


def roi_align_autograd(rois: Tensor, features: list[Tensor], scales: list[float], *rules: Any) -> Tensor:
    """`rules` from the number of bins on."""
    if needs_derivative(*features):
        return apply_function(_RoiAlign, rois, scales, rules, *features)
    return call_below_autograd(torch.ops.fastdet.roi_align, rois, features, scales, *rules)


def roi_align_backward_autograd(grad: Tensor, rois: Tensor, *arguments: Any) -> list[Tensor]:
    if needs_derivative(grad):
        return list(apply_function(_RoiAlignBackward, grad, rois, *arguments))
    return call_below_autograd(torch.ops.fastdet.roi_align_backward, grad, rois, *arguments)


class _RoiPool(_Function):
    @staticmethod
    def forward(input: Tensor, rois: Tensor, *scale_and_bins: float) -> tuple[Tensor, Tensor]:
        return call_in_forward(torch.ops.fastdet.roi_pool, input, rois, *scale_and_bins)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        (input, rois, *scale_and_bins), (_, argmax) = inputs, output
        ctx.save_for_backward(rois, argmax)
        ctx.scalars = (*scale_and_bins, *input.shape)
        ctx.save_for_forward(rois, argmax)
        ctx.mark_non_differentiable(argmax)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        return _at_maxima(tangent, *ctx.saved_tensors), None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_input = torch.ops.fastdet.roi_pool_backward(grad, *ctx.saved_tensors, *ctx.scalars)
        return grad_input, None, None, None, None


class _RoiPoolBackward(_Function):
    """Linear in the gradient: its transpose reads where the maxima lie."""

    @staticmethod
    def forward(grad: Tensor, *arguments: Any) -> Tensor:
        return call_in_forward(torch.ops.fastdet.roi_pool_backward, grad, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rois, argmax, *ctx.scalars = inputs
        ctx.save_for_backward(rois, argmax)
        ctx.save_for_forward(rois, argmax)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return torch.ops.fastdet.roi_pool_backward(tangent, *ctx.saved_tensors, *ctx.scalars)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _at_maxima(grad, *ctx.saved_tensors), *[None] * (2 + len(ctx.scalars))


def _at_maxima(features: Tensor, rois: Tensor, argmax: Tensor) -> Tensor:
    """Of `features` [B, C, H, W] what lies where each bin has its maximum, [R, C, PH, PW]; 0 if it pooled nothing."""
    image = rois[:, 0].nan_to_num().long().clamp(0, max(len(features) - 1, 0))
    channel = torch.arange(features.shape[1], device=features.device)
    cells = features.reshape(*features.shape[:2], -1)
    found = cells[image[:, None, None, None], channel[:, None, None], argmax.long().clamp(min=0)]
    return torch.where(argmax < 0, 0.0, found)


def roi_pool_autograd(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if needs_derivative(input):
        return apply_function(_RoiPool, input, *args)
    return call_below_autograd(torch.ops.fastdet.roi_pool, input, *args)


def roi_pool_backward_autograd(grad: Tensor, *arguments: Any) -> Tensor:
    if needs_derivative(grad):
        return apply_function(_RoiPoolBackward, grad, *arguments)
    return call_below_autograd(torch.ops.fastdet.roi_pool_backward, grad, *arguments)
