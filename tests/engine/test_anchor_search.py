"""The reach of anchors against grids that are laid out, and what the search for anchors promises."""

import math
import sys
import tracemalloc
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from fastdet.data import VOC
from fastdet.engine.anchor_search import best_overlaps, class_shares, search
from fastdet.engine.anchor_search.candidates import Table, tabulate
from fastdet.engine.anchor_search.reach import clip_boxes, largest_images, quality
from fastdet.engine.anchor_search.search import _choose, _descend, _propose, _start
from fastdet.engine.checkpoint import describe_anchors
from fastdet.models.anchors import AnchorGenerator, grid_anchors, inside
from fastdet.models.backbones import NAMED
from fastdet.models.preprocessing import resized_size

Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def default_of(backbone: str) -> AnchorGenerator:
    return AnchorGenerator(**describe_anchors(backbone), strides=NAMED[backbone].strides)


def make_boxes(
    count: int, side: float, ratio: float = 1, size: tuple[int, int] = (480, 640), spread: float = 0.0, seed: int = 0
) -> Data:
    """Boxes of class 1 anywhere in images of one size; the logarithms of their sides and ratios have this deviation."""
    draw = np.random.default_rng(seed)
    sides, ratios = (
        side * np.exp(spread * draw.standard_normal(count)),
        ratio * np.exp(spread * draw.normal(size=count)),
    )
    lengths = np.stack([sides / np.sqrt(ratios), sides * np.sqrt(ratios)], axis=1).clip(0, size[::-1])
    low = draw.uniform(0, 1, (count, 2)) * (size[::-1] - lengths)
    return np.concatenate([low, low + lengths], axis=1), np.tile(size, (count, 1)), np.ones(count, dtype=np.int64)


def join(*parts: Data) -> Data:
    """The boxes of several, as classes 0, 1, ..."""
    labels = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), labels


def laid_out(generator: AnchorGenerator, size: tuple[int, int], inside_only: bool) -> torch.Tensor:
    """Every anchor of an image, [K, 4]."""
    levels = [
        grid_anchors(cell, (math.ceil(size[0] / stride), math.ceil(size[1] / stride)), (stride, stride))
        for cell, stride in zip(generator.cell_anchors(), generator.strides or (), strict=True)
    ]
    anchors = torch.cat(levels)
    return anchors[inside(anchors, torch.tensor([size]))[0]] if inside_only else anchors


def overlaps_of_grid(boxes: np.ndarray, size: tuple[int, int], generator: AnchorGenerator, inside_only: bool) -> Any:
    clipped = torchvision.ops.clip_boxes_to_image(torch.from_numpy(boxes), size)
    anchors = laid_out(generator, size, inside_only).double()
    if not len(anchors):
        return np.zeros(len(boxes))
    return torchvision.ops.box_iou(clipped, anchors).nan_to_num(0).amax(1).numpy()


def sum_of_shares(data: Data, generator: AnchorGenerator, inside_only: bool) -> float:
    overlaps = best_overlaps(data[0], data[1], generator, inside_only)
    return sum(float(np.mean(list(class_shares(overlaps, data[2], at).values()))) for at in (0.5, 0.7))


def mean_quality(data: Data, generator: AnchorGenerator, inside_only: bool) -> float:
    value = quality(best_overlaps(data[0], data[1], generator, inside_only))
    return float(np.mean([value[data[2] == label].mean() for label in np.unique(data[2])]))


