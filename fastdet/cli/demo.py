"""A detector of drawn shapes, trained from nothing on the CPU in about two minutes: `fastdet demo`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from fastdet.data import Item, Shapes
from fastdet.engine import checkpoint
from fastdet.engine.predict import Evaluation, evaluate, write_report
from fastdet.engine.recipes import TrainSettings
from fastdet.engine.trainer import train

SIZE = 128
TRAIN_IMAGES, TEST_IMAGES = 1000, 200
SETTINGS = TrainSettings(epochs=8, batch_size=4, lr=0.02, warmup_steps=100)

# Where the shapes' sides are 20 to 58 pixels and their boxes nearly square, a few anchors do; where there are four
# shapes at the most, a few proposals do. The head is narrow because on a CPU it costs more than the backbone.
ARCHITECTURE: dict[str, Any] = {
    "backbone": "small",
    "num_classes": len(Shapes.class_names) + 1,
    "anchors": checkpoint.describe_anchors("small", sizes=(20, 32, 50), aspect_ratios=(1.0,)),
    "settings": {
        "min_size": SIZE,
        "max_size": SIZE,
        "rpn_hidden_channels": 64,
        "rpn_pre_nms_top_n_train": 300,
        "rpn_pre_nms_top_n_test": 300,
        "rpn_post_nms_top_n_train": 100,
        "rpn_post_nms_top_n_test": 50,
        "rpn_min_size": 4.0,
        "rpn_batch_size_per_image": 64,
        "box_pooling": "align",
        "box_sampling_ratio": 1,
        "box_representation_size": 128,
        "box_batch_size_per_image": 32,
    },
}


def data() -> tuple[Shapes, Shapes]:
    """The pictures to train and to test on; another seed draws other pictures."""
    return Shapes(TRAIN_IMAGES, size=SIZE, seed=0), Shapes(TEST_IMAGES, size=SIZE, seed=1)


def run(out: str | Path, *, seed: int = 0, progress: bool = True) -> Evaluation:
    """Train on drawn shapes, evaluate on others, print the average precision and save everything into a folder.

    The folder gets `last.pth`, which `fastdet detect` takes, `metrics.csv`, `loss.png`, `result.json` and
    `detections.png`; what an earlier run left there is overwritten.

    Args:
        out: the folder, made if it is not there.
        seed: of the weights and of what is drawn in training; the pictures stay the same.
        progress: show bars.
    """
    start = time.perf_counter()
    shapes, held_out = data()
    description = {"architecture": ARCHITECTURE, "class_names": Shapes.class_names}
    settings = replace(SETTINGS, seed=seed)
    torch.manual_seed(seed)
    model = checkpoint.build_model(ARCHITECTURE)
    with _one_thread():
        train(model, _Kept(shapes), out, settings, description=description, overwrite=True, progress=progress)
        evaluation = evaluate(model, held_out, Shapes.class_names, batch_size=8, progress=progress)
    minutes = round((time.perf_counter() - start) / 60, 2)
    write_report(evaluation, held_out, out, facts={"data": "drawn shapes", "minutes": minutes})
    print(evaluation.table())
    print(f"{minutes:.1f} minutes: {out}")
    return evaluation


class _Kept(Dataset[Item]):
    """A data set in memory: drawing the shapes anew in each epoch would take a fifth of the time."""

    def __init__(self, shapes: Shapes) -> None:
        self.items = [shapes[index] for index in range(len(shapes))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: with tensors this small more threads gain little, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
