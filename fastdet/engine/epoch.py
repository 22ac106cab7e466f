"""The training of an epoch: its steps, and the losses that are read now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset, Subset

from fastdet.data import DataError, Item
from fastdet.engine.loading import Batch
from fastdet.engine.recipes import BatchPlan, EpochPlans, learning_rate
from fastdet.engine.run.folder import Row
from fastdet.models.losses import NAMES as LOSSES


class NotFiniteError(FloatingPointError):
    """A loss or gradient was not finite.

    Attributes:
        record: the step, its images with the seeds of their augmentation and their boxes, and the losses, as plain
            values.
    """

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        super().__init__(message)
        self.record = record


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
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
        model, optimizer: as of `fastdet.engine.train`.
        dataset: has the names of the images.
        batches: those of the plans.
        plans: of the run.
        epoch: counted from 0.
        bar: a progress bar.
        is_terminated: whether the run is to end.
        average: of the weights, updated after each step.
    """
    device, settings = next(model.parameters()).device, plans.settings
    plan, steps = plans.of(epoch), plans.steps
    last_step = (epoch + 1) * steps
    model.train()
    unread: list[tuple[int, BatchPlan, Tensor]] = []
    clock, waited = time.perf_counter(), 0.0
    for step, batch in enumerate(plan, start=last_step - len(plan)):
        asked = time.perf_counter()
        images, targets = next(batches)
        waited += time.perf_counter() - asked
        rate = learning_rate(settings, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
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
        if average is not None:
            average.update_parameters(model)
        unread.append((step + 1, batch, torch.stack([*(losses[name].detach() for name in LOSSES), norm])))
        bar.update(len(batch))
        if len(unread) == settings.log_every or step + 1 == last_step or is_terminated():
            means = _read_losses(unread, dataset)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            speed, wait = sum(len(batch) for _, batch, _ in unread) / seconds, waited / seconds
            bar.set_postfix_str(f"loss {means['loss']:.3f}, {wait:.0%} of the time waiting for data")
            yield {
                **{"epoch": step // steps + 1, "step": step + 1, "lr": rate, **means},
                **{"images_per_second": round(speed, 2), "data_wait": round(wait, 4)},
            }
            unread.clear()
            waited = 0.0


def _read_losses(unread: list[tuple[int, BatchPlan, Tensor]], dataset: Dataset[Item]) -> dict[str, float]:
    """The means of losses, brought from the device in one piece."""
    table = torch.stack([values for _, _, values in unread]).tolist()
    for (step, batch, _), values in zip(unread, table, strict=True):
        if not all(map(math.isfinite, values)):
            named = dict(zip((*LOSSES, "gradient norm"), values, strict=True))
            listed, names = ", ".join(f"{name} {x:.3g}" for name, x in named.items()), _image_names(dataset, batch)
            target = getattr(dataset, "target", None)
            record = {
                "step": step,
                "losses": {name: str(value) for name, value in named.items()},
                "images": names,
                "indices": [index for index, _ in batch],
                "seeds": [seed for _, seed in batch],
                "boxes": [target(index)["boxes"].tolist() for index, _ in batch] if target else None,
            }
            message = f"step {step}: a loss or gradient is not finite ({listed}), images {names}"
            raise NotFiniteError(message, record)
    means = [sum(column) / len(table) for column in zip(*table, strict=True)][: len(LOSSES)]
    return {"loss": sum(means), **dict(zip(LOSSES, means, strict=True))}


def _image_names(dataset: Any, batch: BatchPlan) -> str:
    indices = [index for index, _ in batch]
    while isinstance(dataset, Subset):
        dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
    return ", ".join(str(dataset.ids[index]) if hasattr(dataset, "ids") else str(index) for index in indices)