@pytest.mark.parametrize("inside_only", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_best_overlaps_are_those_of_the_whole_grid(inside_only: bool, rounded: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    empty = 0
    for trial in range(20):
        size = int(draw.integers(5, 300)), int(draw.integers(5, 300))
        levels = int(draw.integers(1, 4))
        strides = tuple(int(4 * 2**level + draw.integers(0, 2)) for level in range(levels))
        generator = AnchorGenerator(
            tuple(tuple(np.round(draw.uniform(2, 200, 2), int(draw.integers(0, 2))).tolist()) for _ in strides),
            (tuple(draw.choice([0.25, 0.5, 0.64, 1, 1.3, 1.5625, 4], 2).tolist()),),
            strides,
            offset=float(draw.choice([0, strides[0] / 2, 3.7, 40])),
            rounded=rounded,
        )
        corners = draw.uniform(-20, 320, (40, 2, 2))
        boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
        boxes = np.round(boxes) if trial % 2 else boxes
        found = best_overlaps(boxes, np.tile(size, (40, 1)), generator, inside_only)
        expected = overlaps_of_grid(boxes, size, generator, inside_only)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        empty += not expected.any()
    assert empty < 10


def test_an_anchor_that_float32_rounds_into_the_image_lies_inside() -> None:
    generator = AnchorGenerator(((90.0,),), ((0.81,),), strides=(16,), offset=8.0, rounded=False)
    # In column 3 it would end 4e-6 beyond the image's width, and no other column has one inside.
    assert generator.cell_anchors()[0][0, 2].item() + 3 * 16 > 106
    box = np.array([[6, 15.5, 106, 96.5]])
    assert overlaps_of_grid(box, (120, 106), generator, True) == pytest.approx(1, abs=1e-5)
    assert best_overlaps(box, np.array([[120, 106]]), generator, True) == pytest.approx(1, abs=1e-5)


def test_overlaps_by_hand() -> None:
    generator = AnchorGenerator(((32.0,),), ((1.0,),), strides=(16,), offset=8.0, rounded=False)
    boxes = np.array([[8, 8, 40, 40], [12, 8, 44, 40], [-8, 0, 8, 24], [5, 5, 5, 9], [70, 70, 90, 90.0]])
    sizes = np.array([[64, 64]] * 5)
    # Exactly an anchor; one 4 pixels beside it; the right half of a box, in the anchor of the first cell; no area; a
    # box outside its image.
    assert best_overlaps(boxes, sizes, generator, False) == pytest.approx([1, 28 / 36, 192 / 1024 / 1, 0, 0], abs=1e-6)
    # The first anchor inside is that of cell (1, 1), from 8 to 40, which meets none of the third box.
    assert best_overlaps(boxes, sizes, generator, True) == pytest.approx([1, 28 / 36, 0, 0, 0], abs=1e-6)


def test_boxes_are_taken_in_chunks() -> None:
    boxes, sizes, _ = make_boxes(300_000, 60, spread=0.5)
    generator = default_of("resnet18_fpn")
    tracemalloc.start()
    found = best_overlaps(boxes, sizes, generator, True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    part = slice(150_000, 150_100)
    np.testing.assert_array_equal(found[part], best_overlaps(boxes[part], sizes[part], generator, True))


def test_class_shares_by_hand() -> None:
    overlaps = np.array([0.5, 0.49, 0.9, 0.1, 0.7])
    assert class_shares(overlaps, [7, 7, 2, 2, 2], 0.5) == {2: pytest.approx(2 / 3), 7: 0.5}
    assert class_shares(overlaps, [7, 7, 2, 2, 2], 0.7) == {2: pytest.approx(2 / 3), 7: 0.0}
    assert class_shares(np.zeros(0), np.zeros(0, dtype=np.int64), 0.5) == {}


def test_errors_name_the_argument() -> None:
    generator = default_of("mobilenet_v2")
    box, size = np.array([[0, 0, 9, 9.0]]), np.array([[20, 20]])
    with pytest.raises(ValueError, match=r"boxes must be finite \[N, 4\], got float64 \[1, 5\]"):
        best_overlaps(np.zeros((1, 5)), size, generator, True)
    with pytest.raises(ValueError, match=r"boxes must be finite"):
        best_overlaps(box * np.nan, size, generator, True)
    with pytest.raises(ValueError, match=r"sizes must be \[1, 2\] in 1..16384, got int64 \[2, 2\]"):
        best_overlaps(box, np.tile(size, (2, 1)), generator, True)
    with pytest.raises(ValueError, match=r"sizes must be"):
        best_overlaps(box, size * 0, generator, True)
    with pytest.raises(ValueError, match=r"strides, got None"):
        search(box, size, [1], replace(generator, strides=None), True)
    for labels in ([1, 2], [0.5], [[1]]):
        with pytest.raises(ValueError, match=r"labels must be integers \[1\]"):
            search(box, size, labels, generator, True)


def test_largest_images() -> None:
    sizes = np.array([[5, 5], [10, 4], [3, 9], [5, 9], [10, 3], [10, 4], [5, 8]])
    assert largest_images(sizes).tolist() == [[10, 4], [5, 9]]


CASES = {
    "one box": make_boxes(1, 80),
    "identical": tuple(np.repeat(part, 300, axis=0) for part in make_boxes(1, 80, 0.7)),
    "extreme ratios": join(make_boxes(100, 60, 50), make_boxes(100, 60, 1 / 50)),
    "tiny": make_boxes(200, 3, spread=0.1),
    "as large as the image": (np.tile([0, 0, 640, 480.0], (20, 1)), np.tile([480, 640], (20, 1)), np.ones(20, int)),
    "as a long image": (np.tile([0, 0, 1000, 100.0], (20, 1)), np.tile([100, 1000], (20, 1)), np.ones(20, int)),
    "small images": make_boxes(50, 10, size=(20, 30), spread=0.3),
    "one pixel": (np.tile([0, 0, 1, 1.0], (3, 1)), np.ones((3, 2), int), np.ones(3, int)),
    "broad": make_boxes(900, 60, spread=0.7),
    "two scales": join(make_boxes(300, 20, size=(800, 1200)), make_boxes(300, 400, 2, size=(800, 1200), spread=0.1)),
}


@pytest.mark.parametrize("inside_only", [False, True])
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v2_fpn", "resnet50_fpn"])
@pytest.mark.parametrize("case", CASES)
def test_found_anchors_are_well_formed_and_never_worse(case: str, backbone: str, inside_only: bool) -> None:
    data, default = CASES[case], default_of(backbone)
    found = search(*data, default, inside_only)
    assert found.share_50 + found.share_70 == pytest.approx(sum_of_shares(data, found.generator, inside_only))
    assert found.share_50 + found.share_70 >= sum_of_shares(data, default, inside_only)
    if found.is_default:
        assert found.generator == default
        return
    generator = found.generator
    kept = generator.strides, generator.offset, generator.rounded
    assert kept == (default.strides, default.offset, default.rounded)
    assert generator.aspect_ratios == (found.aspect_ratios,) * len(default.sizes)
    assert len({len(sizes) for sizes in found.sizes}) == 1
    for numbers in (*found.sizes, found.aspect_ratios):
        assert list(numbers) == sorted(set(numbers))
        assert all(float(f"{number:.2g}") == number for number in numbers)
    assert all(size == int(size) for sizes in found.sizes for size in sizes)
    if not inside_only:
        for finer, coarser in pairwise(found.sizes):
            assert finer[0] <= coarser[0]
            assert finer[-1] <= coarser[-1]
    if inside_only:
        (image,) = np.unique(data[1], axis=0).tolist()
        for level, stride in enumerate(generator.strides or ()):
            one = replace(generator, sizes=((6.0,),), aspect_ratios=((1.0,),), strides=(stride,))
            if not len(laid_out(one, image, True)):
                # Too coarse a level for such an image.
                continue
            for size in found.sizes[level]:
                for ratio in found.aspect_ratios:
                    assert len(laid_out(replace(one, sizes=((size,),), aspect_ratios=((ratio,),)), image, True))
    # It brings nothing over itself.
    assert search(*data, generator, inside_only) == found._replace(is_default=True)


def test_boxes_of_one_shape_need_one_anchor() -> None:
    found = search(*make_boxes(400, 57, 0.5), default_of("small"), True)
    assert 52 <= found.sizes[0][0] <= 62
    assert found.generator.num_anchors_per_location() == [1]
    assert found.aspect_ratios[0] == pytest.approx(0.5, rel=0.12)
    assert (found.share_50, found.share_70) == (1.0, 1.0)


def test_a_rare_class_of_small_objects_counts() -> None:
    data = join(make_boxes(9, 20, spread=0.1), make_boxes(6000, 150, spread=0.4))
    default = default_of("small")
    found = search(*data, default, False)
    before, after = (best_overlaps(*data[:2], each, False) for each in (default, found.generator))
    assert class_shares(before, data[2], 0.5)[0] == 0
    assert class_shares(after, data[2], 0.5)[0] > 0.8
    # If every box counted alike they would not.
    alone = search(data[0], data[1], np.zeros(len(data[0]), int), default, False)
    assert class_shares(best_overlaps(*data[:2], alone.generator, False), data[2], 0.5)[0] < 0.5


def test_objects_smaller_than_the_stride_are_touched_at_least() -> None:
    data, default = make_boxes(300, 3, spread=0.1), default_of("mobilenet_v2")
    found = search(*data, default, False)
    assert best_overlaps(*data[:2], found.generator, False).min() > 0
    assert found.sizes[0][0] < 24


def test_levels_too_coarse_for_the_images_are_no_obstacle() -> None:
    found = search(*CASES["small images"], default_of("mobilenet_v2_fpn"), True)
    assert not found.is_default
    assert found.share_50 > 0


def test_an_object_as_large_as_its_image_takes_one_anchor_a_cell() -> None:
    """The best anchor that lies inside differs from the object in size and in ratio."""
    found = search(*CASES["as a long image"], default_of("mobilenet_v2_fpn"), True)
    assert found.generator.num_anchors_per_location() == [1] * 4
    assert found.share_50 == 1


def test_levels_without_objects_continue_the_sizes_of_the_others() -> None:
    found = search(*make_boxes(400, 80), default_of("resnet50_fpn"), False)
    sides = [sizes[0] for sizes in found.sizes]
    # No more than one level is needed, and the sizes double from it in both directions.
    assert [len(sizes) for sizes in found.sizes] == [1] * 5
    assert [b / a for a, b in pairwise(sides)] == pytest.approx([2] * 4, rel=0.1)
    assert min(abs(math.log(side / 80)) for side in sides) < 0.1
    strides = [side / stride for side, stride in zip(sides, (4, 8, 16, 32, 64), strict=True)]
    assert all(3 <= each <= 12 for each in strides)


def test_levels_between_others_rise_evenly() -> None:
    data = join(make_boxes(300, 24, size=(1000, 1000)), make_boxes(300, 500, size=(1000, 1000)))
    sides = [sizes[0] for sizes in search(*data, default_of("resnet50_fpn"), False).sizes]
    assert sides == sorted(sides)
    steps = np.diff(np.log(sides))
    assert steps.max() < 2 * steps.min()


@pytest.mark.parametrize("backbone", ["small", "mobilenet_v2_fpn"])
def test_no_size_or_ratio_alone_can_be_changed_for_the_better(backbone: str) -> None:
    """The search's own table of candidates is not used here."""
    data = join(make_boxes(300, 40, 0.7, spread=0.3), make_boxes(100, 120, 1.5, spread=0.3, seed=1))
    generator = search(*data, default_of(backbone), False).generator
    best = mean_quality(data, generator, False)
    assert best > mean_quality(data, default_of(backbone), False) + 0.1
    for factor in (0.7, 0.85, 1.2, 1.4):
        for level, sizes in enumerate(generator.sizes):
            for k in range(len(sizes)):
                moved = (*sizes[:k], sizes[k] * factor, *sizes[k + 1 :])
                changed = replace(generator, sizes=(*generator.sizes[:level], moved, *generator.sizes[level + 1 :]))
                assert mean_quality(data, changed, False) < best + 0.003
        ratios = generator.aspect_ratios[0]
        for k in range(len(ratios)):
            changed = replace(generator, aspect_ratios=((*ratios[:k], ratios[k] * factor, *ratios[k + 1 :]),))
            assert mean_quality(data, changed, False) < best + 0.003


def table_of(data: Data, default: AnchorGenerator, inside_only: bool = False) -> Table:
    return tabulate(clip_boxes(*data[:2]), data[2], largest_images(data[1]), default, inside_only)


@pytest.mark.parametrize(
    ("sides", "spread", "num_sizes", "num_ratios"),
    [((25, 80, 170), 0.1, 1, 1), ((10, 180, 200), 0.3, 2, 1), ((10, 180, 200), 0.3, 2, 3)],
)
def test_random_starts_lead_to_little_better(
    sides: tuple[float, ...], spread: float, num_sizes: int, num_ratios: int
) -> None:
    data = join(*(make_boxes(300, side, 1.2, (600, 900), spread, seed) for seed, side in enumerate(sides)))
    default, draw = default_of("resnet50_fpn"), np.random.default_rng(0)
    table = table_of(data, default)
    best = 0.0
    for _ in range(6):
        levels = [draw.choice(np.flatnonzero(table.levels == level), num_sizes, replace=False) for level in range(5)]
        columns = draw.choice(len(table.ratios), num_ratios, replace=False).tolist()
        best = max(best, _descend(table, np.concatenate(levels).tolist(), columns).score)
    assert _choose(table, default.strides or (), num_sizes, num_ratios).score > best - 0.006


@pytest.mark.parametrize("side", [60, 100])
def test_sizes_rise_from_level_to_level(side: float) -> None:
    default = default_of("resnet50_fpn")
    for seed in (0, 1, 4):
        table = table_of(make_boxes(400, side, 1.2, (600, 900), 0.4, seed), default)
        rows = np.array(_choose(table, default.strides or (), 2, 1).rows)
        of_levels = [table.sizes[rows[table.levels[rows] == level]] for level in range(5)]
        assert all(finer.max() <= coarser.min() for finer, coarser in pairwise(of_levels))


def test_candidates_reach_from_the_objects_ratios_to_1() -> None:
    for ratio in (30, 1 / 30):
        ratios = table_of(make_boxes(200, 60, ratio, spread=0.05), default_of("small")).ratios
        assert 1 in ratios
        assert min(abs(np.log(ratios / ratio))) < 0.1
        assert len(ratios) < 45


def test_the_descent_ends_where_nothing_brings_more() -> None:
    data, default = join(make_boxes(500, 30, spread=0.5), make_boxes(500, 130, 2, spread=0.4)), default_of("small")
    table = table_of(data, default)
    start = _start(table, (8,), 4.0, 5, 3)
    end = _descend(table, *start)
    again = _descend(table, end.rows, end.columns)
    assert again.score < end.score + 1e-4


def test_sizes_and_ratios_that_do_not_fit_together_are_not_proposed() -> None:
    default = AnchorGenerator(((32,), (64,)), ((1.0,),), strides=(8, 16))
    fits = np.array([[True, False], [False, True]])
    ones = np.ones(3)
    quality_of_all = np.ones((2, 2, 3), dtype=np.float32)
    table = Table(
        np.array([30.0, 60]), np.arange(2), np.array([0.5, 1]), quality_of_all, fits, 40 * ones, ones, ones / 3
    )
    assert _propose(table, default) is None
    assert _propose(table._replace(fits=fits | True), default) is not None


def test_boxes_are_drawn_evenly_from_classes_and_areas() -> None:
    data = join(make_boxes(60_000, 50, spread=0.6), make_boxes(500, 150, spread=0.3, seed=1))
    table = table_of(data, default_of("small"))
    assert table.quality.shape[2] == 2000 + 500
    assert table.weights.sum() == pytest.approx(1)
    common = np.isclose(table.weights, 1 / 4000)
    assert table.weights[~common] == pytest.approx([1 / 1000] * 500)
    lengths = data[0][:60_000, 2:] - data[0][:60_000, :2]
    ranks = np.searchsorted(np.sort(np.sqrt(lengths.prod(1))), np.sort(table.sides[common])) / 60_000
    np.testing.assert_allclose(ranks, (np.arange(2000) + 0.5) / 2000, rtol=0, atol=1e-3)


def concentric(*sides: float) -> Data:
    """Squares around the center of a cell of stride 16."""
    boxes = np.array([[200 - side / 2, 200 - side / 2, 200 + side / 2, 200 + side / 2] for side in sides])
    return boxes, np.tile([400, 400], (len(sides), 1)), np.ones(len(sides), int)


def propose(monkeypatch: pytest.MonkeyPatch, generator: AnchorGenerator) -> None:
    """Let the search find this generator."""
    monkeypatch.setattr(sys.modules[_propose.__module__], "_propose", lambda *_: generator)


def test_a_default_that_reaches_more_boxes_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    default = AnchorGenerator(((100.0,),), ((1.0,),), strides=(16,), offset=8.0, rounded=False)
    data = concentric(84, 119)
    for side, kept in ((143.0, True), (140.0, False)):
        # Of the first box the IoU rises to 1, of the second it falls from .706 to .692, or rises to .722.
        propose(monkeypatch, replace(default, sizes=((84.0, side),)))
        assert search(*data, default, False).is_default == kept


def test_a_default_stays_unless_the_quality_rises_by_a_hundredth(monkeypatch: pytest.MonkeyPatch) -> None:
    one = AnchorGenerator(((100.0,),), ((1.0,),), strides=(16,), offset=8.0, rounded=False)
    data = concentric(100)
    for side, inside_only, kept in ((98.0, True, True), (110.0, True, True), (115.0, True, False)):
        # IoUs of .96, .83 and .76, whose qualities are .998, .991 and .89.
        propose(monkeypatch, one)
        assert search(*data, replace(one, sizes=((side,),)), inside_only).is_default == kept
    # A default of which some anchors lie inside no image goes for less.
    useless = replace(one, sizes=((98.0, 500.0),))
    assert not search(*data, useless, True).is_default
    assert search(*data, useless, False).is_default


def test_a_smaller_least_box_changes_no_other_candidate() -> None:
    boxes, sizes, labels = make_boxes(400, 40, spread=0.2)
    sides = table_of((boxes, sizes, labels), default_of("small")).sizes
    boxes[0] = [100, 100, 108, 108]
    with_smaller = table_of((boxes, sizes, labels), default_of("small")).sizes
    assert set(sides) < set(with_smaller)
    assert np.diff(np.log(sides)).max() < 0.15


def test_large_data_sets_are_sampled_alike_each_time() -> None:
    data = join(make_boxes(60_000, 50, spread=0.6), make_boxes(500, 150, spread=0.3, seed=1))
    default = default_of("small")
    found = search(*data, default, False)
    assert found == search(*(part.copy() for part in data), default, False)
    small = join(make_boxes(2000, 50, spread=0.6, seed=2), make_boxes(500, 150, spread=0.3, seed=3))
    on_few = search(*small, default, False).generator
    assert mean_quality(data, found.generator, False) > mean_quality(data, on_few, False) - 0.02


def test_more_classes_than_boxes_that_are_inspected() -> None:
    boxes, sizes, _ = make_boxes(5000, 50, spread=0.2)
    found = search(boxes, sizes, np.arange(5000), default_of("small"), False)
    assert found.share_50 > 0.95


def test_without_boxes_the_default_stays() -> None:
    default = default_of("mobilenet_v2")
    none = np.zeros((0, 4)), np.zeros((0, 2)), np.zeros(0, dtype=np.int64)
    outside = np.array([[30, 30, 40, 40.0]]), np.array([[20, 20]]), np.array([1])
    assert len(best_overlaps(*none[:2], default, True)) == 0
    for data in (none, (*none[:2], []), outside):
        found = search(*data, default, True)
        assert found.generator is default
        assert found.is_default
        assert math.isnan(found.share_50)
        assert math.isnan(found.share_70)


def test_boxes_without_area_do_not_count() -> None:
    data, default = make_boxes(200, 60, spread=0.2), default_of("small")
    flat = data[0].copy()
    flat[:, 2] = flat[:, 0]
    with_flat = tuple(np.concatenate(parts) for parts in zip(data, (flat, *data[1:]), strict=True))
    assert search(*with_flat, default, False) == search(*data, default, False)


@pytest.mark.shared
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "mobilenet_v2_fpn"])
def test_blood_cells(shared_dir: Path, backbone: str) -> None:
    """Found on the images to train on, they reach the cells of the others."""
    default, inside_only = default_of(backbone), NAMED[backbone].settings.rpn_anchors_inside_only

    def read(split: str) -> Data:
        with warnings.catch_warnings():
            # Of boxes without area.
            warnings.simplefilter("ignore")
            images = VOC(shared_dir / "data" / "BCCD", split, ("Platelets", "RBC", "WBC"))
        boxes, sizes, labels = [], [], []
        for image, target in (images[k] for k in range(len(images))):
            size, scale = resized_size(tuple(image.shape[-2:]), 384, 512)
            boxes.append(np.asarray(target["boxes"]) * scale)
            sizes.append(np.tile(size, (len(boxes[-1]), 1)))
            labels.append(np.asarray(target["labels"]))
        return np.concatenate(boxes), np.concatenate(sizes), np.concatenate(labels)

    found = search(*read("trainval"), default, inside_only)
    test = read("test")
    before, after = (best_overlaps(*test[:2], each, inside_only) for each in (default, found.generator))
    print(backbone, found.sizes, found.aspect_ratios)
    for at in (0.5, 0.7):
        print(f"IoU {at}: default {class_shares(before, test[2], at)}, found {class_shares(after, test[2], at)}")
    least = {"mobilenet_v2": (0.6, 0.98, 0.98), "mobilenet_v2_fpn": (0.97, 0.98, 0.98)}[backbone]
    assert all(class_shares(after, test[2], 0.5)[k + 1] >= share for k, share in enumerate(least))
    assert sum_of_shares(test, found.generator, inside_only) > sum_of_shares(test, default, inside_only) + 0.3
