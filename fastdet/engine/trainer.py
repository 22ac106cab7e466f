"""Training: a loop to read, import and copy from. It resumes exactly, and has no host sync at each step."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Subset

from fastdet import weights
from fastdet.data import DataError, Item, collate, flip_horizontal
from fastdet.engine import checkpoint, run_folder
from fastdet.engine.checkpoint import CheckpointError
from fastdet.engine.recipes import BatchPlan, TrainSettings, build_optimizer, learning_rate, plan_epoch
from fastdet.engine.run_folder import Row, Terminated
from fastdet.models.losses import NAMES as LOSSES
from fastdet.safe_files import printable
from fastdet.visualize import plot_losses
from fastdet.weights import files
from fastdet.weights.files import one_line

# A resumed run may change these, as they change nothing in what was drawn so far.
_FREE_ON_RESUME = ("epochs", "workers", "log_every")


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
    """Train a detector on its device, and write `last.pth`, `metrics.csv` and `loss.png` into a folder.

    The folder belongs to one process at a time. At SIGTERM the run ends after the step, with a checkpoint.

    The checkpoint is written at the start and after each epoch, with the model, the optimizer, the epoch and the state
    of torch's generators; order and flips follow from the seed and the epoch. A run resumed from it equals one that was
    not interrupted, bitwise where the device's kernels repeat bitwise. A new run seeds torch's global generator.

    Losses are read, averaged and written every `log_every` steps. Only then a loss or a gradient that is not finite is
    noticed, so it stops the run that many steps late; it never gets into a checkpoint.

    Args:
        model: called with a list of images [3, H, W], float 0..1 on the device of its parameters, and a list of
            targets on the CPU, it returns the four losses.
        dataset: items (image, target), and a length. Its `ids`, if it has them, name images in errors.
        out: the folder, made if it is not there.
        settings: None takes `TrainSettings()`.
        description: plain values to put into the checkpoint, such as the "architecture" and "class_names" that
            `fastdet.engine.load_model` needs.
        resume: go on from `last.pth`. Under the cosine schedule another number of epochs changes the rate.
        overwrite: begin anew even if the folder has a run.
        stop_after: end after this many epochs in all; the schedule still counts `settings.epochs`.
        progress: show a bar.

    Returns:
        The rows of metrics.csv, those before a resumption included.

    Raises:
        ValueError: the data set is empty.
        CheckpointError: the folder has a run already or another process writes into it, a run is resumed with other
            settings, or the checkpoint cannot be read or written.
        DataError: an image cannot be decoded, the model does not take an image or target, or a worker was killed.
        Terminated: SIGTERM came; the state is saved.
        FloatingPointError: a loss or gradient is not finite; names the step and the images.
    """
    settings = settings or TrainSettings()
    length = len(dataset)  # type: ignore[arg-type]
    if length == 0:
        raise ValueError("the data set has no images")
    metadata = {**(description or {}), **asdict(settings), "images": length}
    with run_folder.own(Path(out)), run_folder.notice_sigterm() as is_terminated:
        last = Path(out) / "last.pth"
        if last.exists() and not (resume or overwrite):
            message = "the folder has a run already: resume it, overwrite it, or take another folder"
            raise CheckpointError(f"{last}: {message}")
        end = settings.epochs if stop_after is None else min(stop_after, settings.epochs)
        return _train(model, dataset, Path(out), settings, metadata, resume, end, progress, is_terminated)


def _train(
    model: nn.Module,
    dataset: Dataset[Item],
    out: Path,
    settings: TrainSettings,
    metadata: Mapping[str, Any],
    resume: bool,
    end: int,
    progress: bool,
    is_terminated: Callable[[], bool],
) -> list[Row]:
    from tqdm import tqdm

    last, metrics, length = out / "last.pth", out / "metrics.csv", metadata["images"]
    device, optimizer = next(model.parameters()).device, build_optimizer(model, settings)
    steps = len(plan_epoch(length, settings, 0))

    def save(epoch: int, step: int = 0) -> None:
        """After so many epochs, and so many steps of the next."""
        random = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(device)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": random}
        checkpoint.save(last, {**metadata, **state, "epoch": epoch, "step": step})

    start, first, rows = 0, 0, []
    if resume:
        start, first = _restore(last, metadata, model, optimizer, device)
        if first >= steps:
            raise CheckpointError(f"{last}: step must be below the {steps} of an epoch, got {first}")
        rows = run_folder.read_rows(metrics, last_step=start * steps + first)
    else:
        torch.manual_seed(settings.seed)
        save(0)
    files.write(metrics, lambda file: file.write(run_folder.to_csv(rows, header=True)), kind="metrics")
    done = min(start * length + first * settings.batch_size, end * length)
    with (
        metrics.open("ab") as file,
        tqdm(total=end * length, initial=done, unit=" images", disable=not progress) as bar,
    ):
        for epoch in range(start, end):
            bar.set_description(f"epoch {epoch + 1} of {end}")
            plan = plan_epoch(length, settings, epoch)
            for row in _train_epoch(model, optimizer, dataset, settings, epoch, plan, first, bar, is_terminated):
                rows.append(row)
                file.write(run_folder.to_csv([row]))
                file.flush()
                done_in_epoch = int(row["step"]) - epoch * steps
                if is_terminated() and done_in_epoch < steps:
                    save(epoch, done_in_epoch)
                    raise Terminated(f"{last}: saved after step {row['step']}")
            first = 0
            save(epoch + 1)
            if is_terminated():
                raise Terminated(f"{last}: saved after epoch {epoch + 1}")
    if rows:
        picture = io.BytesIO()
        plot_losses(metrics, picture)
        files.write(out / "loss.png", lambda file: file.write(picture.getvalue()), kind="picture")
    return rows


class _FlipDataset(Dataset[Item]):
    """A data set whose keys say whether to flip, so that workers draw nothing."""

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
    plan: list[BatchPlan],
    first: int,
    bar: Any,
    is_terminated: Callable[[], bool],
) -> Iterator[Row]:
    """Train for an epoch, counted from 0, less its `first` steps; a row every `log_every` steps, at the end, and before
    the run is to end."""
    device = next(model.parameters()).device
    loader = DataLoader(
        _FlipDataset(dataset),
        batch_sampler=plan[first:],
        collate_fn=collate,
        num_workers=settings.workers,
        pin_memory=device.type == "cuda",
        # Without this generator, a loader draws from the global one, which is the model's.
        generator=torch.Generator().manual_seed(settings.seed + epoch),
    )
    model.train()
    unread: list[tuple[int, BatchPlan, Tensor]] = []
    clock = time.perf_counter()
    batches = zip(plan[first:], _name_killed_workers(loader), strict=True)
    for step, (batch, (images, targets)) in enumerate(batches, start=epoch * len(plan) + first):
        rate = learning_rate(settings, step, len(plan))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        images = [image.to(device, non_blocking=True) for image in images]
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.amp is not None):
                losses: dict[str, Tensor] = model(images, targets)
        except ValueError as error:
            # The model counts images within the batch; the user needs their names.
            raise DataError(f"images {_image_names(dataset, batch)}: {error}") from error
        optimizer.zero_grad(set_to_none=True)
        torch.stack([losses[name] for name in LOSSES]).sum().backward()
        # Where nothing is clipped the norm still shows whether the gradients are finite.
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if settings.clip_norm:
            nn.utils.clip_grads_with_norm_(model.parameters(), settings.clip_norm, norm)
        optimizer.step()
        unread.append((step + 1, batch, torch.stack([*(losses[name].detach() for name in LOSSES), norm])))
        bar.update(len(batch))
        if len(unread) == settings.log_every or step + 1 == (epoch + 1) * len(plan) or is_terminated():
            means = _read_losses(unread, dataset)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            bar.set_postfix_str(f"loss {means['loss']:.3f}")
            speed = sum(len(batch) for _, batch, _ in unread) / seconds
            yield {"epoch": epoch + 1, "step": step + 1, "lr": rate, **means, "images_per_second": round(speed, 2)}
            unread.clear()


def _name_killed_workers(loader: Iterable[Any]) -> Iterator[Any]:
    """What the loader gives; its RuntimeError of a worker that was killed as a DataError."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"{one_line(error)} (too little memory? fewer workers take less)") from error


