"""The few shapes that a step is made for: which one takes a batch, and how its static tensors are filled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdet.structures import Targets

# Batch, channels, height, width.
Shape = tuple[int, int, int, int]


def sorted_buckets(batch_shape: Any, channels: int, divisible: int) -> tuple[Shape, ...]:
    """The shapes, smallest first. Raises ValueError for one that is none."""
    if not isinstance(batch_shape, Sequence):
        raise ValueError(f"batch_shape must be (batch, channels, height, width), or several, got {batch_shape!r}")
    shapes = [batch_shape] if batch_shape and not isinstance(batch_shape[0], Sequence) else list(batch_shape)
    for shape in shapes:
        if (
            not isinstance(shape, Sequence)
            or len(shape) != 4
            or not all(isinstance(side, int) and side > 0 for side in shape)
        ):
            raise ValueError(f"batch_shape must be (batch, channels, height, width), or several, got {batch_shape}")
        if shape[1] != channels:
            raise ValueError(
                f"batch_shape {tuple(shape)} has {shape[1]} channels, but image_mean has {channels} numbers"
            )
        if shape[2] % divisible or shape[3] % divisible:
            raise ValueError(f"batch_shape {tuple(shape)}: height and width must be multiples of {divisible}")
    if not shapes:
        raise ValueError("batch_shape is empty: give at least one (batch, channels, height, width)")
    return tuple(sorted({tuple(shape) for shape in shapes}, key=math.prod))


def choose(buckets: Sequence[Shape], images: Tensor, exact: bool) -> Shape:
    """The smallest bucket that holds `images` [B, C, H, W]; `exact`: of just as many images.

    Raises:
        ValueError: none does; says which limit it is and how to raise it.
    """
    if images.ndim != 4 or not images.is_floating_point() or images.shape[1] != buckets[0][1]:
        raise ValueError(
            f"images must be floating point [B, {buckets[0][1]}, H, W], got {images.dtype} {list(images.shape)}"
        )
    batch, channels, height, width = images.shape
    largest = max(bucket[0] for bucket in buckets)
    if batch > largest:
        raise ValueError(
            f"a batch of {batch} images, but at most {largest} were planned for: give a batch_shape ({batch}, ...)"
        )
    if exact and all(batch != bucket[0] for bucket in buckets):
        # Blank images would not do: they have anchors that learn to be background, and statistics for BatchNorm.
        raise ValueError(
            f"a batch of {batch} images, but steps are of {sorted({bucket[0] for bucket in buckets})}: add a "
            f"batch_shape ({batch}, ...), or leave out the last batch of an epoch (DataLoader(drop_last=True))"
        )
    enough = [bucket for bucket in buckets if (bucket[0] == batch if exact else bucket[0] >= batch)]
    fitting = [bucket for bucket in enough if bucket[2] >= height and bucket[3] >= width]
    if not fitting:
        raise ValueError(
            f"{batch} images padded to {height} x {width} pixels fit none of {enough}: add a batch_shape "
            f"({batch}, {channels}, {height}, {width}) or larger, or lower the model's min_size and max_size"
        )
    return fitting[0]


def blank(bucket: Shape, device: torch.device) -> list[Tensor]:
    """The static images, sizes and scales of a bucket: black images of its whole size."""
    sizes = torch.ones(bucket[0], 2, dtype=torch.int64, device=device)
    sizes[:, 0], sizes[:, 1] = bucket[2], bucket[3]
    return [torch.zeros(bucket, device=device), sizes, torch.ones(bucket[0], device=device)]


def check_padded(images: Tensor, sizes: Tensor, scales: Tensor | None, targets: Targets | None = None) -> None:
    """Raises ValueError unless the shapes are those that `FasterRCNN.forward_padded` takes; scales may be None."""
    batch = len(images)
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("sizes", sizes, (batch, 2)),
        ("scales", scales, (batch,)),
    ]
    if targets is not None:
        rows = (batch, targets.labels.shape[-1])
        wanted += [("targets.boxes", targets.boxes, (*rows, 4)), ("targets.labels", targets.labels, rows)]
        wanted += [("targets.ignore", targets.ignore, rows)]
    for name, tensor, shape in wanted:
        if tensor is None and name == "scales":
            continue
        if tensor is None or tuple(tensor.shape) != shape:
            found = None if tensor is None else list(tensor.shape)
            raise ValueError(f"{name} must be {list(shape)} for {batch} images, got {found}")


@torch.no_grad()
def fill(static: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Copy images, sizes, scales and targets into the static tensors, which are no smaller.

    What a value leaves of its tensor becomes 0, but 1 of sizes and scales; without scales these are 1.
    """
    for buffer, value, rest in zip(static, values, (0, 1, 1, 0, 0, 0), strict=False):
        if value is None or value.shape != buffer.shape:
            buffer.fill_(rest)
        if value is not None:
            buffer[tuple(slice(side) for side in value.shape)].copy_(value, non_blocking=True)
