"""Checked lists of images and targets to padded tensors, and padded detections back to lists."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdet import ops
from fastdet.models.anchors import Size, warn_of_images_without_anchors
from fastdet.models.settings import Settings
from fastdet.structures import Batch, Detections, Targets


def resized_size(size: Size, min_size: int, max_size: int) -> tuple[Size, float]:
    """(height, width) and the factor that bring the shorter side to `min_size`, the longer to at most `max_size`."""
    scale = min(min_size / min(size), max_size / max(size))
    height, width = (max(math.floor(side * scale), 1) for side in size)
    return (height, width), scale


def smallest_bucket(buckets: Sequence[Size], size: Size) -> Size | None:
    """The (height, width) of least area among `buckets` that holds `size`; None if none does."""
    fitting = [bucket for bucket in buckets if bucket[0] >= size[0] and bucket[1] >= size[1]]
    return min(fitting, key=math.prod, default=None)


def padded_size(sizes: Sequence[Size], divisible: int, buckets: Sequence[Size]) -> Size:
    """(height, width) of a batch of images of these `sizes`. Raises ValueError if there are buckets and none fits."""
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    if not buckets:
        return -(-height // divisible) * divisible, -(-width // divisible) * divisible
    bucket = smallest_bucket(buckets, (height, width))
    if bucket is None:
        raise ValueError(f"a batch of {height} x {width} pixels fits none of size_buckets {tuple(buckets)}")
    return bucket


def side_divisor(settings: Settings) -> int:
    """What the sides of a padded batch are multiples of; those of `size_buckets` are taken as they are."""
    return 1 if settings.size_buckets else settings.size_divisible


def padding_mask(sizes: Tensor, padded: Size) -> Tensor:
    """bool [B, H, W]: True inside each image of `sizes` int64 [B, 2], False in its padding to `padded`."""
    rows = torch.arange(padded[0], device=sizes.device) < sizes[:, :1]
    columns = torch.arange(padded[1], device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def make_batch(
    images: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]] | None,
    settings: Settings,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    training: bool,
    least_side: int,
) -> tuple[Batch, Targets | None, list[Size]]:
    """Checked images and targets as padded tensors on the device of `mean` and `std` [C], and the images' sizes.

    The batch is of `dtype`. `least_side` is how many pixels a side the backbone needs.

    Raises:
        ValueError: naming an image that becomes smaller, or a box that vanishes.
    """
    original_sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    sizes, scales = _resize(original_sizes, settings, training, least_side)
    padded = None if targets is None else _batch_targets(targets, original_sizes, sizes, mean.device)
    if training and targets is not None and settings.rpn_anchors_inside_only and not ops.is_recorded(mean):
        warn_of_images_without_anchors(settings.rpn_anchor_generator, sizes)
    pixels = _batch_images(images, sizes, settings, mean, std, dtype)
    host = _host_values_to(sizes, mean.device), _host_values_to(scales, mean.device, torch.float32)
    return Batch(pixels, *host), padded, original_sizes


def _resize(
    original_sizes: Sequence[Size], settings: Settings, training: bool, least_side: int
) -> tuple[list[Size], list[float]]:
    """The (height, width) after resizing, and the factor, of each image; of several `min_size` training draws one.

    Raises:
        ValueError: naming an image with a side of fewer than `least_side` pixels then, of which no feature is left.
    """
    min_sizes = settings.min_sizes
    choice = int(torch.randint(len(min_sizes), ())) if training and len(min_sizes) > 1 else -1
    resized = [resized_size(size, min_sizes[choice], settings.max_size) for size in original_sizes]
    for i, (size, _) in enumerate(resized):
        if min(size) < least_side:
            before, after = (" x ".join(map(str, each)) for each in (original_sizes[i], size))
            raise ValueError(
                f"image {i} of {before} pixels becomes {after} (min_size {min_sizes[choice]}, max_size "
                f"{settings.max_size}), but the backbone needs {least_side} pixels a side: cut it, leave it out, or "
                "raise max_size"
            )
    return [size for size, _ in resized], [scale for _, scale in resized]


def _batch_images(
    images: Sequence[Tensor], sizes: Sequence[Size], settings: Settings, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Resize to `sizes`, normalize and pad; images of one size are processed together. In fp32 up to the result."""
    padded = padded_size(sizes, settings.size_divisible, settings.size_buckets)
    shape = len(images), len(mean), *padded
    batch = torch.empty(shape, dtype=dtype, device=mean.device, memory_format=torch.channels_last).zero_()
    for original in sorted({image.shape[-2:] for image in images}):
        members = [i for i, image in enumerate(images) if image.shape[-2:] == original]
        pixels = torch.stack([_unit_range(images[i].to(mean.device, non_blocking=True), len(mean)) for i in members])
        pixels = normalize(pixels, settings, mean, std)
        height, width = sizes[members[0]]
        if (height, width) != original:
            pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
        for row, i in enumerate(members):
            batch[i, :, :height, :width] = pixels[row]
    return batch


