"""The few shapes that a step is captured for: which of them takes a batch, and how its static tensors are filled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdet.models.preprocessing import side_divisor, smallest_bucket
from fastdet.models.settings import Settings
from fastdet.structures import Batch, Targets

# Batch, channels, height, width.
Shape = tuple[int, int, int, int]

# One shape, or several.
BatchShapes = Sequence[int] | Sequence[Sequence[int]]


def parse_buckets(batch_shape: Any, settings: Settings) -> tuple[Shape, ...]:
    """The shapes of a `batch_shape`, smallest first. Raises ValueError for one that does not suit the settings."""
    channels, divisible = len(settings.image_mean), side_divisor(settings)
    several = isinstance(batch_shape, Sequence) and (not batch_shape or isinstance(batch_shape[0], Sequence))
    shapes = list(batch_shape) if several else [batch_shape]
    if not shapes:
        raise ValueError("batch_shape is empty: give at least one (batch, channels, height, width)")
    for shape in shapes:
        sides = list(shape) if isinstance(shape, Sequence) else []
        if len(sides) != 4 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"batch_shape must be (batch, channels, height, width), or several, got {batch_shape!r}")
        if shape[1] != channels:
            raise ValueError(
                f"batch_shape {tuple(shape)} has {shape[1]} channels, but image_mean has {channels} values"
            )
        if shape[2] % divisible or shape[3] % divisible:
            raise ValueError(f"batch_shape {tuple(shape)}: height and width must be multiples of {divisible}")
    for size in settings.size_buckets:
        if smallest_bucket([tuple(shape[2:]) for shape in shapes], size) is None:
            raise ValueError(
                f"{tuple(size)} of the model's size_buckets fits no batch_shape of {batch_shape}: "
                "add a batch_shape of that height and width, or remove it from size_buckets"
            )
    return tuple(sorted({tuple(shape) for shape in shapes}, key=math.prod))


def choose_bucket(buckets: Sequence[Shape], images: Tensor, exact: bool) -> Shape:
    """The smallest bucket that holds `images` [B, C, H, W]; `exact`: of just as many images.

    Raises:
        ValueError: none does; the message gives the limit and how to raise it.
    """
    if images.ndim != 4 or not images.is_floating_point() or images.shape[1] != buckets[0][1]:
        raise ValueError(
            f"images must be floating point [B, {buckets[0][1]}, H, W], got {images.dtype} {list(images.shape)}"
        )
    batch, channels, height, width = images.shape
    counts = sorted({bucket[0] for bucket in buckets})
    if batch > counts[-1]:
        raise ValueError(
            f"a batch of {batch} images, but at most {counts[-1]} were planned for: give a batch_shape ({batch}, ...)"
        )
    if exact and batch not in counts:
        # Blank images would not do: they have anchors that learn to be background, and statistics for BatchNorm.
        raise ValueError(
            f"a batch of {batch} images, but steps are of {counts}: add a batch_shape ({batch}, ...), or leave out the "
            "last batch of an epoch (DataLoader(drop_last=True))"
        )
    enough = [bucket for bucket in buckets if (bucket[0] == batch if exact else bucket[0] >= batch)]
    by_count = {count: [bucket[2:] for bucket in enough if bucket[0] == count] for count in counts}
    sizes = {count: smallest_bucket(sizes, (height, width)) for count, sizes in by_count.items()}
    fitting = [(count, channels, *size) for count, size in sizes.items() if size is not None]
    if not fitting:
        raise ValueError(
            f"{batch} images padded to {height} x {width} pixels fit none of {enough}: add a batch_shape "
            f"({batch}, {channels}, {height}, {width}) or larger, or lower the model's min_size and max_size"
        )
    return min(fitting, key=math.prod)


def allocate_batch(bucket: Shape, like: Tensor) -> Batch:
    """The static batch of a bucket: black images of its whole size, on the device and of the dtype of a parameter."""
    sizes = torch.tensor(bucket[2:], device=like.device).repeat(bucket[0], 1)
    scales = torch.ones(bucket[0], dtype=torch.float32, device=like.device)
    # As the batches lie that are copied into it, and as the backbone takes it.
    images = torch.empty(bucket, dtype=like.dtype, device=like.device, memory_format=torch.channels_last).zero_()
    return Batch(images, sizes, scales)


def allocate_targets(batch: int, rows: int, device: torch.device) -> Targets:
    """The static targets of so many images: `rows` rows of padding each."""
    labels = torch.zeros(batch, rows, dtype=torch.int64, device=device)
    boxes = torch.zeros(batch, rows, 4, dtype=torch.float32, device=device)
    seeds = torch.zeros(batch, dtype=torch.int64, device=device)
    return Targets(boxes, labels, torch.zeros_like(labels, dtype=torch.bool), seeds)


def check_padded_shapes(images: Tensor, sizes: Tensor, scales: Tensor | None, targets: Targets | None = None) -> None:
    """Raises ValueError unless the shapes are those that `FasterRCNN.forward_padded` takes."""
    batch = len(images)
    expected: list[tuple[str, Tensor | None, list[int]]] = [("sizes", sizes, [batch, 2])]
    if scales is not None:
        expected.append(("scales", scales, [batch]))
    if targets is not None:
        rows = [batch, targets.labels.shape[-1]]
        expected.append(("targets.boxes", targets.boxes, [*rows, 4]))
        expected += [("targets.labels", targets.labels, rows), ("targets.ignore", targets.ignore, rows)]
        if targets.seeds is not None:
            expected.append(("targets.seeds", targets.seeds, [batch]))
    for name, tensor, shape in expected:
        found = None if tensor is None else list(tensor.shape)
        if found != shape:
            raise ValueError(f"{name} must be {shape} for {batch} images, got {found}")


@torch.no_grad()
def fill_inputs(static: Sequence[Tensor], values: Sequence[Tensor | None]) -> None:
    """Copy images, sizes, scales and targets into the static tensors, which are no smaller.

    The rest of a tensor that is larger than its value becomes 0, but 1 of sizes and scales; scales of None are 1.
    """
    for buffer, value, padding in zip(static, values, (0, 1, 1, 0, 0, 0, 0), strict=False):
        if value is None or value.shape != buffer.shape:
            buffer.fill_(padding)
        if value is not None:
            buffer[tuple(slice(side) for side in value.shape)].copy_(value, non_blocking=True)
