"""The resizing and the anchors that the objects of a data set need, for detectors where nothing is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdet.data import DetectionDataset
from fastdet.engine.anchor_search import best_overlaps, search
from fastdet.models.anchors import AnchorGenerator
from fastdet.models.preprocessing import resized_size
from fastdet.models.settings import Settings

# What all but a tenth of the smallest class's boxes have at least: a side in pixels of the resized image, and one in
# strides of the finest features.
_SMALL_OBJECT, _SMALL_OBJECT_STRIDES, _SHARE_BELOW = 24.0, 3, 0.1
_LEAST_SIDE, _SIDE_STEP = 320, 32
# Of the sides of objects: below half of the smallest, proposals are not of them.
_SMALLEST_PROPOSAL = 0.5


class Objects(NamedTuple):
    """The objects of a data set that are to be found.

    Attributes:
        boxes: float32 [N, 4] x1, y1, x2, y2 in pixels of the original images, clipped to them.
        labels: int64 [N].
        image: int64 [N], the index of the image.
        sizes: int64 [B, 2], (height, width) of the images.
        ignored: the number of boxes that are to be ignored, which are not among these.
    """

    boxes: NDArray[Any]
    labels: NDArray[Any]
    image: NDArray[Any]
    sizes: NDArray[Any]
    ignored: int

    def resize(self, settings: Settings) -> tuple[NDArray[Any], NDArray[Any]]:
        """The boxes, and (height, width) [N, 2] of their images, as a detector resizes them in evaluation."""
        min_size, max_size = settings.min_sizes[-1], settings.max_size
        resized = np.array([resized_size(tuple(size), min_size, max_size)[0] for size in self.sizes.tolist()])
        sizes = resized.reshape(-1, 2)[self.image]
        return self.boxes * (sizes / self.sizes[self.image])[:, [1, 0, 1, 0]], sizes


def collect_objects(dataset: DetectionDataset) -> Objects:
    """All boxes of a data set that are not to be ignored."""
    boxes, labels, image = list[NDArray[Any]](), list[NDArray[Any]](), list[NDArray[Any]]()
    ignored = 0
    for index, (height, width) in enumerate(dataset.sizes):
        target = dataset.target(index)
        kept = ~target["ignore"]
        ignored += int((~kept).sum())
        boxes.append(np.clip(target["boxes"][kept], 0, [width, height, width, height]))
        labels.append(target["labels"][kept])
        image.append(np.full(int(kept.sum()), index))
    sizes = np.array(dataset.sizes, dtype=np.int64).reshape(-1, 2)
    return Objects(
        np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        np.concatenate([np.zeros(0, np.int64), *labels]),
        np.concatenate([np.zeros(0, np.int64), *image]),
        sizes,
        ignored,
    )


def choose_min_size(objects: Objects, stride: int, most: int) -> int:
    """The shorter side of resized images, at most `most`, with which small objects have enough pixels and cells.

    It is the least at which the root of the area of nine tenths of the boxes of each class is at least 24 pixels and 3
    times the `stride` of the finest features, but not below 320.
    """
    if not len(objects.boxes):
        return most
    areas = np.prod(objects.boxes[:, 2:] - objects.boxes[:, :2], axis=1)
    sides = np.sqrt(areas) / objects.sizes[objects.image].min(axis=1)
    smallest = min(np.quantile(sides[objects.labels == k], _SHARE_BELOW) for k in np.unique(objects.labels))
    wanted = max(_SMALL_OBJECT, _SMALL_OBJECT_STRIDES * stride) / max(float(smallest), 1e-6)
    return int(min(most, max(_LEAST_SIDE, -(-wanted // _SIDE_STEP) * _SIDE_STEP)))


def balance_classes(objects: Objects, num_classes: int) -> tuple[float, ...]:
    """`Settings.class_weights` by which the boxes of each class count alike, the background's 1 first.

    That of a class is the mean number of boxes of the classes that have any over its own; 1 for one without boxes.
    """
    counts = np.bincount(objects.labels, minlength=num_classes)[1:num_classes]
    present = counts > 0
    weights = np.where(present, counts[present].mean() / np.maximum(counts, 1), 1.0) if present.any() else counts + 1.0
    return 1.0, *weights.tolist()


def smallest_proposal(objects: Objects, default: float) -> float:
    """`Settings.rpn_min_size`, in pixels of the original images, with which the smallest objects are still proposed."""
    if not len(objects.boxes):
        return default
    return min(default, float(_SMALLEST_PROPOSAL * (objects.boxes[:, 2:] - objects.boxes[:, :2]).min()))


def choose_anchors(
    objects: Objects, settings: Settings, anchors: Mapping[str, Any], strides: tuple[int, ...]
) -> dict[str, Any]:
    """Anchors that reach the objects, as the "anchors" of an architecture; those given where they do as well.

    Args:
        objects: of the data set.
        settings: of the detector; its anchors are not used.
        anchors: the backbone's default.
        strides: of its levels.
    """
    if not len(objects.boxes):
        return dict(anchors)
    generator = _to_generator(anchors, strides)
    found = search(*objects.resize(settings), objects.labels, generator, settings.rpn_anchors_inside_only)
    return {**anchors, "sizes": found.sizes, "aspect_ratios": (found.aspect_ratios,)}


def measure_reach(
    objects: Objects, settings: Settings, anchors: Mapping[str, Any], strides: tuple[int, ...]
) -> NDArray[Any]:
    """The largest IoU of each object with an anchor, [N]. Arguments as of `choose_anchors`."""
    return best_overlaps(*objects.resize(settings), _to_generator(anchors, strides), settings.rpn_anchors_inside_only)


def _to_generator(anchors: Mapping[str, Any], strides: tuple[int, ...]) -> AnchorGenerator:
    return replace(AnchorGenerator(**anchors), strides=strides)
