"""How well the anchors of a detector overlap ground-truth boxes, without laying out their grids."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastdet.models.anchors import MAX_SIDE, AnchorGenerator

Array = NDArray[Any]

# Boxes at a time, so that their arrays stay in the cache.
_CHUNK = 1 << 14


def best_overlaps(boxes: ArrayLike, sizes: ArrayLike, generator: AnchorGenerator, inside_only: bool) -> Array:
    """The largest IoU of each box with any anchor of its image, float64 [N]; 0 for a box without area.

    Args:
        boxes: [N, 4], x1, y1, x2, y2 in pixels of the resized images; clipped to them here.
        sizes: [N, 2], (height, width) of each box's resized image. A level has ceil(side / stride) cells along a side;
            cells of the padding are not used.
        generator: with strides.
        inside_only: use only anchors that lie wholly inside the image.

    Raises:
        ValueError: a wrong shape, a box that is not finite, an image without pixels, or a generator without strides.
    """
    boxes, sizes = check(boxes, sizes, generator)
    best = np.zeros(len(boxes))
    cells = [cell.double().numpy() for cell in generator.cell_anchors()]
    for begin in range(0, len(boxes), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        clipped = clip_boxes(boxes[part], sizes[part])
        for cell, stride in zip(cells, generator.strides or (), strict=True):
            for anchor in cell:
                np.maximum(best[part], overlap(clipped, anchor, stride, inside_only), out=best[part])
    return best


def class_shares(overlaps: Array, labels: ArrayLike, threshold: float) -> dict[int, float]:
    """For each class that has boxes the share of them whose overlap [N] is at least the threshold."""
    return _class_means(overlaps >= threshold, np.asarray(labels))


class Reach(NamedTuple):
    """How well boxes are reached, each as a mean over the classes.

    Attributes:
        share_50: share of the boxes whose IoU with an anchor is at least .5.
        share_70: the same for .7.
        quality: mean of `quality`.
    """

    share_50: float
    share_70: float
    quality: float


def measure(boxes: Array, sizes: Array, labels: Array, generator: AnchorGenerator, inside_only: bool) -> Reach:
    """Arguments as of `best_overlaps`, and integers `labels` [N]; N is at least 1."""
    overlaps = best_overlaps(boxes, sizes, generator, inside_only)
    values = overlaps >= 0.5, overlaps >= 0.7, quality(overlaps)
    return Reach(*(float(np.mean(list(_class_means(value, labels).values()))) for value in values))


def quality(overlaps: Array) -> Array:
    """Of IoUs, 0..1: it rises mostly from .4 to .8, without the steps that shares reached at .5 and .7 have.

    The root is for boxes that no anchor comes near to: only what an anchor touches at all can be learned.
    """
    return 0.1 * np.sqrt(overlaps) + 0.9 * np.clip((overlaps - 0.4) / 0.4, 0, 1)


class ClippedBoxes(NamedTuple):
    """Boxes within their images by axis, x and y: where they begin and end, and the sides of the images; each float64
    [2, N]."""

    low: Array
    high: Array
    sides: Array


def check(boxes: ArrayLike, sizes: ArrayLike, generator: AnchorGenerator) -> tuple[Array, Array]:
    """The arguments of `best_overlaps` as arrays. Raises ValueError as that does."""
    boxes, sizes = np.asarray(boxes), np.asarray(sizes)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise ValueError(f"boxes must be finite [N, 4], got {boxes.dtype} {list(boxes.shape)}")
    if sizes.shape != (len(boxes), 2) or not ((sizes >= 1) & (sizes <= MAX_SIDE)).all():
        raise ValueError(f"sizes must be [{len(boxes)}, 2] in 1..{MAX_SIDE}, got {sizes.dtype} {list(sizes.shape)}")
    if generator.strides is None:
        raise ValueError("the anchor generator must have strides, got None")
    return boxes, sizes


def clip_boxes(boxes: Array, sizes: Array) -> ClippedBoxes:
    """Boxes [N, 4], clipped to the images of these (height, width) [N, 2]."""
    sides, corners = sizes[:, ::-1].T.astype(np.float64), boxes.T.astype(np.float64)
    return ClippedBoxes(np.clip(corners[:2], 0, sides), np.clip(corners[2:], 0, sides), sides)


def overlap(clipped: ClippedBoxes, anchor: Array, stride: int, inside_only: bool) -> Array:
    """The IoU [N] of boxes with the best copy on the grid of `anchor` [4], which is given in the first cell.

    The intersection is a product of two lengths, each of which falls with the distance between the centers along its
    axis. So the best copy is the one nearest to the box along x and along y.
    """
    low, high, sides = clipped
    start, end = anchor[:2, None], anchor[2:, None]
    first, last = _cells(sides, start, end, stride, inside_only)
    nearest = np.rint((low + high - (start + end)) / (2 * stride))
    shift = np.minimum(np.maximum(nearest, first), last) * stride
    length = np.maximum(np.minimum(high, end + shift) - np.maximum(low, start + shift), 0) * (first <= last)
    both = length[0] * length[1]
    union = (high - low).prod(0) + (end - start).prod() - both
    return both / np.maximum(union, np.finfo(np.float64).tiny)


def largest_images(sizes: Array) -> Array:
    """Of (height, width) [N, 2] those that fit in no other: an anchor that fits in any image fits in one of these."""
    ordered = np.unique(sizes, axis=0)[::-1]
    widest = np.maximum.accumulate(ordered[:, 1])
    return ordered[np.append(True, ordered[1:, 1] > widest[:-1])]


def fits(anchor: Array, stride: int, sizes: Array) -> bool:
    """Whether `anchor` [4] has an area, and a copy of it lies inside an image of one of these `sizes` [K, 2]."""
    start, end = anchor[:2, None], anchor[2:, None]
    first, last = _cells(sizes[:, ::-1].T.astype(np.float64), start, end, stride, True)
    return bool((start < end).all() and (first <= last).all(0).any())


def all_fit(generator: AnchorGenerator, sizes: Array) -> bool:
    """Whether each anchor of a generator with strides fits in an image of one of these `sizes` [K, 2]."""
    levels = zip(generator.cell_anchors(), generator.strides or (), strict=True)
    return all(fits(anchor, stride, sizes) for cell, stride in levels for anchor in cell.double().numpy())


def _cells(sides: Array, start: Array, end: Array, stride: int, inside_only: bool) -> tuple[Array, Array]:
    """The first and the last cell [2, N] whose copy of an anchor is used; none is where the last is before the first.

    The anchor reaches from `start` [2, 1] to `end` [2, 1] in the first cell.
    """
    last = np.ceil(sides / stride) - 1
    if not inside_only:
        return np.zeros_like(last), last
    first = np.maximum(np.ceil(-start / stride), np.zeros_like(last))
    # A detector adds in float32, where an end just beyond the image is rounded to its side.
    rounding = np.spacing(sides.astype(np.float32)).astype(np.float64) / 2
    return first, np.minimum(last, np.floor((sides + rounding - end) / stride))


def _class_means(values: Array, labels: Array) -> dict[int, float]:
    classes, index = np.unique(labels, return_inverse=True)
    means = np.bincount(index, values) / np.bincount(index)
    return dict(zip(classes.tolist(), means.tolist(), strict=True))
