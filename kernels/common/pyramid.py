"""Kernels over several levels of a pyramid: arguments for each level there may be, and the choice among them."""

from typing import Any

import torch
import triton
import triton.language as tl

MAX_LEVELS = 5
# Sizes change from image to image, and must not each be compiled for.
SIZES = [f"{side}_{level}" for side in ("height", "width") for level in range(MAX_LEVELS)]


@triton.jit
def pick(level, first, second, third, fourth, fifth):
    """The one of five numbers that belongs to a level."""
    value = tl.where(level == 1, second, first)
    value = tl.where(level == 2, third, value)
    value = tl.where(level == 3, fourth, value)
    return tl.where(level == 4, fifth, value)


@triton.jit
def level_of(rois_ptr, roi, edge_1, edge_2, edge_3, edge_4):
    """The level a RoI is pooled from: how many edges its area reaches, none if that is NaN."""
    base = rois_ptr + roi.to(tl.int64) * 5
    wide = tl.load(base + 3) - tl.load(base + 1)
    tall = tl.load(base + 4) - tl.load(base + 2)
    area = wide * tall
    lower = (area >= edge_1).to(tl.int32) + (area >= edge_2).to(tl.int32)
    return lower + (area >= edge_3).to(tl.int32) + (area >= edge_4).to(tl.int32)


@triton.jit
def pick_pointer(level, ptr_0, ptr_1, ptr_2, ptr_3, ptr_4):
    """The pointer of a level; absent levels are None."""
    ptr = ptr_0
    if ptr_1 is not None:
        ptr = tl.where(level == 1, ptr_1, ptr)
    if ptr_2 is not None:
        ptr = tl.where(level == 2, ptr_2, ptr)
    if ptr_3 is not None:
        ptr = tl.where(level == 3, ptr_3, ptr)
    if ptr_4 is not None:
        ptr = tl.where(level == 4, ptr_4, ptr)
    return ptr


def by_level(name: str, values: list[Any], absent: Any, first: int = 0) -> dict[str, Any]:
    """Arguments `name` with a number in it, one for each level there may be."""
    levels = range(first, MAX_LEVELS)
    return {name.format(level): value for level, value in zip(levels, values + [absent] * MAX_LEVELS, strict=False)}


def sizes_of(levels: list[torch.Tensor]) -> list[tuple[int, int]]:
    """(height, width) of each level [B, C, H, W]."""
    return [(level.shape[2], level.shape[3]) for level in levels]


def geometry(sizes: list[tuple[int, int]], scales: list[float], edges: list[float]) -> dict[str, Any]:
    """The arguments `height_0` .. `edge_4` of a kernel; `edges` are the least areas from the second level on."""
    return {
        **by_level("height_{}", [height for height, _ in sizes], 0),
        **by_level("width_{}", [width for _, width in sizes], 0),
        **by_level("scale_{}", scales, 1.0),
        **by_level("edge_{}", edges, float("nan"), first=1),  # that no area reaches, not an infinite one either
    }