def _read_losses(unread: list[tuple[int, BatchPlan, Tensor]], dataset: Dataset[Item]) -> dict[str, float]:
    """The means of losses, brought from the device in one piece."""
    table = torch.stack([values for _, _, values in unread]).tolist()
    for (step, batch, _), values in zip(unread, table, strict=True):
        if not all(map(math.isfinite, values)):
            listed = ", ".join(f"{name} {x:.3g}" for name, x in zip((*LOSSES, "gradient norm"), values, strict=True))
            names = _image_names(dataset, batch)
            raise FloatingPointError(f"step {step}: a loss or gradient is not finite ({listed}), images {names}")
    means = [sum(column) / len(table) for column in zip(*table, strict=True)][: len(LOSSES)]
    return {"loss": sum(means), **dict(zip(LOSSES, means, strict=True))}


def _image_names(dataset: Any, batch: BatchPlan) -> str:
    indices = [index for index, _ in batch]
    while isinstance(dataset, Subset):
        dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
    return ", ".join(str(dataset.ids[index]) if hasattr(dataset, "ids") else str(index) for index in indices)


def _restore(
    path: Path, metadata: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, device: torch.device
) -> tuple[int, int]:
    """Restore the state of a run from its checkpoint; returns the epochs it has done, and the steps of the next."""
    saved = {"step": 0, **checkpoint.load(path)}
    checkpoint.require(path, saved, (*metadata, "model", "optimizer", "random", "epoch", "step"), "of a run")
    try:
        for name, value in metadata.items():
            if name not in _FREE_ON_RESUME and saved[name] != value:
                raise CheckpointError(f"{path}: {_first_difference(name, value, saved[name])}")
        if saved["epoch"] > metadata["epochs"]:
            raise CheckpointError(f"{path}: it has {saved['epoch']} epochs, more than the {metadata['epochs']} wanted")
        weights.load(model, saved["model"], name="its model")
        checkpoint.load_optimizer(optimizer, saved["optimizer"])
        torch.set_rng_state(saved["random"]["cpu"])
        if device.type == "cuda" and "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"], device)
    except CheckpointError:
        raise
    # Whatever the file has in place of what belongs there.
    except Exception as error:
        raise CheckpointError(f"{path}: the checkpoint does not fit the model: {one_line(error)}") from error
    return saved["epoch"], saved["step"]


def _first_difference(name: str, value: Any, saved: Any) -> str:
    """The first setting in which a run differs from the one to be resumed."""
    if isinstance(value, Mapping) and isinstance(saved, Mapping):
        for key in {**value, **saved}:
            if value.get(key) != saved.get(key):
                return _first_difference(f"{name}, {key}", value.get(key), saved.get(key))
    return f"{name} is {value!r:.200}, but the run to be resumed has {printable(repr(saved), 200)}"
