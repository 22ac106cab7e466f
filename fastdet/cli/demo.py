"""A detector of drawn shapes, trained from nothing on the CPU in about two minutes: `fastdet demo`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdet.data import Shapes
from fastdet.engine import TrainSettings, build_model, describe_anchors, train
from fastdet.engine.evaluate import Evaluation, evaluate
from fastdet.metrics import require_pycocotools
from fastdet.visualize import write_report

SIZE = 128
TRAIN_IMAGES, TEST_IMAGES = 1000, 200
SETTINGS = TrainSettings(epochs=8, batch_size=4, lr=0.02, warmup_steps=100)

# The shapes' sides are 20 to 58 pixels and their boxes nearly square, so a few anchors suffice; there are four shapes
# at the most, so a few proposals suffice. The head is narrow because on a CPU it costs more than the backbone.
ARCHITECTURE: dict[str, Any] = {
    "backbone": "small",
    "num_classes": len(Shapes.class_names) + 1,
    "anchors": describe_anchors("small", sizes=(20, 32, 50), aspect_ratios=(1.0,)),
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


def load_data() -> tuple[Shapes, Shapes]:
    """The images to train and to test on; another seed draws other images."""
    return Shapes(TRAIN_IMAGES, size=SIZE, seed=0), Shapes(TEST_IMAGES, size=SIZE, seed=1)


def run(out: str | Path, *, seed: int = 0, progress: bool = True) -> Evaluation:
    """Train on drawn shapes, evaluate on others, print the average precision and save everything into a folder.

    The folder gets `last.pth`, which `fastdet detect` takes, `settings.json`, `metrics.csv`, `loss.png`, `result.json`
    and `detections.png`; what an earlier run left there is overwritten.

    Args:
        out: the folder, made if it is not there.
        seed: of the weights and of what is drawn in training; the images stay the same.
        progress: show bars.

    Raises:
        ImportError: pycocotools is missing; before anything is trained.
    """
    require_pycocotools()
    start = time.perf_counter()
    shapes, held_out = load_data()
    # In memory: drawing the shapes anew in each epoch would take a fifth of the time.
    items: Any = [shapes[index] for index in range(len(shapes))]
    description = {"architecture": ARCHITECTURE, "class_names": Shapes.class_names}
    torch.manual_seed(seed)
    model, settings = build_model(ARCHITECTURE), replace(SETTINGS, seed=seed)
    threads = torch.get_num_threads()
    # With tensors this small more threads gain little, and lose much on a busy machine.
    torch.set_num_threads(1)
    try:
        train(model, items, out, settings, description=description, overwrite=True, progress=progress)
        evaluation = evaluate(model, held_out, Shapes.class_names, batch_size=8, progress=progress)
    finally:
        torch.set_num_threads(threads)
    minutes = round((time.perf_counter() - start) / 60, 2)
    summary, metadata = evaluation.summary(), {"data": "drawn shapes", "minutes": minutes}
    write_report(out, summary, evaluation.predictions, Shapes.class_names, held_out, metadata=metadata)
    print(evaluation.table())
    print(f"{minutes:.1f} minutes: {out}")
    return evaluation
