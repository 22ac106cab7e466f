"""Training: a loop to read, import and copy from. It resumes exactly, and does not wait for the device at each step."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from fastdet.data import DataError, Item, collate, flip_horizontal
from fastdet.engine import checkpoint
from fastdet.engine.checkpoint import CheckpointError, one_line
from fastdet.engine.recipes import (
    RECIPES,
    Batch,
    TrainSettings,
    build_optimizer,
    learning_rate,
    parameter_groups,
    plan_epoch,
)
from fastdet.models.losses import NAMES as LOSSES
from fastdet.visualize.draw import plot_losses

__all__ = ["COLUMNS", "LOSSES", "RECIPES", "TrainSettings", "learning_rate", "parameter_groups", "plan_epoch", "train"]

COLUMNS = ("epoch", "step", "lr", "loss", *LOSSES, "images_per_second")

# How far to go and how fast: a resumed run may change these, as they change nothing in what was drawn so far.
_FREE_ON_RESUME = ("epochs", "workers", "log_every")

Row = dict[str, float]


def train(
    model: nn.Module,
    dataset: Dataset[Item],
    out: str | Path,
    settings: TrainSettings | None = None,
    *,
    description: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stop_after: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """Train a detector where it lies, and write `last.pth`, `metrics.csv` and `loss.png` into a folder.

    The checkpoint is written at the start and after each epoch. A run resumed from it goes on bitwise as if it had not
    been interrupted, where the device's kernels repeat bitwise: it holds the model, the optimizer, the epoch and the
    state of torch's generators, and what is drawn of the data follows from the seed and the epoch's number. A new run
    seeds torch's global generator.

    Losses are read, averaged and written every `log_every` steps. Only then a loss or a gradient that is not finite is
    noticed, so it stops the run that many steps late; it never gets into a checkpoint.

    Args:
        model: called with a list of images [3, H, W], float 0..1 on the device of its parameters, and a list of
            targets on the CPU, it returns the four losses.
        dataset: items (image, target), and a length. Its `ids`, if it has them, name images in errors.
        out: the folder, made if it is not there.
        settings: None takes `TrainSettings()`.
        description: plain values to put into the checkpoint, such as the "architecture" and "class_names" that
            `fastdet.engine.checkpoint.load_model` wants.
        resume: go on from `last.pth`. Under the cosine schedule another number of epochs changes the rate.
        overwrite: begin anew even if the folder has a run.
        stop_after: end after this many epochs in all; the schedule still counts `settings.epochs`.
        progress: show a bar.

    Returns:
        The rows of metrics.csv, those before a resumption included.

    Raises:
        ValueError: the data set is empty.
        CheckpointError: the folder has a run already, a run is resumed with other settings, or the checkpoint cannot
            be read or written.
        DataError: an image cannot be decoded, or the model does not take an image or target.
        FloatingPointError: a loss or gradient is not finite; names the step and the images.
    """
    settings = settings or TrainSettings()
    last, metrics = Path(out) / "last.pth", Path(out) / "metrics.csv"
    length = _length(dataset)
    if length == 0:
        raise ValueError("the data set has no images")
    if last.exists() and not (resume or overwrite):
        raise CheckpointError(f"{last}: the folder has a run already: resume it, overwrite it, or take another folder")
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, settings)
    facts = {**(description or {}), **asdict(settings), "images": length}

    def save(epoch: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": _random_state(device)}
        checkpoint.save(last, {**facts, **state, "epoch": epoch})

    if resume:
        start = _restore(last, facts, model, optimizer, device)
        rows = _read_rows(metrics, last_epoch=start)
    else:
        torch.manual_seed(settings.seed)
        start, rows = 0, []
        save(0)
    end = settings.epochs if stop_after is None else min(stop_after, settings.epochs)
    with (
        metrics.open("w", newline="", encoding="utf-8") as file,
        tqdm(total=end * length, initial=start * length, unit=" images", disable=not progress) as bar,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        for epoch in range(start, end):
            bar.set_description(f"epoch {epoch + 1} of {end}")
            for row in _train_epoch(model, optimizer, dataset, settings, epoch, device, bar):
                rows.append(row)
                writer.writerow(row)
                file.flush()
            save(epoch + 1)
    if rows:
        plot_losses(metrics, Path(out) / "loss.png")
    return rows


class _Flipped(Dataset[Item]):
    """A data set whose keys say whether to flip: what is drawn is settled before a worker sees it."""

    def __init__(self, dataset: Dataset[Item]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, bool]) -> Item:
        index, flip = key
        image, target = self.dataset[index]
        return flip_horizontal(image, target) if flip else (image, target)


def _train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    dataset: Dataset[Item],
    settings: TrainSettings,
    epoch: int,
    device: torch.device,
    bar: tqdm[Any],
) -> Iterator[Row]:
    """Train for an epoch, counted from 0; a row every `log_every` steps and at the end."""
    plan = plan_epoch(_length(dataset), settings, epoch)
    loader = DataLoader(
        _Flipped(dataset),
        batch_sampler=plan,
        collate_fn=collate,
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        # Without one of its own, a loader draws from the global generator, which is the model's.
        generator=torch.Generator().manual_seed(settings.seed + epoch),
    )
    model.train()
    unread: list[tuple[int, Batch, Tensor]] = []
    clock = time.perf_counter()
    for step, (batch, (images, targets)) in enumerate(zip(plan, loader, strict=True), start=epoch * len(plan)):
        rate = learning_rate(settings, step, len(plan))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        images = [image.to(device, non_blocking=True) for image in images]
        try:
            losses = _take_step(model, optimizer, images, targets, settings, device)
        except ValueError as error:
            # The model counts images within the batch, which says nothing to who owns the files.
            raise DataError(f"images {_image_names(dataset, batch)}: {error}") from error
        unread.append((step + 1, batch, losses))
        bar.update(len(batch))
        if len(unread) == settings.log_every or step + 1 == (epoch + 1) * len(plan):
            means = _read_losses(unread, dataset)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            bar.set_postfix_str(f"loss {means['loss']:.3f}")
            speed = sum(len(batch) for _, batch, _ in unread) / seconds
            yield {"epoch": epoch + 1, "step": step + 1, "lr": rate, **means, "images_per_second": round(speed, 2)}
            unread.clear()


def _take_step(
    model: nn.Module,
    optimizer: Optimizer,
    images: list[Tensor],
    targets: list[Any],
    settings: TrainSettings,
    device: torch.device,
) -> Tensor:
    """One step of the optimizer; the four losses and the gradients' norm, on the device."""
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp is not None):
        losses: dict[str, Tensor] = model(images, targets)
    optimizer.zero_grad(set_to_none=True)
    torch.stack([losses[name] for name in LOSSES]).sum().backward()
    # Where nothing is clipped the norm still says whether the gradients are finite.
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf)
    optimizer.step()
    return torch.stack([*(losses[name].detach() for name in LOSSES), norm])