def normalize(pixels: Tensor, settings: Settings, mean: Tensor, std: Tensor) -> Tensor:
    """The input of the backbone for `pixels` [B, C, H, W] in 0..1; `mean` and `std` [C] are those of the settings."""
    if settings.image_format == "bgr255":
        pixels = pixels.flip(1) * 255
    return (pixels - mean[:, None, None]) / std[:, None, None]


def _unit_range(image: Tensor, channels: int) -> Tensor:
    """fp32 of `channels`; uint8 is brought from 0..255 to 0..1."""
    return (image.float() / 255 if image.dtype == torch.uint8 else image.float()).expand(channels, -1, -1)


def _batch_targets(
    targets: Sequence[dict[str, Tensor]], original_sizes: Sequence[Size], sizes: Sequence[Size], device: torch.device
) -> Targets:
    """Checked targets as one padded tensor each on `device`, boxes clipped to the images and scaled to the resized.

    `original_sizes` are the images' (height, width), `sizes` those after resizing. There are as many rows as the next
    power of two above the most boxes of an image, so that few shapes occur.

    Raises:
        ValueError: naming a box that is so narrow that its rounded sides meet.
    """
    factors = resize_factors(original_sizes, torch.tensor(sizes, device="cpu"))
    most = 1 << (max(1, *(len(target["boxes"]) for target in targets)) - 1).bit_length()
    # On the host even under another default device: pinned memory is.
    boxes = torch.zeros(len(targets), most, 4, dtype=torch.float32, device="cpu")
    labels = torch.zeros(len(targets), most, dtype=torch.int64, device="cpu")
    ignore = torch.zeros(len(targets), most, dtype=torch.bool, device="cpu")
    for i, target in enumerate(targets):
        count, (height, width) = len(target["boxes"]), original_sizes[i]
        corners = target["boxes"].clone()
        corners[:, 0::2] = corners[:, 0::2].clamp(0, width)
        corners[:, 1::2] = corners[:, 1::2].clamp(0, height)
        corners *= factors[i]
        empty = (corners[:, 2:] <= corners[:, :2]).any(1)
        if bool(empty.any()):
            j = int(empty.nonzero()[0, 0])
            raise ValueError(f"target {i}: box {j} has no area after resizing: {target['boxes'][j].tolist()}")
        boxes[i, :count], labels[i, :count], ignore[i, :count] = corners, target["labels"], target["ignore"]
    if "seed" in targets[0]:
        seeds = _to(torch.stack([target["seed"] for target in targets]), device)
    else:
        seeds = draw_seeds(len(targets), device)
    return Targets(_to(boxes, device), _to(labels, device), _to(ignore, device), seeds)


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """Seeds of what is sampled in each of so many images, int64 [count], from torch's generator of the device."""
    return torch.randint(2**63 - 1, (count,), device=device)


def resize_factors(original_sizes: Sequence[Size], sizes: Tensor) -> Tensor:
    """What box corners are multiplied by when images are resized: fp32 [B, 4], x and y apart."""
    ratio = sizes / _host_values_to(original_sizes, sizes.device)
    return ratio.flip(-1).repeat(1, 2).float()


def unbatch(
    detections: Detections, original_sizes: Sequence[Size], sizes: Tensor, by_proposal: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    """Padded detections as one dict an image, boxes in pixels of the original images. Reads the counts: a host sync.

    Of each tensor [B, P, ...] of `by_proposal` the row of the proposal is added that the detection comes from.
    """
    boxes = detections.boxes / resize_factors(original_sizes, sizes)[:, None]
    columns = {"boxes": boxes, "labels": detections.labels, "scores": detections.scores}
    for name, values in by_proposal.items():
        columns[name] = values.gather(1, detections.index[..., None].expand(-1, -1, values.shape[-1]))
    counts = detections.count.tolist()
    return [{name: values[i, :count] for name, values in columns.items()} for i, count in enumerate(counts)]


def _host_values_to(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Python numbers as a tensor on the device."""
    return _to(torch.tensor(values, dtype=dtype, device="cpu"), device)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; from pinned memory, since a copy out of any other is a host sync."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
