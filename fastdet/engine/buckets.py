"""Which padded shapes the steps of a run are captured for: few, with little padding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations, islice, product
from typing import Any, NamedTuple

from fastdet.data import DetectionDataset
from fastdet.engine.loading import plan_epoch, sizes_of
from fastdet.engine.recipes import TrainSettings
from fastdet.graphs.static_inputs import Shape
from fastdet.models.anchors import Size
from fastdet.models.preprocessing import padded_size, resized_size
from fastdet.models.settings import Settings

MOST_SHAPES = 6
# Batches that are looked at: the others are alike.
_MOST_BATCHES = 2000
_MOST_SEARCHED = 64
_MOST_BOXES = 128


class GraphPlan(NamedTuple):
    """The padded shapes (batch, channels, height, width) to capture, and the boxes an image that they hold."""

    shapes: tuple[Shape, ...]
    max_boxes: int


def plan_graphs(model: Settings, settings: TrainSettings, dataset: Any) -> GraphPlan:
    """Shapes for the full batches of a run, of a detector with the settings `model`.

    By the `sizes` of the data set, where it has them, else for images of all shapes; and by the boxes of a data set of
    `fastdet.data`, else for at most `_MOST_BOXES`.
    """
    length = len(dataset)
    padded = Counter(_padded_sizes(model, settings, sizes_of(dataset), length))
    chosen = merge(padded, MOST_SHAPES, model.size_divisible)
    batch, channels = min(settings.batch_size, length), len(model.image_mean)
    most = _MOST_BOXES
    if isinstance(dataset, DetectionDataset):
        most = max(len(dataset.target(index)["labels"]) for index in range(length))
    # As many rows as targets are padded to.
    rows = 1 << (max(most, 1) - 1).bit_length()
    return GraphPlan(tuple(sorted((batch, channels, *size) for size in chosen)), rows)


def merge(padded: Mapping[Size, int], most: int, divisible: int = 1) -> list[Size]:
    """At most so many (height, width) that hold all of `padded`, whose numbers say how often each occurs.

    Two are merged at a time, those that add the fewest pixels of padding. Multiples of `divisible` stay multiples.
    """
    counts = _coarsen(padded, divisible)
    while len(counts) > most:
        pair = min(combinations(sorted(counts), 2), key=partial(_added_pixels, counts))
        together = counts.pop(pair[0]) + counts.pop(pair[1])
        counts[_hull(pair)] += together
    return sorted(counts)


def _coarsen(padded: Mapping[Size, int], step: int) -> Counter[Size]:
    """The same with sides rounded up, so far that there are few, whose pairs are searched; none above the largest."""
    counts, largest = Counter(padded), _hull(padded)
    while len(counts) > _MOST_SEARCHED:
        step, rounded = 2 * step, Counter[Size]()
        for size, count in padded.items():
            height, width = (min(-(-side // step) * step, most) for side, most in zip(size, largest, strict=True))
            rounded[height, width] += count
        counts = rounded
    return counts


def _added_pixels(counts: Mapping[Size, int], pair: tuple[Size, Size]) -> int:
    area = math.prod(_hull(pair))
    return sum(counts[each] * (area - math.prod(each)) for each in pair)


def _hull(sizes: Iterable[Size]) -> Size:
    heights, widths = zip(*sizes, strict=True)
    return max(heights), max(widths)


def _padded_sizes(
    model: Settings, settings: TrainSettings, sizes: Sequence[Size] | None, length: int
) -> Iterable[Size]:
    """The padded size of each full batch of some epochs; and, once, one that holds any."""
    divisible, buckets = model.size_divisible, model.size_buckets
    if buckets:
        return [(height, width) for height, width in buckets]
    if settings.augmentation == "scale-jitter":
        return [padded_size([(model.min_sizes[-1], model.max_size)], divisible, ())]
    if sizes is None or settings.augmentation == "strong":
        least, most = min(model.min_sizes), model.max_size
        sides = least, round(math.sqrt(least * most)), most
        return [padded_size([pair], divisible, ()) for pair in product(sides, sides)]
    found = []
    for min_size in model.min_sizes:
        resized = [resized_size(size, min_size, model.max_size)[0] for size in sizes]
        batches = (batch for epoch in range(settings.epochs) for batch in plan_epoch(length, settings, epoch, sizes))
        full = (batch for batch in batches if len(batch) == min(settings.batch_size, length))
        found += [
            padded_size([resized[index] for index, _ in batch], divisible, ()) for batch in islice(full, _MOST_BATCHES)
        ]
        found.append(padded_size([_hull(resized)], divisible, ()))
    return found
