"""Runs of a small detector that several processes share; these import this module, and no test."""

import math
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Dataset

from fastdet import FasterRCNN
from fastdet.data import Item, Shapes
from fastdet.engine import TrainSettings, build_model, describe_anchors, train
from fastdet.engine.distributed import ALONE, Processes
from fastdet.engine.evaluate import Evaluation, evaluate
from fastdet.engine.recipes import build_optimizer
from fastdet.engine.step import Stepper
from fastdet.graphs.step import LossScale
from fastdet.models import losses
from tests.helpers.weights import randomize_heads

CPU = torch.device("cpu")
SMALL = {"min_size": 32, "max_size": 64, "box_representation_size": 8, "rpn_hidden_channels": 8, "rpn_min_size": 2.0}
SMALL |= {"rpn_pre_nms_top_n_train": 60, "rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 16}
EVERY_STEP = TrainSettings(lr=0.005, warmup_steps=4, log_every=1, aspect_groups=0, clip_norm=2.0, ema=0.9)
# Settings of training, and of the detector: at least twenty steps of each, of ten images an epoch.
RUNS: dict[str, tuple[TrainSettings, dict[str, Any]]] = {
    "four images": (replace(EVERY_STEP, batch_size=4, epochs=7), {}),
    # Two and one, and the last of each epoch has one.
    "three images": (replace(EVERY_STEP, batch_size=3, epochs=5), {}),
    # Two parts in the first process, and one in the second.
    "parts": (replace(EVERY_STEP, batch_size=3, epochs=5, accumulate=2), {}),
    "class weights": (replace(EVERY_STEP, batch_size=4, epochs=7), {"class_weights": (0.3, 2.0, 1.0, 0.5, 3.0)}),
    "buckets": (replace(EVERY_STEP, batch_size=4, epochs=7), {"size_buckets": ((32, 48), (48, 48))}),
    "several sizes": (replace(EVERY_STEP, batch_size=4, epochs=7), {"min_size": (32, 40), "max_size": 64}),
}


class Scenes(Dataset[Item]):
    """Ten images of three shapes, of which two have no boxes."""

    class_names = Shapes.class_names
    sizes = tuple(((48, 48), (48, 72), (72, 48))[index % 3] for index in range(10))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Item:
        image, target = Shapes(10, size=48)[index]
        height, width = self.sizes[index]
        if index in (3, 8):
            target = {name: values[:0] for name, values in target.items()}
        return F.pad(image, (0, width - 48, 0, height - 48), value=90), target


def detector(freeze_batchnorm: bool = True, **settings: Any) -> FasterRCNN:
    anchors = describe_anchors("small", sizes=(8.0, 16.0))
    torch.manual_seed(2)
    architecture = {"backbone": "small", "num_classes": 5, "anchors": anchors, "settings": {**SMALL, **settings}}
    model = build_model({**architecture, "freeze_batchnorm": freeze_batchnorm})
    randomize_heads(model, 0.1)
    return model


def run(name: str, out: Path, processes: Processes = ALONE) -> None:
    settings, of_detector = RUNS[name]
    train(detector(**of_detector), Scenes(), out, settings, progress=False, processes=processes)


def run_with_batchnorm(out: Path, processes: Processes) -> list[torch.Tensor]:
    """One step of three images; the statistics that come of it."""
    model = detector(freeze_batchnorm=False)
    settings = replace(EVERY_STEP, batch_size=3, epochs=1)
    train(model, torch.utils.data.Subset(Scenes(), range(3)), out, settings, progress=False, processes=processes)
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]


def run_into_infinity(out: Path, processes: Processes) -> tuple[str, dict[str, torch.Tensor]]:
    """From the fifth step on a loss of the second process, and no gradient, is infinite: how the run ends."""
    weigh, calls, model = losses.weigh, [], detector()

    def poison(*args: Any) -> dict[str, torch.Tensor]:
        weighed = weigh(*args)
        calls.append(None)
        if len(calls) >= 5 and processes.rank == 1:
            weighed["loss_objectness"] = weighed["loss_objectness"] + math.inf
        return weighed

    losses.weigh = poison  # type: ignore[assignment]
    try:
        settings = replace(EVERY_STEP, batch_size=2, log_every=3)
        train(model, Scenes(), out, settings, progress=False, processes=processes)
    except FloatingPointError as error:
        return str(error), model.state_dict()
    finally:
        losses.weigh = weigh
    raise AssertionError


def steps_without_boxes(processes: Processes) -> torch.Tensor:
    """The rows of two hundred steps in which the first process alone has boxes."""
    model = detector()
    settings = replace(EVERY_STEP, batch_size=2)
    stepper = Stepper(
        model, build_optimizer(model, settings), settings, LossScale.initial(None, CPU), processes=processes
    )
    stepper.set_lr(0.01)
    image, target = Scenes()[3 if processes.rank else 0]
    return torch.stack([stepper([image], [{**target, "seed": torch.tensor(k)}], 2) for k in range(200)])


def evaluations(processes: Processes = ALONE) -> list[Evaluation]:
    """Of ten images, and of one."""
    model, data = detector(box_score_thresh=0.0), Scenes()
    return [
        evaluate(model, part, data.class_names, batch_size=2, processes=processes, compute_losses=True)
        for part in (data, torch.utils.data.Subset(data, [0]))
    ]


def _all(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    processes = Processes(rank, 2)
    for name in RUNS:
        run(name, folder / name, processes)
    found = {
        "batchnorm": run_with_batchnorm(folder / "batchnorm", processes),
        "infinity": run_into_infinity(folder / "infinity", processes),
        "without boxes": steps_without_boxes(processes),
        "evaluations": [(each.summary(), each.predictions, each.losses) for each in evaluations(processes)],
    }
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def run_all(folder: Path) -> list[dict[str, Any]]:
    """All of this by two processes, in a folder; what each found."""
    context = torch.multiprocessing.spawn(_all, (folder,), nprocs=2, join=False)
    deadline = time.monotonic() + 80
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError("a process waits for the other")
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]
