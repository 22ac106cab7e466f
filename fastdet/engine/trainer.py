"""Training: a loop to read, import and copy from. It resumes exactly, and has no host sync at each step."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fastdet.data import DataError, Item
from fastdet.engine.checkpoint import CheckpointError
from fastdet.engine.epoch import NotFiniteError, train_epoch
from fastdet.engine.loading import AugmentedDataset, load_batches, sizes_of
from fastdet.engine.recipes import EpochPlans, TrainSettings, build_average, build_optimizer
from fastdet.engine.run import folder as run_folder
from fastdet.engine.run.folder import Row, Terminated
from fastdet.engine.run.state import RunState, build_metadata
from fastdet.models.anchors import Size, has_anchor_inside
from fastdet.models.preprocessing import resized_size
from fastdet.models.settings import Settings
from fastdet.visualize import plot_losses
from fastdet.weights import files

# Seconds from which on a run on a CPU is worth a warning.
_LONG = 3600.0


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
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
) -> list[Row]:
    """Train a detector on its device, and write what comes of it into a folder.

    That is `last.pth`, `settings.json`, `metrics.csv` and `loss.png`; with `validate` also `best.pth`, the weights with
    the highest AP, and `validation.csv`. The folder belongs to one process at a time. At SIGTERM the run ends after the
    step, with a checkpoint.

    The checkpoint, `last.pth`, is written at the start, after each epoch, and every `save_every` steps, with the model,
    the optimizer, the epoch and the state of torch's generators; order and augmentation follow from the seed and the
    epoch. A run resumed from it equals one that was not interrupted, bitwise where the device's kernels repeat bitwise.
    A new run seeds torch's global generator.

    Losses are read, averaged and written every `log_every` steps. Only then a loss or a gradient that is not finite is
    noticed, so it stops the run that many steps late; it never gets into a checkpoint.

    Args:
        model: called with a list of images [3, H, W], uint8 or 0..1, on the device of its parameters, and a list of
            targets on the CPU, it returns the four losses.
        dataset: items (image, target), and a length: `fastdet.data`'s, or any whose images are tensors [3, H, W] uint8
            or in 0..1, or tv_tensors, and whose targets have "boxes", "labels" and perhaps "ignore". Its `ids`, if it
            has them, name images in errors; by its `sizes` (height, width) images of similar shapes are put together.
        out: the folder, made if it is not there.
        settings: None takes `TrainSettings()`.
        description: plain values to put into the checkpoint, such as the "architecture" and "class_names" that
            `fastdet.engine.load_model` needs.
        resume: go on from `last.pth`. Under the cosine schedule, and where the warm-up is a fifth of a short run,
            another number of epochs changes the rate.
        overwrite: begin anew even if the folder has a run.
        stop_after: end after this many epochs in all; the schedule still counts `settings.epochs`.
        progress: show a bar.
        validate: given the model, or the average of its weights, it returns "AP", "AP50" and "AP75". It is called every
            `eval_every` epochs, and must leave torch's generators as they are.

    Returns:
        The rows of metrics.csv, those before a resumption included.

    Raises:
        ValueError: the data set is empty, or its `sizes` are not those of its images.
        CheckpointError: the folder has a run already or another process writes into it, a run is resumed with other
            settings, or the checkpoint cannot be read or written.
        DataError: an image cannot be decoded, the model does not take an image or target, no anchor lies inside any
            image where only those train, or a worker was killed.
        Terminated: SIGTERM came; the state is saved.
        FloatingPointError: a loss or gradient is not finite; names the step and the images. `failure.json` has them
            too, and `fastdet.engine.run.replay` takes the step again.
    """
    settings = settings or TrainSettings()
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise ValueError("the data set has no images")
    metadata = build_metadata(dataset, settings, description)
    with run_folder.own(Path(out)), run_folder.notice_sigterm() as is_terminated:
        last = Path(out) / "last.pth"
        if last.exists() and not (resume or overwrite):
            message = "the folder has a run already: resume it, overwrite it, or take another folder"
            raise CheckpointError(f"{last}: {message}")
        end = settings.epochs if stop_after is None else min(stop_after, settings.epochs)
        try:
            return _train(model, dataset, Path(out), settings, metadata, resume, end, progress, is_terminated, validate)
        except NotFiniteError as error:
            text = json.dumps(error.record, indent=2)
            files.write(Path(out) / "failure.json", lambda file: file.write(f"{text}\n".encode()), kind="record")
            raise


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
    validate: Callable[[nn.Module], Mapping[str, float]] | None,
) -> list[Row]:
    from tqdm import tqdm

    metrics, length, device = out / "metrics.csv", metadata["images"], next(model.parameters()).device
    sizes, augmented = sizes_of(dataset), augment_for(model, dataset, settings)
    _check_anchors(model, sizes or ())
    average = build_average(model, settings.ema) if settings.ema else None
    state = RunState(out, metadata, model, build_optimizer(model, settings), average)
    steps = -(-length // settings.batch_size)
    if resume:
        state.restore()
        if state.step >= steps:
            raise CheckpointError(f"{state.last}: step must be below the {steps} of an epoch, got {state.step}")
    else:
        torch.manual_seed(settings.seed)
        for name in ("best.pth", "validation.csv"):
            (out / name).unlink(missing_ok=True)
        text = json.dumps(metadata, indent=2, default=str)
        files.write(out / "settings.json", lambda file: file.write(f"{text}\n".encode()), kind="settings")
        state.save(0)
    # Of an earlier attempt.
    (out / "failure.json").unlink(missing_ok=True)
    start, done_steps = state.epoch, state.epoch * steps + state.step
    rows = run_folder.read_rows(metrics, done_steps) if resume else []
    files.write(metrics, lambda file: file.write(run_folder.to_csv(rows, header=True)), kind="metrics")
    done = min(start * length + state.step * settings.batch_size, end * length)
    plans = EpochPlans(length, settings, range(start, end), state.step, sizes)
    batches = load_batches(augmented, plans, settings.workers, settings.seed + start, device)
    with (
        metrics.open("ab") as file,
        tqdm(total=end * length, initial=done, unit=" images", disable=not progress) as bar,
    ):
        for epoch in range(start, end):
            if settings.patience and state.best["evaluations_since"] >= settings.patience:
                break
            bar.set_description(f"epoch {epoch + 1} of {end}")
            saved = state.step if epoch == start else 0
            for row in train_epoch(
                model, state.optimizer, dataset, batches, plans, epoch, bar, is_terminated, average=average
            ):
                if not rows and device.type == "cpu":
                    _warn_of_long_runs((end * length - bar.n) / row["images_per_second"])
                rows.append(row)
                file.write(run_folder.to_csv([row]))
                file.flush()
                done_in_epoch = int(row["step"]) - epoch * steps
                is_due = bool(settings.save_every) and done_in_epoch >= saved + settings.save_every
                if (is_terminated() or is_due) and done_in_epoch < steps:
                    state.save(epoch, saved := done_in_epoch)
                if is_terminated() and done_in_epoch < steps:
                    raise Terminated(f"{state.last}: saved after step {row['step']}")
            if validate and ((epoch + 1) % settings.eval_every == 0 or epoch + 1 == settings.epochs):
                found = validate(state.evaluated)
                _write_validation(out / "validation.csv", {"epoch": epoch + 1, "step": (epoch + 1) * steps, **found})
                state.keep_best(epoch + 1, found["AP"])
                if progress:
                    best = f"the best is epoch {state.best['epoch']}" if state.best["epoch"] else "none is the best"
                    bar.write(f"epoch {epoch + 1}: AP {found['AP']:.3f}, AP50 {found['AP50']:.3f}; {best}")
            state.save(epoch + 1)
            if is_terminated():
                raise Terminated(f"{state.last}: saved after epoch {epoch + 1}")
    if rows:
        picture = io.BytesIO()
        plot_losses(metrics, picture)
        files.write(out / "loss.png", lambda file: file.write(picture.getvalue()), kind="picture")
    return rows


def _write_validation(path: Path, row: Row) -> None:
    """Add a row to the file of evaluations, in place of those from its step on, which a killed run has left."""
    columns = run_folder.VALIDATION_COLUMNS
    rows = [*run_folder.read_rows(path, int(row["step"]) - 1, columns), {name: row[name] for name in columns}]
    files.write(path, lambda file: file.write(run_folder.to_csv(rows, columns, header=True)), kind="metrics")


def augment_for(model: nn.Module, dataset: Dataset[Item], settings: TrainSettings) -> AugmentedDataset:
    """The data set with the augmentation of the settings, for the sizes to which the model resizes."""
    of_model: Settings | None = getattr(model, "settings", None)
    if of_model is None and settings.augmentation == "scale-jitter":
        raise ValueError("augmentation 'scale-jitter' needs a model with settings, for the size of its images")
    sizes = (of_model.min_sizes[-1], of_model.max_size) if of_model else (0, 0)
    return AugmentedDataset(dataset, settings.augmentation, sizes)


def _check_anchors(model: nn.Module, sizes: Sequence[Size]) -> None:
    """Raises DataError if no anchor lies inside any image, of these (height, width), and only such anchors train."""
    settings: Settings | None = getattr(model, "settings", None)
    if not sizes or settings is None or not settings.rpn_anchors_inside_only:
        return
    generator = settings.rpn_anchor_generator
    resized = {resized_size(size, settings.min_sizes[-1], settings.max_size)[0] for size in set(sizes)}
    if generator.strides and not any(has_anchor_inside(generator, size) for size in resized):
        height, width = max(resized)
        raise DataError(
            f"no anchor lies inside any image, the largest {height} x {width} after resizing, so that region proposals "
            "learn nothing: smaller anchor sizes, a larger min_size or rpn_anchors_inside_only=False would give it some"
        )


def _warn_of_long_runs(seconds: float) -> None:
    if seconds > _LONG:
        warnings.warn(
            f"the run will take about {seconds / 3600:.1f} hours on this CPU; a smaller min_size, fewer epochs or a "
            "lighter backbone take less",
            stacklevel=4,
        )
