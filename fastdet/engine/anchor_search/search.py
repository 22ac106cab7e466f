"""The search: sizes and aspect ratios, changed one at a time."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fastdet.engine.anchor_search import reach
from fastdet.engine.anchor_search.candidates import Table, quantiles, tabulate
from fastdet.engine.anchor_search.reach import Array, ClippedBoxes
from fastdet.models.anchors import AnchorGenerator

# Sizes of one level, of each of several levels, and ratios.
_MOST_SIZES, _MOST_SIZES_PER_LEVEL, _MOST_RATIOS = 6, 3, 3
# What an anchor more in each cell has to add to the quality (0..1), and the result to the default's.
_LEAST_GAIN = 0.01
# A level is of no use if the quality falls by less than this without it.
_LEAST_LOSS = 0.002
# The search starts from each of these: the size in strides from which on a box counts to a level.
_START_STRIDES = (4.0, 6.0, 8.0)
_MOST_SWEEPS = 10


class Found(NamedTuple):
    """Anchors, and how many of the boxes they reach.

    Attributes:
        generator: the default with the sizes and ratios that were found, or as it was.
        share_50: share of the boxes whose IoU with an anchor is at least .5, as a mean over the classes; NaN without
            boxes.
        share_70: the same for .7.
        is_default: the default was kept.
    """

    generator: AnchorGenerator
    share_50: float
    share_70: float
    is_default: bool

    @property
    def sizes(self) -> tuple[tuple[float, ...], ...]:
        """For each level the square roots of the anchors' areas, in pixels of the resized image."""
        return self.generator.sizes

    @property
    def aspect_ratios(self) -> tuple[float, ...]:
        """Height over width. Those that were found are the same at every level; of a default, the first level's."""
        return self.generator.aspect_ratios[0]


def search(boxes: ArrayLike, sizes: ArrayLike, labels: ArrayLike, default: AnchorGenerator, inside_only: bool) -> Found:
    """Sizes and aspect ratios of anchors that reach the boxes of a data set, or the default where it does as well.

    What is maximized is the mean of `quality`, a smooth function of each box's largest IoU; every class counts alike.
    For each number of sizes and ratios the search starts from quantiles of the boxes, then changes one size or ratio at
    a time to the best candidate. An anchor more in each cell has to add 0.01. The sizes of a level suit its stride, and
    levels that no object needs continue the sizes of the others. No random numbers are drawn.

    The default is kept unless the quality rises by 0.01, and if fewer boxes were reached at .5 and .7 together. It need
    not rise if some of the default's anchors fit in no image.

    Args:
        boxes: [N, 4], x1, y1, x2, y2 in pixels of the resized images. Those without area in their image do not count.
        sizes: [N, 2], (height, width) of each box's resized image.
        labels: integers [N], the classes.
        default: the anchors to improve on; its strides, offset and rounding are kept.
        inside_only: use only anchors that lie wholly inside the image. One that fits in no image is not proposed, but
            for a level whose stride is too large for the images, of whose anchors none does.

    Raises:
        ValueError: as `best_overlaps`, or labels that are not one integer a box.
    """
    boxes, sizes = reach.check(boxes, sizes, default)
    labels = np.asarray(labels)
    if labels.shape != (len(boxes),) or (len(boxes) and labels.dtype.kind not in "iu"):
        raise ValueError(f"labels must be integers [{len(boxes)}], got {labels.dtype} {list(labels.shape)}")
    clipped = reach.clip_boxes(boxes, sizes)
    kept = (clipped.low < clipped.high).all(0)
    boxes, sizes, labels = boxes[kept], sizes[kept], labels[kept]
    clipped = ClippedBoxes(*(part[:, kept] for part in clipped))
    if not len(boxes):
        return Found(default, math.nan, math.nan, True)
    largest = reach.largest_images(sizes)
    old = reach.measure(boxes, sizes, labels, default, inside_only)
    proposed = _propose(tabulate(clipped, labels, largest, default, inside_only), default)
    if proposed is not None:
        new = reach.measure(boxes, sizes, labels, proposed, inside_only)
        least_gain = 0.0 if inside_only and not reach.all_fit(default, largest) else _LEAST_GAIN
        is_better = new.quality > old.quality + least_gain
        if is_better and new.share_50 + new.share_70 >= old.share_50 + old.share_70:
            return Found(proposed, new.share_50, new.share_70, False)
    return Found(default, old.share_50, old.share_70, True)


