"""Seeded sets of boxes in an image of 1000 x 600 pixels, as the operations meet them."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdet.models.anchors import AnchorGenerator, grid_anchors

_WIDTH, _HEIGHT = 1000.0, 600.0


def anchors() -> Tensor:
    """The 18648 anchors of the VGG16 detector on an image of 600 x 901 pixels."""
    generator = AnchorGenerator(strides=(16,), offset=8.0, rounded=False)
    return grid_anchors(generator.cell_anchors()[0], (37, 56), (16, 16))


def uniform(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes and scores: centers anywhere, sides of 16 to 200 pixels."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(count, 2, generator=generator) * torch.tensor([_WIDTH, _HEIGHT])
    side = 16 + torch.rand(count, 2, generator=generator) * 184
    return _finish(center, side, generator)


def clustered(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes and scores: about 100 objects, every box a perturbed copy of one."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(100, 2, generator=generator) * torch.tensor([_WIDTH, _HEIGHT])
    side = 32 + torch.rand(100, 2, generator=generator) * 200
    object_index = torch.randint(100, (count,), generator=generator)
    center = center[object_index] + 0.15 * side[object_index] * torch.randn(count, 2, generator=generator)
    side = side[object_index] * torch.exp(0.2 * torch.randn(count, 2, generator=generator))
    return _finish(center, side, generator)


def jittered_anchors(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes and scores: anchors, each moved and stretched by about a tenth, as an untrained RPN's proposals.

    More boxes than there are anchors are drawn from all anchors again.
    """
    generator = torch.Generator().manual_seed(seed)
    candidates = anchors()
    rounds = range(0, count, len(candidates))
    index = torch.cat([torch.randperm(len(candidates), generator=generator) for _ in rounds])[:count]
    return _jittered(candidates[index], generator)


def by_class(
    scene: Callable[[int, int], tuple[Tensor, Tensor]], images: int, classes: int, num_rois: int
) -> tuple[Tensor, Tensor]:
    """Boxes [images * classes, num_rois, 4] and scores: each class's are the image's RoIs, moved a little."""
    generator = torch.Generator().manual_seed(3)
    rois = torch.stack([scene(num_rois, seed)[0] for seed in range(images)])
    boxes, scores = _jittered(rois.repeat_interleave(classes, dim=0).reshape(-1, 4), generator)
    return boxes.unflatten(0, (-1, num_rois)), scores.unflatten(0, (-1, num_rois))


def _jittered(boxes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    center, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    center = center + 0.1 * side * torch.randn(side.shape, generator=generator)
    side = side * torch.exp(0.1 * torch.randn(side.shape, generator=generator))
    return _finish(center, side, generator)


def _finish(center: Tensor, side: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    boxes = torch.cat([center - side / 2, center + side / 2], dim=1)
    limit = torch.tensor([_WIDTH, _HEIGHT, _WIDTH, _HEIGHT])
    return boxes.clamp(min=0).minimum(limit), torch.rand(len(boxes), generator=generator)
