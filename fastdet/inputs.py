"""The images and targets that people hand to a detector: whether they are what it takes."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdet import ops
from fastdet.boxes import to_corners

# A pixel; losses of larger ones overflow.
_LARGEST = 1e9
# No pixel in 0..1 becomes so large in a change of its contrast.
_MOST_OF_UNIT_RANGE = 10.0


def check_images(images: Any, mean: Sequence[float], image_format: str) -> list[Tensor]:
    """The images, each [C, H, W] with C as `mean` has, or [1, H, W].

    `mean` and `image_format` are those of the settings. They tell whether floating-point images are in 0..1; values far
    above are a warning then.

    Raises:
        ValueError: `images` is no list of such tensors, floating point or uint8, and no stack [B, C, H, W] of them; or
            one on the CPU has values that are no pixels (on a GPU to look would be a host sync).
    """
    channels = len(mean)
    most = math.inf if image_format == "rgb" and max(mean) > 1 else _MOST_OF_UNIT_RANGE
    if isinstance(images, Tensor) and images.ndim == 4:
        images = list(images.unbind())
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"images must be a list of tensors, or one [B, C, H, W], got {_describe(images)}")
    if not images:
        raise ValueError("images is empty: a batch has at least one image")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise ValueError(f"image {i} must be a tensor, got {type(image).__name__}")
        number = image.is_floating_point() or image.dtype == torch.uint8
        has_shape = image.ndim == 3 and image.shape[0] in (channels, 1) and 0 not in image.shape
        if not (number and has_shape and _is_dense(image)):
            shape = f"{channels} x H x W, or 1 x H x W (as image_mean has {channels})"
            raise ValueError(f"image {i} must be a floating-point or uint8 tensor of {shape}, got {_describe(image)}")
        if image.is_cpu and image.is_floating_point() and not ops.is_recorded(image):
            _check_pixels(i, image, most)
    return list(images)


def _is_dense(value: Tensor) -> bool:
    """Whether it is a usual tensor, whose values are in memory."""
    return value.layout == torch.strided and not (value.is_nested or value.is_quantized or value.is_meta)


def _check_pixels(i: int, image: Tensor, most: float) -> None:
    low, high = map(float, torch.aminmax(image.detach()))
    # Written so that it is true of NaN.
    if not (abs(low) <= _LARGEST and abs(high) <= _LARGEST):
        bad = ~(image.float().abs() <= _LARGEST)
        found = f"{int(bad.sum())} values that are not finite or above {_LARGEST:.0e}"
        c, y, x = bad.nonzero()[0].tolist()
        raise ValueError(f"image {i} has {found}, the first at channel {c}, row {y}, column {x}")
    if high > most:
        warnings.warn(
            "an image has values far above 1: floating-point images are taken to be in 0..1, and uint8 in 0..255",
            stacklevel=5,
        )


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    kind = "" if value.layout == torch.strided else f"{value.layout} ".removeprefix("torch.")
    return f"{kind}{value.dtype} of {list(value.shape)}{' on the meta device' if value.is_meta else ''}"


def check_targets(targets: Any, images: Sequence[Tensor], num_classes: int) -> list[dict[str, Tensor]]:
    """The targets on the CPU, after checking every box and label of every image.

    Targets that lie on a GPU are copied to the host for this, which is a host sync: leave them on the CPU, they are
    moved with the batch.

    Raises:
        ValueError: naming the image's index, the box's index and its values.
    """
    if not isinstance(targets, (list, tuple)):
        raise ValueError(f"targets must be a list of dicts, got {type(targets).__name__}")
    if len(targets) != len(images):
        raise ValueError(f"{len(images)} images, but {len(targets)} targets")
    checked: list[dict[str, Tensor]] = []
    for i, (target, image) in enumerate(zip(targets, images, strict=True)):
        if not isinstance(target, Mapping) or "boxes" not in target or "labels" not in target:
            found = sorted(target) if isinstance(target, Mapping) else type(target).__name__
            raise ValueError(f"target {i} must be a dict with boxes and labels, got {found}")
        boxes = _tensor(i, "boxes", to_corners(target["boxes"]))
        if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.is_complex() or boxes.dtype == torch.bool:
            raise ValueError(f"target {i}: boxes must be real numbers [N, 4], got {boxes.dtype} {list(boxes.shape)}")
        labels = _tensor(i, "labels", target["labels"])
        inexact = labels.is_floating_point() or labels.is_complex()
        if tuple(labels.shape) != (len(boxes),) or inexact or labels.dtype == torch.bool:
            raise ValueError(f"target {i}: labels must be integers [{len(boxes)}], got {_describe(labels)}")
        ignore = _tensor(i, "ignore", target.get("ignore", torch.zeros(len(boxes), dtype=torch.bool, device="cpu")))
        if tuple(ignore.shape) != (len(boxes),) or ignore.dtype != torch.bool:
            expected = f"bool [{len(boxes)}]"
            raise ValueError(f"target {i}: ignore must be {expected}, got {ignore.dtype} {list(ignore.shape)}")
        height, width = image.shape[-2:]
        _check_boxes(i, boxes.float(), labels, height, width, num_classes)
        checked.append({"boxes": boxes.float(), "labels": labels.long(), "ignore": ignore})
        if "seed" in target:
            seed = _tensor(i, "seed", target["seed"])
            if seed.ndim or seed.dtype != torch.int64:
                raise ValueError(f"target {i}: seed must be int64 [], got {_describe(seed)}")
            checked[-1]["seed"] = seed
        if ("seed" in target) != ("seed" in checked[0]):
            raise ValueError(f"target {i}: seed must be in all targets or in none")
    return checked


def _tensor(i: int, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not _is_dense(value):
        raise ValueError(f"target {i}: {name} must be a dense tensor, got {_describe(value)}")
    return value.detach().cpu()


def _check_boxes(i: int, boxes: Tensor, labels: Tensor, height: int, width: int, num_classes: int) -> None:
    x1, y1, x2, y2 = boxes.unbind(1)
    outside = (x2 <= 0) | (y2 <= 0) | (x1 >= width) | (y1 >= height)
    for bad, what in (
        (~boxes.isfinite().all(1), "is not finite"),
        ((x2 <= x1) | (y2 <= y1), "has no area (x2 <= x1 or y2 <= y1)"),
        (outside, f"lies wholly outside the image of {height} x {width}"),
        ((labels < 1) | (labels >= num_classes), f"has a label outside 1..{num_classes - 1}"),
    ):
        if bool(bad.any()):
            j = int(bad.nonzero()[0, 0])
            raise ValueError(f"target {i}: box {j} {what}: {boxes[j].tolist()}, label {int(labels[j])}")
