"""Kernels over several levels of a feature pyramid: arguments for MAX_LEVELS levels, and the selection of one."""

from typing import Any

import torch
import triton
import triton.language as tl

MAX_LEVELS = 5
# For `do_not_specialize`: sizes change from image to image, and must not each compile a kernel.
SIZES = [f"{side}_{level}" for side in ("height", "width") for level in range(MAX_LEVELS)]


@triton.jit
def select_value(level, value_0, value_1, value_2, value_3, value_4):
    """The value of a level."""
    value = tl.where(level == 1, value_1, value_0)
    value = tl.where(level == 2, value_2, value)
    value = tl.where(level == 3, value_3, value)
    return tl.where(level == 4, value_4, value)


@triton.jit
def select_pointer(level, ptr_0, ptr_1, ptr_2, ptr_3, ptr_4):
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


@triton.jit
def roi_level(
    rois_ptr,  # [R, 5] fp32: image index, x1, y1, x2, y2 in pixels
    roi,  # int32
    edge_1,  # least area of each level after the first, square pixels, ascending
    edge_2,
    edge_3,
    edge_4,
):
    """The level that a RoI is pooled from: the number of edges that its area reaches, 0 if the area is NaN.

    Of an inverted RoI the area counts without its sign, so that none of a level spans more cells than its area allows.
    """
    roi_ptr = rois_ptr + roi.to(tl.int64) * 5
    width = tl.load(roi_ptr + 3) - tl.load(roi_ptr + 1)
    height = tl.load(roi_ptr + 4) - tl.load(roi_ptr + 2)
    area = tl.abs(width * height)
    lower = (area >= edge_1).to(tl.int32) + (area >= edge_2).to(tl.int32)
    return lower + (area >= edge_3).to(tl.int32) + (area >= edge_4).to(tl.int32)


@triton.jit
def tile_rows_above(level, height_0, height_1, height_2, height_3, TILE: tl.constexpr):
    """Rows of tiles, TILE cells high, of all levels before this one: the levels are stacked."""
    rows_1 = tl.cdiv(height_0, TILE)
    rows_2 = rows_1 + tl.cdiv(height_1, TILE)
    rows_3 = rows_2 + tl.cdiv(height_2, TILE)
    return select_value(level, 0, rows_1, rows_2, rows_3, rows_3 + tl.cdiv(height_3, TILE))


def arguments_by_level(name: str, values: list[Any], absent: Any, first: int = 0) -> dict[str, Any]:
    """Keyword arguments `name`, such as "height_{}", of levels `first` .. MAX_LEVELS - 1; `absent` pads `values`."""
    levels = range(first, MAX_LEVELS)
    return {name.format(level): value for level, value in zip(levels, values + [absent] * MAX_LEVELS, strict=False)}


def sizes_of(levels: list[torch.Tensor]) -> list[tuple[int, int]]:
    """(height, width) of each level [B, C, H, W]."""
    return [(level.shape[2], level.shape[3]) for level in levels]


def size_arguments(sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Keyword arguments `height_0` .. `width_4`."""
    heights = arguments_by_level("height_{}", [height for height, _ in sizes], 0)
    return heights | arguments_by_level("width_{}", [width for _, width in sizes], 0)


def scale_arguments(scales: list[float], edges: list[float]) -> dict[str, Any]:
    """Keyword arguments `scale_0` .. `edge_4`; `edges` are the least areas of the levels after the first."""
    # The edge of an absent level is NaN, which no area reaches, not even an infinite one.
    return arguments_by_level("scale_{}", scales, 1.0) | arguments_by_level("edge_{}", edges, float("nan"), first=1)
