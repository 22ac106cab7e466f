"""Detection in images and image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdet.data import Target, read_image
from fastdet.data.images import MAX_PIXELS
from fastdet.models import losses
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.preprocessing import unbatch
from fastdet.preserve import preserve_mode


class ImageDetections(NamedTuple):
    """Detections in an image file; all tensors on the CPU."""

    path: Path
    image: Tensor  # float32 [3, H, W] in 0..1, turned as its EXIF orientation tells
    boxes: Tensor  # float32 [N, 4], x1, y1, x2, y2 in pixels of the image
    labels: Tensor  # int64 [N], from 1
    scores: Tensor  # float32 [N], falling


def detect(
    model: nn.Module, paths: Iterable[str | Path], *, batch_size: int = 1, max_pixels: int = MAX_PIXELS
) -> Iterator[ImageDetections]:
    """Detect in image files, one result a file in their order, as soon as its batch is done.

    Args:
        model: a detector on any device; between two results its modules are in the modes that the caller set.
        paths: files that `fastdet.data.read_image` reads.
        batch_size: images at a time.
        max_pixels: of an image, as of `read_image`.

    Raises:
        DataError: a file is missing or cannot be decoded.
    """
    remaining = iter(paths)
    while batch := [Path(path) for path in islice(remaining, batch_size)]:
        images = [read_image(path, max_pixels, apply_exif_orientation=True) for path in batch]
        for path, image, found in zip(batch, images, detect_in_batch(model, images), strict=True):
            yield ImageDetections(path, image, found["boxes"], found["labels"], found["scores"])


def detect_in_batch(model: nn.Module, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """The detections in images [3, H, W], on the CPU; the model's modules keep the modes they are in."""
    device = next(model.parameters()).device
    with preserve_mode(model, training=False), torch.inference_mode():
        predictions = model([image.to(device, non_blocking=True) for image in images])
    return _to_host(predictions)


def detect_with_losses(
    model: FasterRCNN, images: Sequence[Tensor], targets: Sequence[Target]
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """As `detect_in_batch`, and the losses in the same pass through the backbone and the RPN's head.

    Args:
        targets: of the images, on the CPU. With a "seed" in each nothing is drawn from torch's generators.

    Returns:
        The detections; and float64 [2, 4] on the CPU, in the order of `losses.NAMES`: the losses summed up, and the
        numbers of anchors and of samples that they are divided by.

    Raises:
        ValueError: bad images or targets.
    """
    counts: list[Tensor] = []

    def keep(own: Tensor) -> Tensor:
        counts.append(own)
        return torch.ones_like(own)

    with preserve_mode(model, training=False), torch.inference_mode():
        batch, padded, original_sizes = model.preprocess(images, targets)
        sums, found = model.forward_padded(*batch[:2], padded, batch.scales, compute_losses=True, divisors=keep)
        assert sums is not None
        assert found is not None
        predictions = unbatch(found, original_sizes, batch.sizes, {})
        summed = torch.stack([torch.stack([sums[name] for name in losses.NAMES]), *counts])
    return _to_host(predictions), summed.to("cpu", torch.float64, copy=True)


def _to_host(predictions: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Copies, made outside of the inference mode, because its tensors cannot be changed in place out here."""
    return [{name: values.to("cpu", copy=True) for name, values in found.items()} for found in predictions]
