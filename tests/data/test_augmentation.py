"""Training augmentation: pixels and boxes move together, and a seed fixes the result."""

import pickle
import random
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastdet.data.augmentation import Preset, augment, build
from fastdet.data.transforms import Item, Target, make_item

SIZE = (120, 200)
PRESETS: tuple[Preset, ...] = get_args(Preset)
GEOMETRIC: tuple[Preset, ...] = ("scale-jitter", "strong")
KEEPING: tuple[Preset, ...] = ("none", "flip", "photometric")


def item_of(boxes: Any, height: int = 90, width: int = 130, dtype: torch.dtype = torch.uint8) -> Item:
    """Noise, and boxes with labels from 1, of which every second is to be ignored."""
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(1, len(boxes) + 1)
    target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": labels, "ignore": labels % 2 == 0}
    return make_item(image if dtype == torch.uint8 else image.to(dtype) / 255, target)


def painted(boxes: list[list[int]], levels: list[float], height: int, width: int, dtype: torch.dtype) -> Item:
    """A black image with each box filled with gray of its level in 0..1."""
    image = torch.zeros(3, height, width)
    for (x1, y1, x2, y2), level in zip(boxes, levels, strict=True):
        image[:, y1:y2, x1:x2] = level
    pixels = image.to(dtype) if dtype != torch.uint8 else (255 * image).round().to(torch.uint8)
    return make_item(pixels, item_of(boxes)[1])


def bright_extent(image: torch.Tensor) -> list[int]:
    """x1, y1, x2, y2 around the pixels that are gray and above all that the fill or the background can be."""
    pixels = image.as_subclass(torch.Tensor).double() / (255 if image.dtype == torch.uint8 else 1)
    is_fill = (pixels.amax(0) - pixels.amin(0)) > 0.04
    ys, xs = ((pixels.amin(0) > 0.3) & ~is_fill).nonzero().unbind(1)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1] if len(xs) else []


def equal(a: Item, b: Item) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def check(item: Item, dtype: torch.dtype = torch.uint8) -> Target:
    """Of an item the types and shapes, that boxes are inside the image and have an area, the memory; its target."""
    image, target = item
    boxes, count = target["boxes"], len(target["boxes"])
    assert isinstance(image, tv_tensors.Image)
    assert (image.dtype, image.shape[0]) == (dtype, 3)
    assert image.untyped_storage().nbytes() == image.numel() * image.element_size()
    assert isinstance(boxes, tv_tensors.BoundingBoxes)
    assert (boxes.dtype, boxes.shape, boxes.canvas_size) == (torch.float32, (count, 4), image.shape[-2:])
    assert boxes.format == tv_tensors.BoundingBoxFormat.XYXY
    for name, kind in {"labels": torch.int64, "ignore": torch.bool}.items():
        assert (type(target[name]), target[name].dtype, target[name].shape) == (torch.Tensor, kind, (count,))
    plain = boxes.as_subclass(torch.Tensor)
    assert bool((plain[:, 2:] > plain[:, :2]).all())
    assert bool((plain >= 0).all())
    assert bool((plain <= torch.tensor([image.shape[-1], image.shape[-2]] * 2)).all())
    return target


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("preset", "tolerance"), [("flip", 0), ("photometric", 0), ("strong", 1), ("scale-jitter", 1)])
def test_a_box_stays_around_its_pixels(preset: Preset, tolerance: float, dtype: torch.dtype) -> None:
    item, transform = painted([[30, 20, 90, 70]], [1.0], 90, 130, dtype), build(preset, SIZE)
    shapes, found = set(), 0
    for seed in range(150):
        image, target = augment(transform, item, seed)
        check((image, target), dtype)
        shapes.add(tuple(image.shape))
        extent = bright_extent(image)
        if len(target["boxes"]) and (target["boxes"][0, 2:] - target["boxes"][0, :2]).min() > 4:
            assert extent
            assert (target["boxes"][0] - torch.tensor(extent)).abs().max() <= tolerance, seed
            found += 1
    assert found >= 60
    assert (len(shapes) > 20) == (preset == "strong")


@pytest.mark.parametrize("preset", ["flip", "photometric", "strong", "scale-jitter"])
def test_labels_and_ignore_stay_with_their_boxes(preset: Preset) -> None:
    boxes = [[5 + 42 * i, 5 + 42 * j, 35 + 42 * i, 35 + 42 * j] for j in range(2) for i in range(3)]
    item, transform = painted(boxes, [0.15 * i for i in range(1, 7)], 85, 130, torch.float32), build(preset, SIZE)
    dropped = 0
    for seed in range(100):
        image, target = augment(transform, item, seed)
        labels = target["labels"].tolist()
        assert target["ignore"].tolist() == [label % 2 == 0 for label in labels]
        assert labels == sorted(set(labels))
        dropped += len(labels) < 6
        large = (target["boxes"][:, 2:] - target["boxes"][:, :2]).amin(1) > 4
        x, y = ((target["boxes"][large, :2] + target["boxes"][large, 2:]) / 2).long().unbind(1)
        levels = image.as_subclass(torch.Tensor)[0, y, x]
        if preset in ("flip", "scale-jitter"):
            torch.testing.assert_close(levels, 0.15 * target["labels"][large], atol=1e-3, rtol=0)
        else:
            # Brightness and contrast leave the order of grays as it is, up to where they are cut off.
            assert bool((levels.diff() > -1e-6).all())
            assert len(levels) < 3 or levels[-1] > levels[0]
    assert (dropped > 10) == (preset in GEOMETRIC)


