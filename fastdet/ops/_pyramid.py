"""Levels of a feature pyramid: the checks of them, and the level that a box is pooled from."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdet.ops import _checks, _rois

MAX_LEVELS = 5


def check_pyramid(features: object, scales: object) -> tuple[list[Tensor], list[float]]:
    """Levels of one dtype, device, batch and number of channels, and their scales."""
    if not isinstance(features, list | tuple):
        raise TypeError(f"features must be a list of levels, got {type(features).__name__}")
    if not 1 <= len(features) <= MAX_LEVELS:
        raise ValueError(f"features must hold 1 to {MAX_LEVELS} levels, got {len(features)}")
    levels = [_rois.check_features(level, f"features[{index}]") for index, level in enumerate(features)]
    first = levels[0]
    for index, level in enumerate(levels):
        name = f"features[{index}]"
        if level.dtype is not first.dtype:
            raise TypeError(f"{name} is {level.dtype}, but features[0] is {first.dtype}")
        if level.shape[:2] != first.shape[:2]:
            shapes = f"{list(level.shape[:2])}, but features[0] with {list(first.shape[:2])}"
            raise ValueError(f"{name} begins with {shapes}")
        _checks.same_device(**{"features[0]": first, name: level})
    return levels, _check_scales(scales, len(levels))


def _check_scales(scales: object, num_levels: int) -> list[float]:
    """The scales of a pyramid, each a power of two and half of the one before it; the last may repeat."""
    if not isinstance(scales, list | tuple):
        raise TypeError(f"scales must be a list of numbers, got {scales!r}")
    if len(scales) != num_levels:
        raise ValueError(f"scales must be as many as the levels of features: got {len(scales)} for {num_levels}")
    found = [float(_checks.positive(f"scales[{index}]", scale)) for index, scale in enumerate(scales)]
    halves = sum(scale > found[-1] for scale in found)
    expected = [found[0] / 2 ** min(index, halves) for index in range(num_levels)]
    if num_levels > 1 and (found != expected or math.frexp(found[0])[0] != 0.5):
        raise ValueError(f"scales must be powers of two, each half of the one before it, got {scales}")
    return found


def level_edges(
    scales: Sequence[float], canonical_scale: float, canonical_level: int, *, dtype: torch.dtype
) -> list[float]:
    """The least areas, in pixels, of the boxes pooled from the second level, and from those after it."""
    if len(scales) == 1:
        return []
    lowest, highest = (-int(math.log2(scale)) for scale in (scales[0], scales[-1]))
    return [_level_edge(level, canonical_scale, canonical_level, dtype) for level in range(lowest + 1, highest + 1)]


@functools.lru_cache(maxsize=256)
def _level_edge(level: int, canonical_scale: float, canonical_level: int, dtype: torch.dtype) -> float:
    """The least area that torchvision's LevelMapper gives `level` or a higher one.

    Found by bisection of the bit patterns of `dtype`, which are ordered as the floats, with the mapper's own floating
    point expression: comparing with the edge then gives its level on every device.
    """
    integer, high = (torch.int64, 0x7FF << 52) if dtype == torch.float64 else (torch.int32, 0xFF << 23)

    def to_float(bits: int) -> Tensor:
        return torch.tensor([bits], dtype=integer, device="cpu").view(dtype)

    low = -1
    while high - low > 1:
        middle = (low + high) // 2
        length = torch.sqrt(to_float(middle))
        found = torch.floor(canonical_level + torch.log2(length / canonical_scale) + torch.tensor(1e-6, dtype=dtype))
        low, high = (low, middle) if found.item() >= level else (middle, high)
    return float(to_float(high))


def assign_levels(rois: Tensor, edges: list[float]) -> Tensor:
    """The level that each row of `rois` [K, 5] is pooled from, int64 [K]; a NaN area is below every edge.

    The area of an inverted box counts without its sign.
    """
    area = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).abs()
    levels = torch.zeros_like(area, dtype=torch.int64)
    for edge in edges:
        levels += area >= edge
    return levels
