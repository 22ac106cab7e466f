"""The training of an epoch: its steps, and the losses that are read now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

from fastdet.data import DataError, DetectionDataset, Item
from fastdet.engine.loading import Batch, BatchPlan, EpochPlans, image_names
from fastdet.engine.recipes import learning_rate, update_average
from fastdet.engine.run.folder import Row
from fastdet.engine.step import Stepper
from fastdet.graphs.rows import StepRow, UnreadRows, describe
from fastdet.graphs.step import COLUMNS
from fastdet.models.losses import NAMES as LOSSES


class NotFiniteError(FloatingPointError):
    """A loss or gradient was not finite.

    Attributes:
        record: the step, its images with the seeds of what is drawn for them and their boxes, and the losses, as plain
            values.
    """

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record


def train_epoch(
    stepper: Stepper,
    dataset: Dataset[Item],
    batches: Iterator[Batch],
    plans: EpochPlans,
    epoch: int,
    bar: Any,
    is_terminated: Callable[[], bool],
    average: AveragedModel | None = None,
) -> Iterator[Row]:
    """Train for what is left of an epoch; a row every `log_every` steps, at the end, and before the run is to end.

    Args:
        stepper: takes the steps.
        dataset: has the names of the images.
        batches: those of the plans.
        plans: of the run.
        epoch: counted from 0.
        bar: a progress bar.
        is_terminated: whether the run is to end, on which several processes agree.
        average: of the weights, updated after each step.
    """
    settings = plans.settings
    plan, steps = plans.of(epoch), plans.steps
    last_step = (epoch + 1) * steps
    first = last_step - len(plan)
    # The optimizer's state has the rate of the last step, also where none of the epoch is left.
    stepper.set_lr(learning_rate(settings, max(first - 1, 0), steps))
    stepper.model.train()
    unread: UnreadRows[BatchPlan] = UnreadRows()
    clock, waited, trained = time.perf_counter(), 0.0, 0
    for step, batch in enumerate(plan, start=first):
        asked = time.perf_counter()
        images, targets = next(batches)
        waited += time.perf_counter() - asked
        rate = learning_rate(settings, step, steps)
        stepper.set_lr(rate)
        own = plans.share(batch)
        try:
            row = stepper(images, targets, len(batch))
        except ValueError as error:
            # The model counts images within the batch; the user needs their names.
            raise DataError(f"images {_image_names(dataset, own)}: {error}") from error
        if average is not None:
            update_average(average, stepper.model, settings.ema)
        unread.add(step + 1, batch, row)
        trained += len(batch)
        bar.update(len(batch))
        if len(unread) == settings.log_every or step + 1 == last_step or is_terminated():
            means = _read_losses(unread, stepper.checked, dataset)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            wait = waited / seconds
            bar.set_postfix_str(f"loss {sum(means):.3f}, {wait:.0%} of the time waiting for data")
            yield {
                **{"epoch": step // steps + 1, "step": step + 1, "lr": rate, "loss": sum(means)},
                **dict(zip(LOSSES, means, strict=True)),
                **{"images_per_second": round(trained / seconds, 2), "data_wait": round(wait, 4)},
            }
            waited, trained = 0.0, 0


def _read_losses(unread: UnreadRows[BatchPlan], checked: int, dataset: Dataset[Item]) -> list[float]:
    """The means of the losses, in the order of `LOSSES`."""
    rows, others = unread.read(checked)
    if others:
        first = others[0]
        names = _image_names(dataset, first.about)
        raise NotFiniteError(describe(first, checked, names), _record(first, names, dataset))
    return [sum(row.values[name] for row in rows) / len(rows) for name in LOSSES]


def _record(row: StepRow[BatchPlan], names: str, dataset: Any) -> dict[str, Any]:
    """What is known of a step, as plain values."""
    boxes = None
    if isinstance(dataset, DetectionDataset):
        boxes = [dataset.target(index)["boxes"].tolist() for index, _ in row.about]
    return {
        "step": row.step,
        "losses": {name: str(row.values[name]) for name in COLUMNS},
        "images": names,
        "indices": [index for index, _ in row.about],
        "seeds": [seed for _, seed in row.about],
        "boxes": boxes,
    }


def _image_names(dataset: Any, batch: BatchPlan) -> str:
    return image_names(dataset, [index for index, _ in batch])