@pytest.mark.parametrize("preset", KEEPING)
def test_boxes_over_the_border_and_without_area_stay(preset: Preset) -> None:
    boxes = [[-7.3, -2.1, 40.7, 95.9], [100.1, 3, 170.3, 20.7], [3, 3, 3.4, 3.4], [9, 9, 9.0, 12], [200.0, 5, 240, 9]]
    item, transform = item_of(boxes), build(preset, SIZE)
    x1, y1, x2, y2 = item[1]["boxes"].as_subclass(torch.Tensor).unbind(1)
    mirrored = torch.stack([130 - x2, y1, 130 - x1, y2], dim=1)
    flips = 0
    for seed in range(400):
        image, target = augment(transform, item, seed)
        is_flipped = not torch.equal(target["boxes"], item[1]["boxes"])
        assert not is_flipped or torch.equal(target["boxes"].as_subclass(torch.Tensor), mirrored)
        assert torch.equal(target["labels"], item[1]["labels"])
        assert torch.equal(target["ignore"], item[1]["ignore"])
        if preset != "photometric":
            assert torch.equal(image, item[0].flip(-1) if is_flipped else item[0])
        flips += is_flipped
    # Of 400 fair draws; 5 standard deviations.
    assert flips == 0 if preset == "none" else abs(flips - 200) < 50


@pytest.mark.parametrize("preset", GEOMETRIC)
def test_a_box_over_the_border_does_not_reach_into_the_fill(preset: Preset) -> None:
    item, transform = painted([[0, 0, 130, 90]], [1.0], 90, 130, torch.uint8), build(preset, SIZE)
    item[1]["boxes"][0] = torch.tensor([-500.0, -500, 630, 590])
    has_fill = 0
    for seed in range(60):
        image, target = augment(transform, item, seed)
        assert (target["boxes"][0] - torch.tensor(bright_extent(image))).abs().max() <= 1, seed
        has_fill += bright_extent(image) != [0, 0, *image.shape[:0:-1]]
    assert has_fill > 10


def test_scale_jitter_covers_its_factors_at_one_output_size() -> None:
    """The size of the image in the fill is the factor's times that to which the detector resizes."""
    item, transform = item_of([[0, 0, 130, 90]]), build("scale-jitter", SIZE)
    fits = min(SIZE[0] / 90, SIZE[1] / 130)
    factors = []
    for seed in range(300):
        image, target = augment(transform, item, seed)
        assert image.shape == (3, *SIZE)
        x1, y1, x2, y2 = target["boxes"][0].tolist()
        if x2 - x1 < SIZE[1] - 1 and y2 - y1 < SIZE[0] - 1:
            factors.append((x2 - x1) / (130 * fits))
            outside = image[:, : int(y1)].flatten(1) if y1 >= 1 else image[:, int(y2) + 1 :].flatten(1)
            assert bool((outside == torch.tensor([[124], [116], [104]])).all())
    # Of 0.1 to 2.0, those below about 1 leave the whole image in sight: 47 %.
    assert 100 < len(factors) < 180
    assert min(factors) < 0.13
    assert 0.95 < max(factors) <= 1.01


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("preset", GEOMETRIC)
def test_fill_is_the_mean_color(preset: Preset, dtype: torch.dtype) -> None:
    item, transform = painted([[0, 0, 100, 60]], [1.0], 60, 100, dtype), build(preset, SIZE)
    mean = torch.tensor([0.485, 0.456, 0.406])
    expected = (255 * mean).round().to(torch.uint8) if dtype == torch.uint8 else mean
    fills = 0
    for seed in range(40):
        image = augment(transform, item, seed)[0].as_subclass(torch.Tensor)
        fill = image[:, (image.amax(0).double() - image.amin(0).double()) > 0.01]
        assert bool((fill == expected[:, None]).all())
        fills += fill.shape[1] > 0
    assert fills > 5


