"""Training: a loop to read, import and copy from. It resumes exactly, and has no host sync at each step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from fastdet.data import DataError, Item
from fastdet.engine.buckets import GraphPlan
from fastdet.engine.checkpoint import CheckpointError
from fastdet.engine.distributed import ALONE, Processes
from fastdet.engine.epoch import NotFiniteError, train_epoch
from fastdet.engine.loading import AugmentedDataset, EpochPlans, augment_for, check_ids, load_batches, sizes_of
from fastdet.engine.recipes import TrainSettings
from fastdet.engine.run import folder as run_folder
from fastdet.engine.run.folder import Row, Terminated
from fastdet.engine.run.progress import show_progress
from fastdet.engine.run.state import RunState, build_metadata, build_state
from fastdet.engine.step import Stepper, choose_graphs
from fastdet.models.anchors import Size, has_anchor_inside
from fastdet.models.preprocessing import resized_size
from fastdet.models.settings import Settings
from fastdet.safe_files import write_json
from fastdet.visualize import plot_average_precision, plot_losses, require_tensorboard, write_events
from fastdet.weights import files

# Seconds from which on a run on a CPU is worth a warning.
_LONG = 3600.0
# What a run and its report write later than at its start.
_RESULTS = ("best.pth", "metrics.csv", "validation.csv", "loss.png", "AP.png", "result.json", "detections.png")

Validate = Callable[[nn.Module], Mapping[str, float]]


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
    validate: Validate | None = None,
    processes: Processes = ALONE,
    graphs: GraphPlan | None = None,
    tensorboard: bool = False,
) -> list[Row]:
    """Train a detector on its device, and write what comes of it into a folder.

    That is `last.pth`, `settings.json`, `metrics.csv` and `loss.png`; with `validate` also `best.pth`, the weights with
    the highest AP, `validation.csv` and `AP.png`. The folder belongs to one run at a time. At SIGTERM the run ends with
    a checkpoint, after the step; in an evaluation, at once.

    The checkpoint, `last.pth`, is written at the start, after each epoch, before its evaluation too, and every
    `save_every` steps, with the model, the optimizer, the epoch and the state of torch's generators; order,
    augmentation and sampling follow from the seed and the epoch. A run resumed from it equals one that was not
    interrupted, bitwise where the device's kernels repeat bitwise. A new run seeds torch's global generator.

    A step with a loss or a gradient that is not finite changes nothing. Losses are read, averaged and written every
    `log_every` steps; only then such a step is noticed, and ends the run.

    Args:
        model: called with a list of images [3, H, W], uint8 or 0..1, on the device of its parameters, and a list of
            targets on the CPU, it returns the four losses. A `fastdet.FasterRCNN` on a GPU trains in CUDA graphs.
        dataset: items (image, target), and a length: `fastdet.data`'s, or any whose images are tensors [3, H, W] uint8
            or in 0..1, or tv_tensors, and whose targets have "boxes", "labels" and perhaps "ignore". Its `ids`, if it
            has them, name images in errors; by its `sizes` (height, width) images of similar shapes are put together.
        out: the folder, made if it is not there; of several processes the same.
        settings: None takes `TrainSettings()`.
        description: plain values (numbers, texts, True, False, None, in lists, tuples, and dicts by texts) to put into
            the checkpoint, such as the "architecture" and "class_names" that `fastdet.engine.load_model` needs.
        resume: go on from `last.pth`. Under the cosine schedule, and where the warm-up is a fifth of a short run,
            another number of epochs changes the rate.
        overwrite: begin anew even if the folder has a run, unless that is resumed.
        stop_after: end after this many epochs in all; the schedule still counts `settings.epochs`.
        progress: show a bar.
        validate: given the model, or the average of its weights, it returns "AP", and where it has them "AP50", "AP75"
            and losses, "val_loss" for their sum. It is called every `eval_every` epochs, and must leave
            torch's generators as they are.
        processes: that train together, as of `fastdet.engine.distributed.join`, each with this call.
        graphs: what `fastdet.engine.step.choose_graphs` gives for this run, if it was asked before: it is not again.
        tensorboard: write the rows for TensorBoard too, an extra of fastdet.

    Returns:
        The rows of metrics.csv, those before a resumption included (of several processes, in the first).

    Raises:
        ImportError: TensorBoard is missing.
        ValueError: the data set is empty, its `sizes` or `ids` are not those of its images, a batch has fewer images
            than there are processes, a value of `description` is not plain, or the settings need `validate`.
        CheckpointError: the folder has a run already or another process writes into it, a run is resumed with other
            settings, or the checkpoint cannot be read or written.
        FileError: another of its files cannot be written.
        DataError: an image cannot be decoded, the model does not take an image or target, no anchor lies inside any
            image where only those train, or a worker was killed.
        Terminated: SIGTERM came; the state is saved.
        FloatingPointError: a loss or gradient is not finite; names the step and the images. `failure.json` has them
            too, and `fastdet.engine.run.replay` takes the step again.
    """
    settings, out = settings or TrainSettings(), Path(out)
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise ValueError("the data set has no images")
    check_ids(dataset)
    if tensorboard:
        require_tensorboard()
    metadata = build_metadata(dataset, settings, description)
    processes.check_batch_size(settings.batch_size)
    if validate is None and (settings.patience or settings.eval_every > 1):
        given = f"patience={settings.patience}, eval_every={settings.eval_every}"
        raise ValueError(f"{given}: without validate there are no evaluations")
    lock = run_folder.lock(out) if processes.writes else nullcontext()
    with lock, run_folder.notice_sigterm() as sigterm_came:
        if processes.writes and (out / "last.pth").exists() and not (resume or overwrite):
            message = "the folder has a run already: resume it, overwrite it, or take another folder"
            raise CheckpointError(f"{out / 'last.pth'}: {message}")
        sizes = sizes_of(dataset)
        _check_anchors(model, sizes or ())
        augmented = augment_for(model, dataset, settings)
        graphs = graphs or choose_graphs(model, dataset, settings, processes)
        state = build_state(out, model, settings, metadata, processes)
        _begin(state, settings, resume)
        processes.mark_begun()
        run = _Run(
            dataset=dataset,
            augmented=augmented,
            settings=settings,
            state=state,
            stepper=Stepper(model, state.optimizer, settings, state.loss_scale, graphs, processes),
            sizes=sizes,
            end=settings.epochs if stop_after is None else min(stop_after, settings.epochs),
            validate=validate,
            is_terminated=lambda: processes.any(sigterm_came()),
            progress=progress and processes.writes,
            tensorboard=tensorboard and processes.writes,
        )
        try:
            return _train(run)
        except NotFiniteError as error:
            if processes.writes:
                write_json(out / "failure.json", error.record)
            raise


@dataclass(frozen=True)
class _Run:
    """What the loop needs; `end` counts epochs."""

    dataset: Dataset[Item]
    augmented: AugmentedDataset
    settings: TrainSettings
    state: RunState
    stepper: Stepper
    sizes: list[Size] | None
    end: int
    validate: Validate | None
    is_terminated: Callable[[], bool]
    progress: bool
    tensorboard: bool


def _begin(state: RunState, settings: TrainSettings, resume: bool) -> None:
    """Bring a run to where it goes on, or to its start; the files of an earlier one are removed."""
    if resume:
        state.restore()
        if state.step > state.steps_per_epoch:
            wanted = f"at most the {state.steps_per_epoch} of an epoch"
            raise CheckpointError(f"{state.last}: step must be {wanted}, got {state.step}")
        stale = ["failure.json"]
    else:
        torch.manual_seed(settings.seed)
        if state.processes.rank:
            # Networks drop out other values in each. What the CPU draws, such as a `min_size`, is the same in all.
            torch.cuda.manual_seed(settings.seed + state.processes.rank)
        stale = ["failure.json", *_RESULTS]
    if state.processes.writes:
        for name in stale:
            (state.out / name).unlink(missing_ok=True)
        # Of a resumed run too, which may have other epochs: the file is what repeats it.
        write_json(state.out / "settings.json", state.metadata)
    if not resume:
        state.save(0)


def _train(run: _Run) -> list[Row]:
    state, settings, end = run.state, run.settings, run.end
    length, steps, device = state.images, state.steps_per_epoch, next(state.model.parameters()).device
    start, done = state.epoch, min(state.epoch * length + state.step * settings.batch_size, end * length)
    plans = EpochPlans(length, settings, range(start, end), state.step, run.sizes, state.processes)
    batches = load_batches(run.augmented, plans, settings.workers, settings.seed + start, device)
    done_steps, writes = start * steps + state.step, state.processes.writes
    with (
        run_folder.MetricsFile(state.out / "metrics.csv", done_steps, writes) as metrics,
        write_events(state.out, done_steps + 1) if run.tensorboard else nullcontext(_ignore) as add_event,
        show_progress(end * length, done, run.progress) as bar,
    ):
        for epoch in range(start, end):
            if settings.patience and state.best["evaluations_since"] >= settings.patience:
                break
            bar.set_description(f"epoch {epoch + 1} of {end}")
            saved = state.step if epoch == start else 0
            rows = train_epoch(
                run.stepper, run.dataset, batches, plans, epoch, bar, run.is_terminated, average=state.average
            )
            for row in rows:
                if not metrics.rows and device.type == "cpu":
                    _warn_of_long_runs((end * length - bar.n) / max(row["images_per_second"], 1e-9))
                metrics.add(row)
                add_event("train", row)
                done_in_epoch, terminated = int(row["step"]) - epoch * steps, run.is_terminated()
                is_due = bool(settings.save_every) and done_in_epoch >= saved + settings.save_every
                if (terminated or is_due) and done_in_epoch < steps:
                    state.save(epoch, saved := done_in_epoch)
                if terminated and done_in_epoch < steps:
                    raise Terminated(f"{state.last}: saved after step {row['step']}")
            if run.validate and ((epoch + 1) % settings.eval_every == 0 or epoch + 1 == settings.epochs):
                add_event("validation", _validate(run, run.validate, epoch + 1, bar))
            state.save(epoch + 1)
            if run.is_terminated():
                raise Terminated(f"{state.last}: saved after epoch {epoch + 1}")
    if writes:
        _draw_curves(state.out)
    return metrics.rows


def _draw_curves(out: Path) -> None:
    """The pictures of the metrics files that have rows."""
    steps, evaluations = out / "metrics.csv", out / "validation.csv"
    if run_folder.has_rows(steps):
        files.write(out / "loss.png", partial(plot_losses, steps, validation=evaluations), kind="picture")
    if run_folder.has_rows(evaluations):
        files.write(out / "AP.png", partial(plot_average_precision, evaluations), kind="picture")


def _ignore(group: str, row: Mapping[str, float]) -> None:
    """In place of an event file."""


def _validate(run: _Run, validate: Validate, epoch: int, bar: Any) -> Row:
    """Evaluate after so many epochs; note it, and keep the weights if they are the best.

    The state is saved before: SIGTERM does not wait for the end, and a resumed run begins with the evaluation.
    """
    state = run.state
    state.save(epoch - 1, state.steps_per_epoch)
    saved = f"{state.last}: saved after epoch {epoch}, before its evaluation"
    with run_folder.raise_at_sigterm(saved):
        if run.is_terminated():
            raise Terminated(saved)
        found = validate(state.evaluated)
    if not isinstance(found, Mapping) or "AP" not in found:
        raise ValueError(f'validate must return a dict with "AP", got {found!r:.200}')
    # Others' metrics are numbers of NumPy or tensors, which a checkpoint would not give back.
    found = {**found, **{name: float(found[name]) for name in run_folder.VALIDATION_COLUMNS if name in found}}
    row = {"epoch": epoch, "step": epoch * state.steps_per_epoch, **found}
    if state.processes.writes:
        run_folder.write_validation(state.out / "validation.csv", row)
    state.keep_best(epoch, found["AP"])
    if run.progress:
        best = f"the best is epoch {state.best['epoch']}" if state.best["epoch"] else "none is the best"
        bar.write(f"epoch {epoch}: AP {found['AP']:.3f}, AP50 {row.get('AP50', math.nan):.3f}; {best}")
    return row


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