class _Choice(NamedTuple):
    """Rows (sizes) and columns (ratios) of a table.

    Its score is the quality of their anchors together, less 1 for each anchor that does not fit.
    """

    rows: list[int]
    columns: list[int]
    score: float


def _propose(table: Table, default: AnchorGenerator) -> AnchorGenerator | None:
    """The default with the best sizes and ratios; None if some of their anchors did not fit."""
    strides = default.strides or ()
    most = _MOST_SIZES if len(strides) == 1 else _MOST_SIZES_PER_LEVEL
    best, best_value = None, -math.inf
    for num_sizes in range(1, min(most, *np.bincount(table.levels)) + 1):
        for num_ratios in range(1, min(_MOST_RATIOS, len(table.ratios)) + 1):
            choice = _choose(table, strides, num_sizes, num_ratios)
            value = choice.score - _LEAST_GAIN * num_sizes * num_ratios
            if value > best_value:
                best, best_value = choice, value
    if best is None or not table.fits[np.array(best.rows)[:, None], best.columns].all():
        return None
    levels = _continue_levels(table, best, len(strides))
    sizes = tuple(tuple(sorted(int(table.sizes[row]) for row in rows)) for rows in levels)
    return replace(default, sizes=sizes, aspect_ratios=(tuple(sorted(table.ratios[best.columns].tolist())),))


def _choose(table: Table, strides: tuple[int, ...], num_sizes: int, num_ratios: int) -> _Choice:
    """The best of so many sizes a level and ratios."""
    starts = [_start(table, strides, strides_from, num_sizes, num_ratios) for strides_from in _START_STRIDES]
    starts.append(_with_best_anchor(table, *starts[0]))
    different = [start for k, start in enumerate(starts) if start not in starts[:k]]
    return max((_descend(table, *start) for start in different), key=lambda choice: choice.score)


def _start(
    table: Table, strides: tuple[int, ...], strides_from: float, num_sizes: int, num_ratios: int
) -> tuple[list[int], list[int]]:
    """Rows and columns: quantiles of the boxes of each level, and of the ratios of all."""
    shares, rows = (np.arange(num_sizes) + 0.5) / num_sizes, []
    ends = [0.0, *(strides_from * stride for stride in strides[1:]), math.inf]
    for level, stride in enumerate(strides):
        boxes = (table.sides >= ends[level]) & (table.sides < ends[level + 1])
        if boxes.any():
            exact = quantiles(np.log(table.sides[boxes]), table.weights[boxes], shares)
        else:
            exact = np.log(strides_from * stride) + shares * np.log(2)
        rows += _nearest_rows(table, table.levels == level, exact)
    exact = quantiles(np.log(table.shapes), table.weights, (np.arange(num_ratios) + 0.5) / num_ratios)
    return rows, _nearest(np.log(table.ratios), exact)


def _with_best_anchor(table: Table, rows: list[int], columns: list[int]) -> tuple[list[int], list[int]]:
    """With the best single anchor of all in place of the size and the ratio that are nearest to it.

    Where anchors have to be smaller than the objects to fit, changes of a size or a ratio alone may not lead to it.
    """
    row, column = divmod(int((table.quality @ table.weights - ~table.fits).argmax()), len(table.ratios))
    old_row = min((k for k in rows if table.levels[k] == table.levels[row]), key=lambda k: abs(k - row))
    old_column = min(columns, key=lambda k: abs(k - column))
    return [row if k == old_row else k for k in rows], [column if k == old_column else k for k in columns]


def _nearest_rows(table: Table, allowed: Array, logs: Array) -> list[int]:
    """Of the candidates with True in `allowed` [C] those whose sizes are nearest to these, given as logarithms."""
    rows = np.flatnonzero(allowed)
    return rows[_nearest(np.log(table.sizes[rows]), logs)].tolist()


def _nearest(candidates: Array, values: Array) -> list[int]:
    """For each value the index of the nearest candidate that no value before has; there are at least as many."""
    chosen: list[int] = []
    for value in values:
        distance = np.abs(candidates - value)
        distance[chosen] = math.inf
        chosen.append(int(distance.argmin()))
    return chosen


