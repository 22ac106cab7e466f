"""Overlaps of boxes on the CPU, tile by tile: the arithmetic that `box_iou`, `match` and `nms` share there."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Pairs of a tile: few enough for a core's cache, and for torch to keep to one thread, so that no operator waits for
# another thread.
TILE = 32 * 1024 - 1

Planes = Sequence[Tensor]  # x1, y1, x2, y2 and area, apart
Memory = Sequence[Tensor]  # three tensors of the shape of the result


def make_proper(planes: Planes, allowed: Tensor | None = None) -> None:
    """Put each box that can overlap nothing (inverted, no area, not finite, not `allowed`) at the origin.

    There it has no extent, but an area of 1: so no tile has to look for it, nor for NaN.
    """
    x1, y1, x2, y2, area = planes
    proper = (area > 0) & (area < math.inf) & (x2 > x1)
    if allowed is not None:
        proper &= allowed
    if not proper.all():
        improper = ~proper
        for corner in (x1, y1, x2, y2):
            corner.masked_fill_(improper, 0.0)
        area.masked_fill_(improper, 1.0)


def intersection(first: Planes, second: Planes, memory: Memory) -> Tensor:
    """Shared areas of proper boxes, which broadcast, in the first tensor of `memory`.

    What two intervals share is one of them held to the other. The last dimension should be that of `second`.
    """
    ax1, ay1, ax2, ay2, _ = first
    bx1, by1, bx2, by2, _ = second
    out, one, other = memory
    torch.clamp(ax2, bx1, bx2, out=out).sub_(torch.clamp(ax1, bx1, bx2, out=one))
    torch.clamp(ay2, by1, by2, out=other).sub_(torch.clamp(ay1, by1, by2, out=one))
    return out.mul_(other)


def iou(first: Planes, second: Planes, memory: Memory) -> Tensor:
    """IoU, rounded at each step as the kernels round; else as `intersection`."""
    inter = intersection(first, second, memory)
    return inter.div_(torch.add(first[4], second[4], out=memory[1]).sub_(inter))
