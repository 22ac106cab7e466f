"""The padded shapes that the steps of a run are captured for."""

import math
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastdet import TORCHVISION, VGG16
from fastdet.data.augmentation import PRESETS
from fastdet.engine.buckets import MOST_SHAPES, merge, plan_graphs
from fastdet.engine.loading import AugmentedDataset, plan_epoch
from fastdet.engine.recipes import TrainSettings
from fastdet.graphs.static_inputs import parse_buckets
from fastdet.models.preprocessing import padded_size, resized_size
from tests.helpers.detectors import small_detector

MODEL = TORCHVISION.override(min_size=(160, 192, 224), max_size=320)
SETTINGS = TrainSettings(epochs=3, batch_size=3)
MIXED = [(480, 640), (640, 480), (500, 500), (375, 500), (100, 1000), (333, 500)]


class Images(torch.utils.data.Dataset):
    """Noise of these (height, width), each with so many boxes."""

    def __init__(self, sizes, boxes=2, names=("sizes", "target")):
        self._sizes, self._boxes = sizes, boxes
        if "sizes" in names:
            self.sizes = sizes
        if "target" in names:
            # What a data set of fastdet has besides.
            self.target, self.image_path, self.ids, self.class_names = self._target, str, range(len(sizes)), ("x",)

    def __len__(self):
        return len(self._sizes)

    def _target(self, index):
        height, width = self._sizes[index]
        box = [width / 4, height / 4, 3 * width / 4, 3 * height / 4]
        return {"boxes": np.array([box] * self._boxes, np.float32), "labels": np.ones(self._boxes, np.int64)}

    def __getitem__(self, index):
        image = torch.rand(3, *self._sizes[index], generator=torch.Generator().manual_seed(index))
        return image, {name: torch.from_numpy(value) for name, value in self._target(index).items()}


def draw_sizes(count, seed=0):
    draw = np.random.default_rng(seed)
    return [(int(h), int(w)) for h, w in draw.integers(100, 1000, (count, 2))]


def holds(shapes, size):
    return any(height >= size[0] and width >= size[1] for *_, height, width in shapes)


def area_of(counts, chosen):
    """Pixels of all that `counts` counts, each padded to the smallest of `chosen` that holds it."""
    return sum(
        count * min(math.prod(each) for each in chosen if each[0] >= size[0] and each[1] >= size[1])
        for size, count in counts.items()
    )


@pytest.mark.parametrize("model", [MODEL, MODEL.override(size_divisible=24), VGG16], ids=["three", "divisible", "one"])
@pytest.mark.parametrize("augmentation", ["none", "flip", "photometric"])
@pytest.mark.parametrize("sizes", [MIXED * 9, draw_sizes(60), [(480, 640)] * 7], ids=["mixed", "drawn", "alike"])
def test_a_shape_holds_each_full_batch_of_every_epoch(model, augmentation, sizes):
    settings = replace(SETTINGS, augmentation=augmentation)
    shapes, max_boxes = plan_graphs(model, settings, Images(sizes))
    assert 1 <= len(shapes) <= MOST_SHAPES
    assert set(parse_buckets(shapes, model)) == set(shapes)
    assert max_boxes == 2
    for epoch in range(settings.epochs):
        for batch in plan_epoch(len(sizes), settings, epoch, sizes):
            for min_size in model.min_sizes:
                resized = [resized_size(sizes[index], min_size, model.max_size)[0] for index, _ in batch]
                assert holds(shapes, padded_size(resized, model.size_divisible, ()))


@pytest.mark.parametrize("names", [("sizes", "target"), ("target",), ("sizes",), ()], ids=str)
@pytest.mark.parametrize("augmentation", PRESETS)
@pytest.mark.parametrize(
    "sizes",
    [[(60, 80), (80, 60), (50, 120), (64, 64), (90, 30), (70, 75)], [(45, 90)] * 6],
    ids=["mixed", "landscape"],
)
def test_a_shape_holds_a_batch_as_the_model_pads_it(augmentation, names, sizes):
    """Also where the augmentation changes the sizes, and of data sets that do not tell them."""
    model = small_detector(min_size=(48, 64), max_size=96).train()
    settings = replace(SETTINGS, epochs=2, augmentation=augmentation)
    data = Images(sizes, 3, names)
    shapes, max_boxes = plan_graphs(model.settings, settings, data)
    assert len(shapes) <= MOST_SHAPES
    augmented = AugmentedDataset(data, augmentation, (model.settings.min_sizes[-1], model.settings.max_size))
    for epoch in range(settings.epochs):
        for batch in plan_epoch(len(data), settings, epoch, getattr(data, "sizes", None)):
            for seed in range(4):
                items = [augmented[index, drawn + seed] for index, drawn in batch]
                found, targets, _ = model.preprocess(*map(list, zip(*items, strict=True)))
                assert holds(shapes, found.images.shape[-2:])
                assert found.images.shape[:2] == shapes[0][:2]
                assert targets.labels.shape[1] <= max_boxes


