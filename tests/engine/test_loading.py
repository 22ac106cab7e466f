"""The batches of a run: the same with any number of workers, started in any way, of any data set."""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastdet.data import VOC, DataError, JoinedImages, Shapes
from fastdet.data.augmentation import PRESETS
from fastdet.engine import loading
from fastdet.engine.loading import (
    AugmentedDataset,
    EpochPlans,
    _copy_ahead,
    check_ids,
    default_workers,
    load_batches,
    plan_epoch,
    sizes_of,
)
from fastdet.engine.recipes import TrainSettings
from tests.helpers.voc import write_voc

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("loading") / "voc", {"train": 7})


@pytest.fixture
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def batches_of(dataset: Dataset, workers: int, preset: str = "strong", first: int = 0) -> list:
    settings = TrainSettings(batch_size=3)
    plans = EpochPlans(7, settings, range(2), first, getattr(dataset, "sizes", None))
    return list(load_batches(AugmentedDataset(dataset, preset, (48, 64)), plans, workers, 0, CPU))


def assert_equal(first: list, second: list) -> None:
    assert len(first) == len(second)
    for (images, targets), (others, other_targets) in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))
        for a, b in zip(targets, other_targets, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"], indirect=True)
def test_workers_give_the_same_batches(root, start_method):
    data = JoinedImages([VOC(root, "train")])
    expected = batches_of(data, 0)
    assert len(expected) == 6
    assert_equal(batches_of(data, 2), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_goes_on_with_the_same_batches(root, preset):
    data = VOC(root, "train")
    before = torch.get_rng_state()
    whole = batches_of(data, 0, preset)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal(batches_of(data, 0, preset, first=2), whole[2:])
    assert_equal(batches_of(data, 1, preset, first=2), whole[2:])
    # The second epoch draws other augmentation.
    if preset not in ("none", "flip"):
        order = [
            [index for index, _ in batch]
            for epoch in range(2)
            for batch in plan_epoch(7, TrainSettings(batch_size=3), epoch)
        ]
        images = {}
        for indices, (batch, _) in zip(order, whole, strict=True):
            for index, image in zip(indices, batch, strict=True):
                images.setdefault(index, []).append(image)
        assert not any(torch.equal(*pair) for pair in images.values() if pair[0].shape == pair[1].shape)


class Bare(Dataset):
    """Items of plain tensors, as people write them."""

    def __init__(self, image, boxes) -> None:
        self.image, self.boxes = image, boxes

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index):
        return self.image, {
            "boxes": self.boxes,
            "labels": torch.ones(len(self.boxes), dtype=torch.int64),
            "image_id": 3,
        }


@pytest.mark.parametrize("preset", PRESETS)
def test_items_of_plain_tensors(preset):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 40, 50), dtype=np.uint8))
    corners = torch.tensor([[3, 4, 20, 30], [10, 5, 45, 38]])
    wrapped = tv_tensors.BoundingBoxes([[3, 4, 17, 26], [10, 5, 35, 33]], format="XYWH", canvas_size=(40, 50))
    expected = batches_of(Bare(image, corners), 0, preset)
    assert_equal(batches_of(Bare(image, wrapped), 0, preset), expected)
    for images, targets in expected:
        for image_, target in zip(images, targets, strict=True):
            assert type(image_) is type(target["boxes"]) is torch.Tensor
            assert target.keys() == {"boxes", "labels", "ignore", "seed"}
            assert target["boxes"].dtype == torch.float32
            assert len(target["boxes"]) == len(target["labels"]) == len(target["ignore"])
    floats = batches_of(Bare(image / 255, corners), 0, preset)
    for (images, _), (others, _) in zip(expected, floats, strict=True):
        for image_, other in zip(images, others, strict=True):
            assert image_.shape == other.shape
            assert other.is_floating_point()
            assert 0 <= other.min() <= other.max() <= 1
            assert (image_ / 255 - other).abs().mean() < 0.02


def test_no_boxes_in_an_image():
    for preset in PRESETS:
        for images, targets in batches_of(Bare(torch.zeros(3, 40, 50), torch.zeros(0, 4)), 0, preset):
            assert len(images) == len(targets)
            assert all(target["boxes"].shape == (0, 4) for target in targets)


