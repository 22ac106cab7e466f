"""Candidate anchors of a search, and how well each overlaps boxes of a data set."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fastdet.engine.anchor_search import reach
from fastdet.engine.anchor_search.reach import Array, ClippedBoxes
from fastdet.models.anchors import MAX_SIDE, AnchorGenerator

# Boxes that a search looks at; they are drawn evenly from the classes, and from the areas in each.
_MOST_BOXES = 4000
# Candidates: sizes are apart by this factor, ratios by this one or more, so that there are about so many at most.
_SIZE_STEP, _RATIO_STEP, _RATIO_STEPS = 2 ** (1 / 8), 1.12, 40
# Sizes of a level, in strides: the head is shared by the levels, to which its objects have to look alike.
_LEAST_STRIDES, _MOST_STRIDES = 3, 12


class Table(NamedTuple):
    """What each candidate brings.

    Attributes:
        sizes, levels: [C], the candidate sizes of every level, level after level, ascending in each.
        ratios: [R], ascending.
        quality: float32 [C, R, M], of each anchor for each of M boxes.
        fits: bool [C, R], whether the anchor may be used: it fits in an image, or need not, or none of its level does.
        sides, shapes: [M], the boxes' square roots of the area, and their heights over widths.
        weights: [M], the boxes' weights: in sum 1, and equal for every class.
    """

    sizes: Array
    levels: Array
    ratios: Array
    quality: Array
    fits: Array
    sides: Array
    shapes: Array
    weights: Array


def tabulate(
    clipped: ClippedBoxes, labels: Array, largest: Array, default: AnchorGenerator, inside_only: bool
) -> Table:
    """The table of candidates for the strides, offset and rounding of a generator.

    Args:
        clipped: at least one, each with an area.
        labels: integers [N], their classes.
        largest: [K, 2], (height, width) of the largest images.
        default: with strides.
        inside_only: use only anchors that lie wholly inside the image.
    """
    index, weights = _sample(labels, (clipped.high - clipped.low).prod(0))
    clipped = ClippedBoxes(*(part[:, index] for part in clipped))
    width, height = clipped.high - clipped.low
    sides, shapes = np.sqrt(width * height), height / width
    strides = default.strides or ()
    ratios = _ratio_candidates(shapes, weights)
    # Sizes up to this fit in an image, about, with any of the ratios.
    limit = largest.min(1).max() / math.sqrt(max(ratios[-1], 1 / ratios[0])) if inside_only else math.inf
    sizes = _size_candidates(sides, strides, limit)
    counts = [len(level) for level in sizes]
    quality = np.empty((sum(counts), len(ratios), len(index)), dtype=np.float32)
    fits = np.ones(quality.shape[:2], dtype=np.bool_)
    for column, ratio in enumerate(ratios.tolist()):
        generator = replace(default, sizes=tuple(tuple(level.tolist()) for level in sizes), aspect_ratios=((ratio,),))
        cells = zip(generator.cell_anchors(), strides, strict=True)
        anchors = [(anchor, stride) for cell, stride in cells for anchor in cell.double().numpy()]
        for row, (anchor, stride) in enumerate(anchors):
            quality[row, column] = reach.quality(reach.overlap(clipped, anchor, stride, inside_only))
            fits[row, column] = not inside_only or reach.fits(anchor, stride, largest)
    levels = np.repeat(np.arange(len(sizes)), counts)
    for level in range(len(sizes)):
        # Where the images are too small for a level's stride, its anchors are of no use, of any size.
        fits[levels == level] |= not fits[levels == level].any()
    return Table(np.concatenate(sizes), levels, ratios, quality, fits, sides, shapes, weights)


def quantiles(values: Array, weights: Array, shares: Array) -> Array:
    """The values below which these shares of the weights lie, interpolated."""
    order = np.argsort(values, kind="stable")
    ordered = weights[order]
    return np.interp(shares * ordered.sum(), np.cumsum(ordered) - ordered / 2, values[order])


def _sample(labels: Array, area: Array) -> tuple[Array, Array]:
    """Indices of at most `_MOST_BOXES` boxes, and their weights: in sum 1, and equal for every class."""
    order = np.lexsort((area, labels))
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    drawn = np.minimum(count, max(_MOST_BOXES // len(count), 1))
    within = np.arange(drawn.sum()) - np.repeat(np.cumsum(drawn) - drawn, drawn)
    places = np.repeat(first, drawn) + ((within + 0.5) * np.repeat(count / drawn, drawn)).astype(np.int64)
    index, weights = order[places], np.repeat(1 / drawn, drawn)
    # There may be more classes than boxes are looked at.
    thinned = np.linspace(0, len(index) - 1, min(len(index), _MOST_BOXES)).astype(np.int64)
    return index[thinned], weights[thinned] / weights[thinned].sum()


def _size_candidates(sides: Array, strides: tuple[int, ...], limit: float) -> list[Array]:
    """For each level sizes that suit its stride and the boxes, ascending; the outer levels take the other boxes."""
    candidates = []
    for level, stride in enumerate(strides):
        low, high = float(_LEAST_STRIDES * stride), float(_MOST_STRIDES * stride)
        if level == 0:
            low = min(low, sides.min() / 1.5)
        if level == len(strides) - 1:
            high = max(high, sides.max() * 1.5)
        low = min(low, limit / 2)
        # Powers of the step, so that a small change of a box changes no candidate but the outermost.
        steps = (math.log(side, _SIZE_STEP) for side in (max(low, 1.0), min(high, MAX_SIDE)))
        first, last = (round(step) for step in steps)
        exact = _SIZE_STEP ** np.arange(first, last + 1)
        rounded = [float(round(size)) if size < 100 else _round(size) for size in exact.tolist()]
        candidates.append(np.unique(rounded))
    return candidates


def _ratio_candidates(shapes: Array, weights: Array) -> Array:
    """Ratios between the least and the largest of most boxes and 1, and one beyond each end.

    Those between suit objects that are smaller than the stride.
    """
    low, high = np.log(quantiles(shapes, weights, np.array([0.01, 0.99])).clip(1 / 64, 64))
    low, high = min(low, 0.0), max(high, 0.0)
    step = max(math.log(_RATIO_STEP), (high - low) / _RATIO_STEPS)
    exact = np.exp(step * np.arange(math.floor(low / step) - 1, math.ceil(high / step) + 2))
    return np.unique([_round(ratio) for ratio in exact.tolist()])


def _round(value: float) -> float:
    """To two significant digits."""
    return float(f"{value:.2g}")