def _descend(table: Table, rows: list[int], columns: list[int]) -> _Choice:
    """Change one size or ratio at a time to the best candidate, until nothing brings more."""
    rows, columns, score = list(rows), list(columns), -math.inf
    by_row, by_column = (table.quality, table.fits), (table.quality.swapaxes(0, 1), table.fits.T)
    for _ in range(_MOST_SWEEPS):
        before = score
        for k in range(len(rows)):
            allowed = np.flatnonzero(_allowed_rows(table, rows, k))
            rows[k], score = _best_candidate(*by_row, table.weights, allowed, rows[:k] + rows[k + 1 :], columns)
        for k in range(len(columns)):
            others = columns[:k] + columns[k + 1 :]
            allowed = np.setdiff1d(np.arange(len(table.ratios)), others)
            columns[k], score = _best_candidate(*by_column, table.weights, allowed, others, rows)
        if score < before + 1e-5:
            break
    return _Choice(rows, columns, score)


def _best_candidate(
    quality: Array, fits: Array, weights: Array, candidates: Array, others: list[int], crossed: list[int]
) -> tuple[int, float]:
    """The best of `candidates` beside `others`, and the score then.

    All are indices of the first axis of `quality` [.., .., M] and `fits`, `crossed` those of the second.
    """
    best = quality[candidates[:, None], crossed].max(1)
    unfit = (~fits[candidates[:, None], crossed]).sum(1)
    if others:
        beside = np.array(others)[:, None]
        best = np.maximum(best, quality[beside, crossed].max((0, 1)))
        unfit = unfit + (~fits[beside, crossed]).sum()
    scores = best @ weights - unfit
    return int(candidates[scores.argmax()]), float(scores.max())


def _allowed_rows(table: Table, rows: list[int], k: int) -> Array:
    """bool [C]: the candidates of the level of rows[k] that no other row has, between the sizes of other levels."""
    level, others = table.levels[rows[k]], np.array(rows[:k] + rows[k + 1 :], dtype=np.int64)
    finer, coarser = others[table.levels[others] < level], others[table.levels[others] > level]
    low, high = table.sizes[finer].max(initial=0), table.sizes[coarser].min(initial=math.inf)
    allowed = (table.levels == level) & (table.sizes >= low) & (table.sizes <= high)
    allowed[others] = False
    allowed[rows[k]] = True
    return allowed


def _continue_levels(table: Table, choice: _Choice, num_levels: int) -> list[list[int]]:
    """The rows of each level. Those of a level that no object needs continue the sizes of the levels beside it.

    They double from level to level, or rise evenly to those of a coarser level that is needed.
    """
    rows = [[row for row in choice.rows if table.levels[row] == level] for level in range(num_levels)]
    needed = _needed_levels(table, rows, choice.columns)
    fits = table.fits[:, choice.columns].all(1)
    for level in [*range(needed[0], num_levels), *reversed(range(needed[0]))]:
        allowed = (table.levels == level) & fits
        if level in needed or allowed.sum() < len(rows[level]):
            continue
        neighbor = level - 1 if level > needed[0] else level + 1
        logs = np.sort(np.log(table.sizes[rows[neighbor]]))
        above = [other for other in needed if other > level > needed[0]]
        if above:
            step = (np.sort(np.log(table.sizes[rows[above[0]]])) - logs) / (above[0] - neighbor)
        else:
            step = (level - neighbor) * np.log(2)
        rows[level] = _nearest_rows(table, allowed, logs + step)
    return rows


def _needed_levels(table: Table, rows: list[list[int]], columns: list[int]) -> list[int]:
    """The levels, ascending, without which the quality would fall; of several alike the finest."""

    def quality(levels: list[int]) -> float:
        chosen = np.array([row for level in levels for row in rows[level]])
        return float(table.quality[chosen[:, None], columns].max((0, 1)) @ table.weights)

    needed = list(range(len(rows)))
    for level in reversed(needed.copy()):
        without = [other for other in needed if other != level]
        if without and quality(without) > quality(needed) - _LEAST_LOSS:
            needed = without
    return needed