@pytest.mark.parametrize("divisible", [1, 16, 20, 24, 96])
def test_shapes_of_many_sizes_suit_the_model(divisible):
    """Where there are so many that sides are rounded up."""
    model = MODEL.override(min_size=(640, 800), max_size=1333, size_divisible=divisible)
    sizes = draw_sizes(300)
    shapes = plan_graphs(model, SETTINGS, Images(sizes)).shapes
    assert set(parse_buckets(shapes, model)) == set(shapes)
    assert holds(shapes, padded_size([(1333, 1333)], 1, ()))


def test_the_shapes_of_the_model_are_taken_where_it_has_them():
    model = MODEL.override(size_buckets=((224, 320), (320, 224), (320, 320)))
    for augmentation in PRESETS:
        plan = plan_graphs(model, replace(SETTINGS, augmentation=augmentation), Images(MIXED))
        assert plan.shapes == ((3, 3, 224, 320), (3, 3, 320, 224), (3, 3, 320, 320))


@pytest.mark.parametrize("count", [3, 9])
def test_shapes_of_the_model_that_are_no_multiples_are_taken_too(count):
    """As the model takes them, which pads to multiples only where it has no shapes of its own."""
    model = MODEL.override(size_divisible=32, size_buckets=tuple((330 - 11 * k, 230 + 11 * k) for k in range(count)))
    shapes = plan_graphs(model, SETTINGS, Images(MIXED)).shapes
    assert set(parse_buckets(shapes, model)) == set(shapes)


def test_one_shape_is_enough_where_all_images_are_padded_to_it():
    plan = plan_graphs(MODEL, replace(SETTINGS, augmentation="scale-jitter"), Images(MIXED))
    assert plan.shapes == ((3, 3, 224, 320),)
    plan = plan_graphs(MODEL.override(min_size=160), SETTINGS, Images([(480, 640)] * 9))
    assert plan.shapes == ((3, 3, 160, 224),)


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (2, 2), (3, 3), (20, 3)])
def test_a_batch_has_no_more_images_than_there_are(count, batch):
    plan = plan_graphs(MODEL, SETTINGS, Images(draw_sizes(count)))
    assert {shape[:2] for shape in plan.shapes} == {(batch, 3)}


@pytest.mark.parametrize(("boxes", "rows"), [(0, 1), (1, 1), (2, 2), (3, 4), (5, 8), (128, 128), (129, 256)])
def test_rows_for_as_many_boxes_as_an_image_has(boxes, rows):
    assert plan_graphs(MODEL, SETTINGS, Images(MIXED, boxes)).max_boxes == rows
    assert plan_graphs(MODEL, SETTINGS, Images(MIXED, boxes, ("sizes",))).max_boxes == 128


@pytest.mark.parametrize("seed", range(8))
def test_there_is_little_padding(seed):
    """Less than of one shape for all, and than of as many groups of equal numbers, by area."""
    draw = np.random.default_rng(seed)
    counts = Counter((32 * int(h), 32 * int(w)) for h, w in draw.integers(5, 30, (200, 2)))
    chosen = merge(counts, MOST_SHAPES)
    assert len(chosen) <= MOST_SHAPES
    by_area = sorted(counts.elements(), key=math.prod)
    groups = [by_area[k * len(by_area) // MOST_SHAPES : (k + 1) * len(by_area) // MOST_SHAPES] for k in range(6)]
    grouped = {(max(h for h, _ in group), max(w for _, w in group)) for group in groups}
    largest = max(h for h, _ in counts), max(w for _, w in counts)
    assert area_of(counts, chosen) <= area_of(counts, [*grouped, largest])
    assert area_of(counts, chosen) < 0.8 * area_of(counts, [largest])


def test_no_padding_where_there_are_few_shapes():
    counts = Counter({(32 * k, 320 - 32 * k): k for k in range(1, 7)})
    assert merge(counts, MOST_SHAPES) == sorted(counts)
    assert merge(Counter({(64, 96): 5}), MOST_SHAPES) == [(64, 96)]


def test_the_pair_that_adds_the_fewest_pixels_is_merged():
    """Weighed by how often a shape occurs: the rare one is padded."""
    assert merge({(100, 100): 50, (100, 120): 1, (120, 100): 1}, 2) == [(100, 100), (120, 120)]
    assert merge({(100, 100): 1, (100, 120): 1, (300, 300): 1}, 2) == [(100, 120), (300, 300)]


def test_thousands_of_sizes_take_less_than_a_second():
    sizes = draw_sizes(5000)
    start = time.process_time()
    chosen = merge(Counter(sizes), MOST_SHAPES)
    assert time.process_time() - start < 1  # second, of the processor
    assert len(chosen) <= MOST_SHAPES
    assert all(any(h >= size[0] and w >= size[1] for h, w in chosen) for size in sizes)
    assert max(h for h, _ in chosen) == max(h for h, _ in sizes)
    start = time.process_time()
    plan_graphs(MODEL, replace(SETTINGS, epochs=12), Images(sizes))
    assert time.process_time() - start < 5