def _read_losses(unread: list[tuple[int, Batch, Tensor]], dataset: Dataset[Item]) -> dict[str, float]:
    """The means of losses, brought from the device in one piece."""
    values = torch.stack([value for _, _, value in unread]).tolist()
    for (step, batch, _), found in zip(unread, values, strict=True):
        if not all(map(math.isfinite, found)):
            what = ", ".join(f"{name} {x:.3g}" for name, x in zip((*LOSSES, "gradient norm"), found, strict=True))
            names = _image_names(dataset, batch)
            raise FloatingPointError(f"step {step}: a loss or gradient is not finite ({what}), images {names}")
    means = [sum(column) / len(values) for column in zip(*values, strict=True)][: len(LOSSES)]
    return {"loss": sum(means), **dict(zip(LOSSES, means, strict=True))}


def _length(dataset: Any) -> int:
    return len(dataset)


def _image_names(dataset: Dataset[Item], batch: Batch) -> str:
    return ", ".join(_image_name(dataset, index) for index, _ in batch)


def _image_name(dataset: Any, index: int) -> str:
    if isinstance(dataset, Subset):
        return _image_name(dataset.dataset, dataset.indices[index])
    return str(dataset.ids[index]) if hasattr(dataset, "ids") else str(index)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _restore(path: Path, facts: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, device: torch.device) -> int:
    """Put a run back to where its checkpoint left it; the number of epochs it has done."""
    saved = checkpoint.load(path)
    missing = [name for name in (*facts, "model", "optimizer", "random", "epoch") if name not in saved]
    if missing:
        raise CheckpointError(f"{path}: not the checkpoint of a run: it has no {', '.join(missing)}")
    for name, value in facts.items():
        if name not in _FREE_ON_RESUME and saved[name] != value:
            raise CheckpointError(f"{path}: {_difference(name, value, saved[name])}")
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: the checkpoint does not fit the model: {one_line(error)}") from error
    torch.set_rng_state(saved["random"]["cpu"])
    if device.type == "cuda" and "cuda" in saved["random"]:
        torch.cuda.set_rng_state(saved["random"]["cuda"], device)
    return int(saved["epoch"])


def _difference(name: str, now: Any, then: Any) -> str:
    """The first thing in which a run differs from the one to be resumed."""
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        for key in {**now, **then}:
            if now.get(key) != then.get(key):
                return _difference(f"{name}, {key}", now.get(key), then.get(key))
    return f"{name} is {now!r}, but the run to be resumed has {then!r}"


def _read_rows(path: Path, last_epoch: int) -> list[Row]:
    """The rows of a metrics file up to an epoch: what an interrupted run wrote after its checkpoint is done again."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if all(row.get(name) for name in COLUMNS)]
    numbers = [{name: (int if name in ("epoch", "step") else float)(row[name]) for name in COLUMNS} for row in rows]
    return [row for row in numbers if row["epoch"] <= last_epoch]
