"""Levels of a feature pyramid: what they must have in common, and which of them a box is pooled from."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdet.ops import _checks, _rois

MAX_LEVELS = 5


def of(features: object, scales: object) -> tuple[list[Tensor], list[float]]:
    """Levels that fit one another and their scales."""
    if not isinstance(features, list | tuple):
        raise TypeError(f"features must be a list of levels, got {type(features).__name__}")
    if not 1 <= len(features) <= MAX_LEVELS:
        raise ValueError(f"features must hold 1 to {MAX_LEVELS} levels, got {len(features)}")
    maps = [_rois.features(level, f"features[{index}]") for index, level in enumerate(features)]
    first = maps[0]
    for index, level in enumerate(maps):
        name = f"features[{index}]"
        if level.dtype != first.dtype:
            raise TypeError(f"{name} is {level.dtype}, but features[0] is {first.dtype}")
        if level.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"{name} begins with {list(level.shape[:2])}, but features[0] with {list(first.shape[:2])}"
            )
        _checks.same_device(**{"features[0]": first, name: level})
    return maps, _falling(scales, len(maps))


def _falling(scales: object, num_levels: int) -> list[float]:
    """The scales of a pyramid, each a power of two and half of the one before it; the last may repeat."""
    if not isinstance(scales, list | tuple):
        raise TypeError(f"scales must be a list of numbers, got {scales!r}")
    if len(scales) != num_levels:
        raise ValueError(f"scales must be as many as the levels of features: got {len(scales)} for {num_levels}")
    found = [float(_checks.positive(f"scales[{index}]", scale)) for index, scale in enumerate(scales)]
    halves = sum(scale > found[-1] for scale in found)
    wanted = [found[0] / 2 ** min(index, halves) for index in range(num_levels)]
    if num_levels > 1 and (found != wanted or math.frexp(found[0])[0] != 0.5):
        raise ValueError(f"scales must be powers of two, each half of the one before it, got {scales}")
    return found


@functools.lru_cache(maxsize=256)
def _edge(level: int, canonical_scale: float, canonical_level: int, dtype: torch.dtype) -> float:
    """The least area in pixels that torchvision's LevelMapper gives `level` or a higher one.

    Found by halving the bit patterns of `dtype`, which are in the order of the numbers: the mapper's own expression in
    floating point decides, and a comparison with the edge then decides alike on every device.
    """
    whole, infinity = (torch.int64, 0x7FF << 52) if dtype == torch.float64 else (torch.int32, 0xFF << 23)

    def number(bits: int) -> Tensor:
        return torch.tensor([bits], dtype=whole, device="cpu").view(dtype)

    below, reached = -1, infinity
    while reached - below > 1:
        middle = (below + reached) // 2
        length = torch.sqrt(number(middle))
        found = torch.floor(canonical_level + torch.log2(length / canonical_scale) + torch.tensor(1e-6, dtype=dtype))
        below, reached = (below, middle) if found.item() >= level else (middle, reached)
    return float(number(reached))


def edges(scales: Sequence[float], canonical_scale: float, canonical_level: int, dtype: torch.dtype) -> list[float]:
    """The least areas of the second level that boxes are pooled from, and of those after it."""
    if len(scales) == 1:
        return []
    lowest, highest = (-int(math.log2(scale)) for scale in (scales[0], scales[-1]))
    return [_edge(level, canonical_scale, canonical_level, dtype) for level in range(lowest + 1, highest + 1)]


def levels(rois: Tensor, least: list[float]) -> Tensor:
    """The level each row is pooled from, int64 [K]; `least` are the edges, and a NaN area reaches none."""
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    reached = torch.zeros_like(area, dtype=torch.int64)
    for edge in least:
        reached += area >= edge
    return reached
