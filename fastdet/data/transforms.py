"""Pure functions on the items of a detection dataset."""

from collections.abc import Iterable

import torch

Target = dict[str, torch.Tensor]
Item = tuple[torch.Tensor, Target]


def collate(batch: Iterable[Item]) -> tuple[list[torch.Tensor], list[Target]]:
    """Put items side by side without stacking, since images differ in size: the `collate_fn` of a `DataLoader`.

    Args:
        batch: items, each (image [3, H, W], target).

    Returns:
        The list of the images and the list of the targets, in the order of the batch.
    """
    items = list(batch)
    return [image for image, _ in items], [target for _, target in items]


def flip_horizontal(image: torch.Tensor, target: Target) -> Item:
    """Mirror an image and its boxes left to right; neither input is changed.

    Args:
        image: [..., H, W], any dtype.
        target: "boxes" [N, 4] x1, y1, x2, y2 in pixels; every other entry is kept as it is.

    Returns:
        The mirrored image, and a new target with boxes W - x2, y1, W - x1, y2.
    """
    x1, y1, x2, y2 = target["boxes"].unbind(-1)
    width = image.shape[-1]
    return image.flip(-1), {**target, "boxes": torch.stack((width - x2, y1, width - x1, y2), dim=-1)}
