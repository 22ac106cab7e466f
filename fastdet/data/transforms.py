"""Items of detection data sets, and pure functions on them."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torchvision import tv_tensors

from fastdet.boxes import to_corners

Target = dict[str, torch.Tensor]
Item = tuple[torch.Tensor, Target]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def make_item(image: torch.Tensor, target: Mapping[str, Any]) -> Item:
    """An image and its target as `torchvision.transforms.v2` takes them; what of it are tv_tensors already stays so.

    Args:
        image: [3, H, W], uint8, or floating point in 0..1.
        target: "boxes" [N, 4], BoundingBoxes of any format, or x1, y1, x2, y2 in pixels; "labels" [N]; "ignore" bool
            [N], False where there is none. Other entries are left out.

    Returns:
        An Image, and boxes as BoundingBoxes x1, y1, x2, y2, float32.

    Raises:
        ValueError: one of them is not so; the message names it.
    """
    _require("image", image, "uint8 or floating point [3, H, W]", (None, None, None), (torch.uint8, *_FLOATS))
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
        found = f"one with {', '.join(map(str, target))}" if isinstance(target, Mapping) else type(target).__name__
        raise ValueError(f"an item's target must be a dict with boxes and labels, got {found:.200}")
    corners, labels = to_corners(target["boxes"]), target["labels"]
    _require("boxes", corners, "numbers [N, 4]", (None, 4), (*_FLOATS, *_WHOLE))
    count = len(corners)
    _require("labels", labels, f"whole numbers [{count}], one for each box", (count,), _WHOLE)
    ignore = target.get("ignore", torch.zeros(count, dtype=torch.bool))
    _require("ignore", ignore, f"bool [{count}], one for each box", (count,), (torch.bool,))
    size = image.shape[-2], image.shape[-1]
    boxes = tv_tensors.BoundingBoxes(corners.float(), format="XYXY", canvas_size=size)
    return tv_tensors.Image(image), {"boxes": boxes, "labels": labels, "ignore": ignore}


def _require(
    name: str, value: Any, expected: str, shape: tuple[int | None, ...], dtypes: Container[torch.dtype]
) -> None:
    """Raises ValueError if a value is no tensor of one of the dtypes and of the shape, in which None is any size."""
    found = f"{type(value).__module__}.{type(value).__name__}"
    if isinstance(value, torch.Tensor):
        sizes = tuple(None if wanted is None else size for size, wanted in zip(value.shape, shape, strict=False))
        if value.ndim == len(shape) and sizes == shape and value.dtype in dtypes:
            return
        found = f"{value.dtype} {list(value.shape)}"
    raise ValueError(f"an item's {name} must be a tensor of {expected}, got {found}")


def collate(batch: Iterable[Item]) -> tuple[list[torch.Tensor], list[Target]]:
    """Put items side by side without stacking, since images differ in size: the `collate_fn` of a `DataLoader`.

    Args:
        batch: items, each (image [3, H, W], target).

    Returns:
        The list of the images and the list of the targets, in the order of the batch, as plain tensors; boxes as
        x1, y1, x2, y2.
    """
    items = list(batch)
    targets = [{name: to_corners(value) for name, value in target.items()} for _, target in items]
    return [_to_plain(image) for image, _ in items], targets


def _to_plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value