@pytest.mark.parametrize("preset", PRESETS)
def test_items_without_boxes(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose boxes are all outside or empty, and those that come without, for which no crop is sought."""
    empty = [[500.0, 10, 600, 20], [-20.0, -20, 0, 0], [30.0, 30, 30, 40], [50.0, 20, 40, 10], [60, 60, 60.2, 60.2]]
    transform = build(preset, SIZE)
    for boxes in (empty, []) if preset in GEOMETRIC else ([],):
        if not boxes:
            monkeypatch.setattr(v2.RandomIoUCrop, "make_params", None)
        for seed in range(20):
            assert len(check(augment(transform, item_of(boxes), seed))["boxes"]) == 0


def test_rounding_drops_no_box() -> None:
    """Of 49 x 21 pixels resized to 7 x 3, the right side is above 7 in fp32; the smallest become 2 x 2."""
    item, transform = item_of([[0, 0, 49, 21]], 21, 49), build("scale-jitter", (3, 7))
    assert all(len(check(augment(transform, item, seed))["boxes"]) == 1 for seed in range(80))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 130), (90, 1), (2, 3), (3, 7), (4, 4), (10, 5000), (5000, 10)]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_thin_images_and_tiny_boxes(preset: Preset, height: int, width: int, dtype: torch.dtype) -> None:
    right, bottom = float(width), float(height)
    boxes = [[0, 0, right, bottom], [0, 0, 1, 1.0], [right - 1, bottom - 1, right, bottom], [0.2, 0.2, 0.5, 0.9]]
    item, transform = item_of(boxes, height, width, dtype), build(preset, SIZE)
    for seed in range(8):
        check(augment(transform, item, seed), dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_seed_fixes_the_result(preset: Preset, dtype: torch.dtype) -> None:
    """For any count of threads and any state of the generators; and the item stays as it was."""
    boxes = [[10.0, 10, 60, 60], [-5.0, 40, 140, 85]]
    # Of so many pixels that their mean is summed in as many parts as there are threads.
    item, untouched = (item_of(boxes, 300, 400, dtype) for _ in range(2))
    transform, threads, results = build(preset, SIZE), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            random.seed(count)
            np.random.seed(count)  # noqa: NPY002
            torch.manual_seed(count)
            results.append([augment(transform, item, seed) for seed in range(12)])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(equal(a, b) for a, b in zip(*results, strict=True))
    assert equal(item, untouched)
    assert any(not equal(results[0][0], other) for other in results[0]) == (preset != "none")


@pytest.mark.parametrize("preset", PRESETS)
def test_no_generator_of_the_caller_changes(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> None:
        raise AssertionError("all generators are seeded, also those of GPUs")

    monkeypatch.setattr(torch, "manual_seed", fail)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    item, transform = item_of([[10.0, 10, 60, 60]]), build(preset, SIZE)
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    for seed in (0, 7, 2**63 - 1):
        augment(transform, item, seed)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert pickle.dumps(np.random.get_state()) == before[2]  # noqa: NPY002


def test_generator_and_threads_are_restored_after_an_error() -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        augment(v2.Lambda(lambda value: value / (1 // 0)), item_of([]), 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("preset", PRESETS)
def test_another_default_device_does_not_matter(preset: Preset) -> None:
    item, expected = item_of([[10.0, 10, 60, 60]]), []
    for device in ("cpu", "meta"):
        with torch.device(device):
            transform = build(preset, SIZE)
            expected.append([augment(transform, item, seed) for seed in range(6)])
    assert all(equal(a, b) for a, b in zip(*expected, strict=True))


def item_of_index(index: int) -> Item:
    return item_of([[10.0, 10, 60, 60], [-5.0, 40, 140, 85]], dtype=(torch.uint8, torch.float32)[index // 2 % 2])


class Augmented(Dataset[Item]):
    """Items whose seed is their index, by transforms as spawned workers get them."""

    def __init__(self) -> None:
        self.transforms = [pickle.loads(pickle.dumps(build(preset, SIZE))) for preset in PRESETS]

    def __len__(self) -> int:
        return 4 * len(self.transforms)

    def __getitem__(self, index: int) -> Item:
        return augment(self.transforms[index // 4], item_of_index(index), index)


def test_workers_give_the_same() -> None:
    dataset = Augmented()
    alone = list(DataLoader(dataset, batch_size=None))
    by_workers = list(DataLoader(dataset, batch_size=None, num_workers=2))
    assert len(alone) == len(by_workers) == len(dataset)
    assert all(equal(a, b) for a, b in zip(alone, by_workers, strict=True))
    fresh = [augment(build(PRESETS[index // 4], SIZE), item_of_index(index), index) for index in range(len(dataset))]
    assert all(equal(a, b) for a, b in zip(alone, fresh, strict=True))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^augmentation 'mosaic' is not one of none, flip, scale-jitter, "):
        build("mosaic", SIZE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^augmentation 'scale-jitter' needs a size of at least 1 x 1, got \(0, 0\)$"):
        build("scale-jitter", (0, 0))
    for preset in KEEPING:
        build(preset, (0, 0))
