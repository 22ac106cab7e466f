"""Training augmentation: chains of `torchvision.transforms.v2`, repeatable from a seed."""

from typing import Any, Literal, get_args

import torch
from torchvision.transforms import v2

from fastdet.data.transforms import Item

Preset = Literal["none", "flip", "scale-jitter", "photometric", "strong"]
PRESETS: tuple[str, ...] = get_args(Preset)

# The mean color of ImageNet's images in 0..1, RGB: normalized, it is about 0.
_MEAN = (0.485, 0.456, 0.406)


def build(preset: Preset, size: tuple[int, int]) -> v2.Transform:
    """The transform of an item (image, target), which `augment` applies; it can be pickled.

    - "none": nothing.
    - "flip": half the images are mirrored left to right.
    - "photometric": brightness, contrast, saturation, hue and the order of the channels are each changed in half the
      images, as in SSD (Liu et al. 2016, arXiv:1512.02325), then "flip".
    - "scale-jitter": large-scale jitter (Ghiasi et al. 2021, arXiv:2012.07177), then "flip". The factors 0.1 to 2.0
      count from the scale at which the image just fits into min_size x max_size (height x width). An image of that size
      is then cut out at random, with ImageNet's mean color where it reaches over the border. At factor 1 a landscape
      image has the very size to which the detector resizes it, and the detector leaves the result as it is, so that all
      batches have one shape. A portrait image is up to max_size / min_size times smaller than in evaluation.
    - "strong": SSD's whole recipe: "photometric", in half the images the image at a random place on a canvas of
      ImageNet's mean color up to 4 times as wide and high, a crop of 0.3 to 1 of each side that overlaps a box, "flip".
      The canvas takes up to 16 times the memory of the image.

    Those of the last two clip boxes to the image, and drop the boxes of which less than a pixel a side is left, as well
    as those whose center is outside the crop of "strong". The others keep all boxes, also where they reach over the
    border.

    Args:
        preset: one of `PRESETS`.
        size: (min_size, max_size) to which the detector resizes, in pixels; only "scale-jitter" reads it.

    Raises:
        ValueError: there is no such preset, or the size for "scale-jitter" is not positive.
    """
    if preset == "none":
        return v2.Identity()
    if preset == "flip":
        return v2.RandomHorizontalFlip()
    if preset == "photometric":
        return v2.Compose([v2.RandomPhotometricDistort(), v2.RandomHorizontalFlip()])
    if preset not in PRESETS:
        raise ValueError(f"augmentation {preset!r} is not one of {', '.join(PRESETS)}")
    if preset == "scale-jitter" and min(size) < 1:
        raise ValueError(f"augmentation 'scale-jitter' needs a size of at least 1 x 1, got {size}")
    chain = _scale_jitter if preset == "scale-jitter" else _strong
    return _ByDtype(chain(size, [round(255 * level) for level in _MEAN]), chain(size, list(_MEAN)))


def augment(transform: v2.Transform, item: Item, seed: int) -> Item:
    """Apply a transform of `build` so that the result follows from the item and the seed, in any process.

    No generator of the caller is drawn from or changed, on no device; nor are Python's and NumPy's.

    Args:
        transform: draws from torch's global generator of the CPU only, as those of `build` do.
        item: (Image uint8, or floating point in 0..1, [3, H, W]; {"boxes": BoundingBoxes x1, y1, x2, y2, float32 [N, 4]
            in pixels, "labels": int64 [N], "ignore": bool [N]}), on the CPU. It is left as it is.
        seed: of this image in this epoch.

    Returns:
        An item of the same types.
    """
    threads = torch.get_num_threads()
    # Not torch.manual_seed, which would also seed the generators of all GPUs, from which the model draws.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        # Workers have one thread, and the mean of an image, for its contrast, depends on how many there are.
        torch.set_num_threads(1)
        try:
            image, target = transform(*item)
        finally:
            torch.set_num_threads(threads)
    if image.untyped_storage().nbytes() > image.numel() * image.element_size():
        # A crop is a view of a larger image, all of which would be sent from a worker.
        image = image.clone()
    return image, target


def _scale_jitter(size: tuple[int, int], fill: list[float]) -> v2.Transform:
    height, width = size
    # torchvision gives this size alone as (width, height).
    jitter = _ScaleJitter((width, height), scale_range=(0.1, 2.0))
    crop = v2.RandomCrop((height, width), pad_if_needed=True, fill=fill)
    return v2.Compose([v2.ClampBoundingBoxes(), jitter, crop, v2.RandomHorizontalFlip(), *_clean()])


def _strong(size: tuple[int, int], fill: list[float]) -> v2.Transform:
    steps = [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill), _IoUCrop(), v2.RandomHorizontalFlip()]
    # Clipped first, as a box over the border would reach into the canvas.
    return v2.Compose([v2.ClampBoundingBoxes(), *steps, *_clean()])


def _clean() -> list[v2.Transform]:
    """Drop boxes that are empty or gone; clip before, as rounding can put a side just outside."""
    return [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_labels_and_ignore)]


def _labels_and_ignore(item: Item) -> tuple[torch.Tensor, torch.Tensor]:
    return item[1]["labels"], item[1]["ignore"]


class _ByDtype(v2.Transform):
    """One transform for images of uint8 and one for those in 0..1: the color of the padding differs."""

    def __init__(self, for_bytes: v2.Transform, for_floats: v2.Transform) -> None:
        super().__init__()
        self.for_bytes, self.for_floats = for_bytes, for_floats

    def forward(self, *inputs: Any) -> Any:
        return (self.for_floats if inputs[0].is_floating_point() else self.for_bytes)(*inputs)


class _ScaleJitter(v2.ScaleJitter):
    """torchvision's, with at least 2 pixels a side: it shrinks thin images to 0, and torch cannot shrink to 1 x 1."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = super().make_params(flat_inputs)["size"]
        return {"size": (max(height, 2), max(width, 2))}


class _IoUCrop(v2.RandomIoUCrop):
    """torchvision's, but an image with no boxes, for which it seeks in vain, or with a side of 3 pixels stays whole."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        # A crop of 0.3 of a side below 4 pixels can have no pixel, by which torchvision divides.
        if len(v2.get_bounding_boxes(flat_inputs)) == 0 or min(v2.query_size(flat_inputs)) < 4:
            return {}
        return super().make_params(flat_inputs)