def test_an_error_in_a_worker_names_the_file(root, tmp_path):
    tree = write_voc(tmp_path / "voc", {"train": 7})
    data = VOC(tree, "train")
    image = tree / "JPEGImages/train_4.jpg"
    image.write_bytes(image.read_bytes()[:900])
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"train_4\.jpg: the image cannot be decoded"):
            batches_of(data, workers)


def test_drawn_shapes_are_a_data_set_like_the_others():
    shapes = Shapes(7, size=40)
    assert_equal(batches_of(JoinedImages([shapes]), 0), batches_of(shapes, 0))


@pytest.mark.parametrize("sizes", [[(40, 50)] * 6, [(40, 50)] * 8, [(40, 0)] * 7, [(40, 50, 3)] * 7])
def test_sizes_that_are_not_those_of_the_images(sizes):
    data = Bare(torch.zeros(3, 40, 50), torch.zeros(0, 4))
    data.sizes = sizes
    with pytest.raises(ValueError, match=r"sizes must be .* of each of the 7 images"):
        sizes_of(data)


def test_sizes_in_arrays():
    data = Bare(torch.zeros(3, 40, 50), torch.zeros(0, 4))
    assert sizes_of(data) is None
    for data.sizes in ([[40, 50]] * 7, np.array([(40, 50)] * 7), torch.tensor([(40, 50)] * 7)):
        assert sizes_of(data) == [(40, 50)] * 7


def test_an_item_that_is_wrong_is_named():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    dataset = AugmentedDataset(Bare(image, torch.zeros(2, 3)), "none", (8, 8))
    with pytest.raises(DataError, match=r"item 0 of the data set: .*boxes"):
        dataset[0, 5]
    dataset.dataset.ids = [f"photo {k}" for k in range(7)]
    with pytest.raises(DataError, match=r"item photo 3 of the data set: .*boxes"):
        dataset[3, 5]


def test_ids_of_another_number_are_refused():
    data = Bare(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(0, 4))
    check_ids(data)
    data.ids = ["only one name"] * (len(data) + 1)
    with pytest.raises(ValueError, match=f"each of the {len(data)} images, got {len(data) + 1} names"):
        check_ids(data)


def test_a_process_ends_though_its_loader_was_not_read_to_the_end():
    """At its exit Python asks the workers to end, and waits for them."""
    lines = [
        "from tests.engine.test_loading import *",
        "plans = EpochPlans(7, TrainSettings(batch_size=1), range(9), 0, None)",
        "batches = load_batches(AugmentedDataset(Shapes(7, size=32), 'none', (32, 32)), plans, 1, 0, CPU)",
        "next(batches)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("cores", "shared", "runs", "expected"),
    [
        (16, 1 << 30, 1, 4),
        (3, 1 << 30, 1, 2),
        (1, 1 << 30, 1, 0),
        (16, 1 << 30, 8, 1),
        # What a worker has ready, two batches of four images, takes 4.8 MB, and must be free twice.
        (16, 20 << 20, 1, 2),
        (16, 9 << 20, 1, 0),
        # Of two processes, each with a share of the batch.
        (16, 20 << 20, 2, 2),
    ],
)
def test_workers_for_a_gpu_by_the_machine(monkeypatch, cores, shared, runs, expected):
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(loading.os.path, "isdir", lambda path: True)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=shared))
    monkeypatch.setattr(loading, "count_on_machine", lambda: runs)
    sizes = [(100, 200), (400, 500)]
    assert default_workers(torch.device("cuda"), 4, sizes) == expected
    assert default_workers(CPU, 4, sizes) == 0


def test_a_batch_waits_for_its_own_copy_alone(monkeypatch):
    """With stubs in the place of the device: the next batch is on its way by then."""
    log = []

    class Image:
        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device: torch.device, non_blocking: bool) -> "Image":
            log.append(("copy", self.number))
            return self

        def record_stream(self, stream: object) -> None:
            log.append(("use", self.number))

    class Stream:
        def record_event(self) -> object:
            return log[-1]

        def wait_event(self, event: object) -> None:
            log.append(("wait", event))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    for images, _ in _copy_ahead([([Image(k)], []) for k in range(3)], CPU):
        log.append(("step", images[0].number))
    steps = [[("wait", ("copy", k)), ("use", k), ("step", k)] for k in range(3)]
    assert log == [("copy", 0), ("copy", 1), *steps[0], ("copy", 2), *steps[1], *steps[2]]
