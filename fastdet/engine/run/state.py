"""What a training run has to remember: in memory, in `last.pth`, and of it the best weights in `best.pth`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

from fastdet import weights
from fastdet.data import Item
from fastdet.engine import checkpoint
from fastdet.engine.checkpoint import CheckpointError
from fastdet.engine.distributed import ALONE, Processes
from fastdet.engine.loading import digest
from fastdet.engine.recipes import TrainSettings, amp_dtype, build_average, build_optimizer
from fastdet.graphs.step import LossScale
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.safe_files import printable
from fastdet.weights.files import one_line

# What a checkpoint has of the state, and needs.
_STATE = (
    *("model", "optimizer", "loss_scale", "average", "averaged", "best"),
    *("epoch", "step", "random", "random_of_others"),
)
# A resumed run may change these, as they change nothing in what was drawn so far.
_FREE_ON_RESUME = (
    *("epochs", "workers", "log_every", "eval_every", "save_every", "patience", "graphs"),
    *("arguments", "environment"),
)


def build_metadata(
    dataset: Dataset[Item], settings: TrainSettings, description: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a checkpoint has of a run beside its state: the caller's description, the settings, and of which data.

    Raises:
        ValueError: a value is not plain, so that the checkpoint could not be read, or has a name of the run's own.
    """
    given, length = dict(description or {}), len(dataset)  # type: ignore[arg-type]
    own = {**asdict(settings), "images": length, "data": digest(dataset)}
    if reserved := given.keys() & {*own, *_STATE}:
        raise ValueError(f"description must not have {', '.join(sorted(reserved))}, which the run writes itself")
    checkpoint.check_plain("description", given)
    checkpoint.check_plain("settings", own)
    return {**given, **own}


def _no_evaluation() -> dict[str, float]:
    return {"epoch": 0, "AP": -1.0, "evaluations_since": 0}


@dataclass
class RunState:
    """The state of a run, with which it goes on exactly.

    Attributes:
        out: the folder.
        metadata: as of `build_metadata`.
        model: on its device.
        optimizer: of its parameters.
        loss_scale: of fp16; else it stays 1.
        average: of the weights, if the settings have one.
        processes: that share the run; one of them writes.
        best: the "epoch" and "AP" of the best evaluation, and how many there were since.
        epoch, step: the epochs that are done, and the steps of the next.
    """

    out: Path
    metadata: Mapping[str, Any]
    model: nn.Module
    optimizer: Optimizer
    loss_scale: LossScale
    average: AveragedModel | None
    processes: Processes = ALONE
    best: dict[str, float] = field(default_factory=_no_evaluation)
    epoch: int = 0
    step: int = 0

    @property
    def images(self) -> int:
        """Of the data set."""
        return int(self.metadata["images"])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.images // int(self.metadata["batch_size"]))

    @property
    def last(self) -> Path:
        """The file that a run is resumed from."""
        return self.out / "last.pth"

    @property
    def evaluated(self) -> nn.Module:
        """The model with the weights that are evaluated."""
        return self.model if self.average is None else self.average.module

    def save(self, epoch: int, step: int = 0) -> None:
        """Write the state after so many epochs, and so many steps of the next; all processes wait for the file."""
        self.epoch, self.step = epoch, step
        device = next(self.model.parameters()).device
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        random, *random_of_others = self.processes.gather(random)
        content = {
            **self.metadata,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": {name: tensor.clone() for name, tensor in self.loss_scale._asdict().items()},
            "average": None if self.average is None else self.average.module.state_dict(),
            "averaged": 0 if self.average is None else int(self.average.n_averaged),
            "best": self.best,
            "random": random,
            "random_of_others": random_of_others,
            "epoch": epoch,
            "step": step,
        }
        self.processes.from_first(lambda: checkpoint.save(self.last, content))

    def keep_best(self, epoch: int, average_precision: float) -> None:
        """Take note of an evaluation after so many epochs, and write `best.pth` if there was none as good before."""
        self.best["evaluations_since"] += 1
        if average_precision > self.best["AP"]:
            self.best = {"epoch": epoch, "AP": average_precision, "evaluations_since": 0}
            if not self.processes.writes:
                return
            content = {**self.metadata, "model": self.evaluated.state_dict(), "epoch": epoch, "AP": average_precision}
            checkpoint.save(self.out / "best.pth", content)

    def restore(self) -> None:
        """Take the state from `last.pth`.

        Raises:
            CheckpointError: the file cannot be read, or is of another run.
        """
        path, loaded = self.last, self.processes.from_first(lambda: checkpoint.load(self.last))
        saved = {"step": 0, "random_of_others": [], **loaded}
        checkpoint.require(path, saved, (*self.metadata, *_STATE), "of a run")
        epochs = self.metadata["epochs"]
        try:
            for name, value in self.metadata.items():
                if name not in _FREE_ON_RESUME and saved[name] != value:
                    raise CheckpointError(f"{path}: {_first_difference(name, value, saved[name])}")
            if saved["epoch"] > epochs:
                raise CheckpointError(f"{path}: it has {saved['epoch']} epochs, more than the {epochs} wanted")
            weights.load(self.model, saved["model"], name="its model")
            if self.average is not None:
                weights.load(self.average.module, saved["average"], name="its average")
                self.average.n_averaged.fill_(saved["averaged"])
            checkpoint.load_optimizer(self.optimizer, saved["optimizer"])
            for name, tensor in self.loss_scale._asdict().items():
                tensor.copy_(saved["loss_scale"][name])
            states = [saved["random"], *saved["random_of_others"]]
            # There may have been another number of processes.
            random = states[self.processes.rank % len(states)]
            torch.set_rng_state(random["cpu"])
            device = next(self.model.parameters()).device
            if device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], device)
        except CheckpointError:
            raise
        # Anything that the file has in place of what belongs there.
        except Exception as error:
            raise CheckpointError(f"{path}: the checkpoint does not fit the model: {one_line(error)}") from error
        self.best, self.epoch, self.step = dict(saved["best"]), saved["epoch"], saved["step"]


def build_state(
    out: Path,
    model: nn.Module,
    settings: TrainSettings,
    metadata: Mapping[str, Any],
    processes: Processes = ALONE,
) -> RunState:
    """The state at the start of a run of a model on its device; `metadata` is that of `build_metadata`."""
    device = next(model.parameters()).device
    if isinstance(model, FasterRCNN) and device.type == "cuda":
        # As a GPU's matrix units take weights. The average is made alike, and so moved in few launches.
        model.to(memory_format=torch.channels_last)
    return RunState(
        out,
        metadata,
        model,
        build_optimizer(model, settings),
        LossScale.initial(amp_dtype(settings, device), device),
        build_average(model) if settings.ema else None,
        processes,
    )


def _first_difference(name: str, value: Any, saved: Any) -> str:
    """The first setting in which a run differs from the one to be resumed."""
    if isinstance(value, Mapping) and isinstance(saved, Mapping):
        for key in {**value, **saved}:
            if value.get(key) != saved.get(key):
                return _first_difference(f"{name}, {key}", value.get(key), saved.get(key))
    return f"{name} is {value!r:.200}, but the run to be resumed has {printable(repr(saved), 200)}"
