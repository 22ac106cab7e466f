"""Suppression of many boxes on the CPU: boxes overlap only with near ones, so tiles of near boxes leave few pairs."""

import numpy as np
import torch
import torchvision.ops  # noqa: F401  (registers the operator that is called)
from numpy.typing import NDArray

from fastdet.ops.cpu.overlap import TILE, iou
from fastdet.ops.cpu.sorting import Index, radix_argsort

# Boxes of a tile, which are near one another.
_LANES = 32
# Boxes that are suppressed among themselves, in time quadratic in their number, before their kept ones go on.
_BLOCK = 256
# Beyond it coordinates are as far as it, so that no difference of them overflows.
_LARGEST = np.float32(2.0**60)


def suppress_tiles(planes: NDArray[np.float32], threshold: float, max_keep: int) -> Index:
    """The boxes that are kept of `planes` [5, N], in descending priority and none of them invalid; at most `max_keep`.

    A block after the other: the first boxes that are neither removed nor kept are suppressed among themselves by
    torchvision's operator, then what they keep removes what it overlaps of all boxes after them.
    """
    order = radix_argsort(_z_order(planes[:4]))
    priority = torch.arange(_BLOCK, 0, -1, dtype=torch.float32, device="cpu")
    undecided = np.ones(planes.shape[1], np.bool_)
    found: list[Index] = []
    start, num_kept = 0, 0
    while len(order) and num_kept < max_keep:
        block = _first(undecided, start, _BLOCK)
        corners = torch.from_numpy(planes[:4].take(block, axis=1)).t()
        kept = block.take(torch.ops.torchvision.nms(corners, priority[: len(block)], threshold).numpy())
        found.append(kept[: max_keep - num_kept])
        num_kept += len(kept)
        start = int(block[-1]) + 1
        undecided[block] = False
        order = order.compress(undecided.take(order))
        if len(order) and num_kept < max_keep:
            undecided[_removed(planes, order, kept, threshold)] = False
            order = order.compress(undecided.take(order))
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _first(chosen: NDArray[np.bool_], start: int, count: int) -> Index:
    """The first `count` places from `start` on that are chosen, all if there are fewer."""
    span = 4 * count
    while True:
        found = np.flatnonzero(chosen[start : start + span])
        if len(found) >= count or start + span >= len(chosen):
            return start + found[:count]
        span *= 4


def _removed(planes: NDArray[np.float32], order: Index, kept: Index, threshold: float) -> Index:
    """Which boxes of `order` [M], near ones next to each other, overlap one of `kept` [K]."""
    # The last box fills up the last tile.
    order = np.append(order, np.repeat(order[-1:], -len(order) % _LANES))
    boxes, kept_boxes = planes.take(order, axis=1).reshape(5, -1, _LANES), planes.take(kept, axis=1)
    tile, partner = _find_pairs(boxes, kept_boxes, threshold)
    removed = np.zeros((boxes.shape[1], _LANES), np.bool_)
    # Allocated once: memory of this size comes from the system anew each time.
    size = TILE // _LANES
    tile_boxes = np.empty(5 * min(size, len(tile)) * _LANES, np.float32)
    scratch = torch.empty(3, size, _LANES, device="cpu")
    for start in range(0, len(tile), size):
        tiles, partners = tile[start : start + size], partner[start : start + size]
        first = torch.from_numpy(kept_boxes.take(partners, axis=1)[..., None])
        second = tile_boxes[: 5 * len(tiles) * _LANES].reshape(5, -1, _LANES)
        boxes.take(tiles, axis=1, out=second, mode="clip")
        memory = scratch[:, : len(tiles)].unbind()
        overlapping = iou(first.unbind(), torch.from_numpy(second).unbind(), memory).numpy() > threshold
        # Eight boxes to a word. Pairs of the same tile follow one another.
        changes = np.flatnonzero(np.append(True, tiles[1:] != tiles[:-1]))
        removed.view(np.uint64)[tiles[changes]] |= np.bitwise_or.reduceat(overlapping.view(np.uint64), changes)
    return order.compress(removed.reshape(-1))


def _find_pairs(tiles: NDArray[np.float32], kept: NDArray[np.float32], threshold: float) -> tuple[Index, Index]:
    """Pairs of a tile [5, T, lanes] and a kept box [5, K] that may overlap by more than the threshold, tile by tile.

    In a tile no intersection is larger than that with the tile's bounds, nor than its largest box, and no union
    smaller than with its smallest box.
    """
    low, high = (part(torch.from_numpy(tiles), 2).numpy()[..., None] for part in (torch.amin, torch.amax))
    inter = np.maximum(np.minimum(high[2], kept[2]) - np.maximum(low[0], kept[0]), 0)
    inter *= np.minimum(high[3], kept[3]) - np.maximum(low[1], kept[1])
    np.minimum(inter, np.minimum(high[4], kept[4]), out=inter)
    # IoU > t is inter > t / (1 + t) * (area + area), here with a margin for rounding.
    least = (low[4] + kept[4]) * np.float32(threshold / (1 + threshold) * (1 - 1e-5))
    return np.nonzero(~(inter < least))  # type: ignore[return-value]


def _z_order(corners: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Places of boxes [4, N] on a curve along which near ones of similar size are near: the bits of four coordinates,
    8 of each, interleaved."""
    corners = np.clip(corners, -_LARGEST, _LARGEST)
    low, high = corners.min(1, keepdims=True), corners.max(1, keepdims=True)
    # Each byte with its bits four apart.
    spread: NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for shift, mask in ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)):
        spread = (spread | spread << np.uint32(shift)) & np.uint32(mask)
    bits = spread.take(((corners - low) * (255 / np.maximum(high - low, 1 / _LARGEST))).astype(np.uint8))
    return bits[0] | bits[1] << 1 | bits[2] << 2 | bits[3] << 3
