"""Items of detection data sets, and pure functions on them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torchvision import tv_tensors

from fastdet.boxes import to_corners

Target = dict[str, torch.Tensor]
Item = tuple[torch.Tensor, Target]


def make_item(image: torch.Tensor, target: Mapping[str, Any]) -> Item:
    """An image and its target as `torchvision.transforms.v2` takes them; what of it are tv_tensors already stays so.

    Args:
        image: [3, H, W], uint8, or floating point in 0..1.
        target: "boxes" [N, 4], BoundingBoxes of any format, or x1, y1, x2, y2 in pixels; "labels" [N]; "ignore" bool
            [N], False where there is none. Other entries are left out.

    Returns:
        An Image, and boxes as BoundingBoxes x1, y1, x2, y2, float32.
    """
    size = image.shape[-2], image.shape[-1]
    boxes = tv_tensors.BoundingBoxes(to_corners(target["boxes"]).float(), format="XYXY", canvas_size=size)
    labels = target["labels"]
    ignore = target.get("ignore", torch.zeros(len(labels), dtype=torch.bool))
    return tv_tensors.Image(image), {"boxes": boxes, "labels": labels, "ignore": ignore}


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
