"""Loading and augmenting images beside torchvision's reference loader, and what is left of it in a training step."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

import fastdet
from fastdet.data import COCO, JoinedImages, Shapes
from fastdet.engine import TrainSettings, train
from fastdet.engine.loading import AugmentedDataset, EpochPlans, load_batches

IMAGES, SIDE, BATCH = 96, 512, 4


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, as far as a JPEG decoder can tell, in COCO's format."""
    folder, shapes = tmp_path_factory.mktemp("photographs"), Shapes(IMAGES, size=SIDE)
    images, annotations = [], []
    for index in range(IMAGES):
        image, target = shapes[index]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.jpg", quality=90)
        images.append({"id": index, "file_name": f"{index}.jpg", "width": SIDE, "height": SIDE})
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": index, "category_id": label, **box})
    categories = [{"id": label, "name": name} for label, name in enumerate(Shapes.class_names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


def build_their_loader(folder: Path, workers: int) -> DataLoader:
    """The loader of torchvision's detection references, with transforms v2 on tv_tensors."""
    transforms = v2.Compose(
        [v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    )
    plain = CocoDetection(str(folder), str(folder / "instances.json"), transforms=transforms)
    dataset = wrap_dataset_for_transforms_v2(plain, target_keys=("boxes", "labels"))
    return DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, collate_fn=_collate, persistent_workers=workers > 0
    )


def _collate(batch: list[tuple]) -> tuple:
    return tuple(zip(*batch, strict=True))


def load_ours(folder: Path, workers: int) -> Iterator[object]:
    dataset = COCO(folder, folder / "instances.json")
    settings = TrainSettings(batch_size=BATCH, workers=workers)
    plans = EpochPlans(IMAGES, settings, range(1 << 20), 0, dataset.sizes)
    return load_batches(AugmentedDataset(dataset, "flip", (0, 0)), plans, workers, 0, torch.device("cpu"))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_alone(compare, folder, workers):
    pytest.importorskip("pycocotools")
    batches, loader = load_ours(folder, workers), build_their_loader(folder, workers)

    def ours():
        for _ in range(IMAGES // BATCH):
            next(batches)

    def theirs():
        for _ in loader:
            pass

    size = f"{IMAGES} JPEG files of {SIDE} x {SIDE}, {workers} workers"
    compare(ours, theirs, op="loading", size=size, dtype="uint8", rounds=10, images=IMAGES)


@pytest.mark.parametrize("workers", [0, 2])
def test_share_of_a_training_step(benchmark, folder, tmp_path, capsys, device, workers):
    """How much of training's time is spent waiting for data, from the second reading of the losses on."""
    dataset, number = JoinedImages([COCO(folder, folder / "instances.json")]).select(range(40)), count()
    settings = TrainSettings(epochs=1, batch_size=BATCH, workers=workers, log_every=2)
    model = fastdet.FasterRCNN("mobilenet_v2_fpn", 5, min_size=384, max_size=512).to(device)
    shares = []

    def run() -> None:
        rows = train(model, dataset, tmp_path / str(next(number)), settings, progress=False)
        shares.append(sum(row["data_wait"] for row in rows[1:]) / len(rows[1:]))

    benchmark.pedantic(run, rounds=1, iterations=1)
    benchmark.extra_info["data_wait"] = shares[-1]
    with capsys.disabled():
        print(f"\n{workers} workers: {shares[-1]:.1%} of a training step is spent waiting for data")
