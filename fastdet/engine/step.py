"""The steps of a training run: each one CUDA graph where that is possible, else eager; in one process or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import Dataset

from fastdet.data import Item, Target
from fastdet.engine.buckets import GraphPlan, plan_graphs
from fastdet.engine.distributed import ALONE, Processes
from fastdet.engine.recipes import TrainSettings, amp_dtype
from fastdet.graphs import GraphedTrainer
from fastdet.graphs.batch_losses import PaddedLosses, autocast, batch_losses
from fastdet.graphs.optimizers import prepare_optimizer, set_learning_rate
from fastdet.graphs.step import LossScale, checked_columns, training_step
from fastdet.models.anchors import Size
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.preprocessing import smallest_bucket


class Stepper:
    """Takes steps of `fastdet.graphs.step.training_step` on batches of lists.

    Args:
        model: as of `fastdet.engine.train`, on its device.
        optimizer: as of `fastdet.engine.build_optimizer`, with its state; it gets learning rates on the device.
        settings: of the run.
        loss_scale: changed by the steps.
        graphs: what to capture; a batch that it does not hold is taken eagerly. None: all are.
        processes: with which each batch is shared.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        settings: TrainSettings,
        loss_scale: LossScale,
        graphs: GraphPlan | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.optimizer, self.settings, self.loss_scale = model, optimizer, settings, loss_scale
        self.processes = processes
        self.amp = amp_dtype(settings, next(model.parameters()).device)
        # Of `COLUMNS`, those that must be finite.
        self.checked = checked_columns(self.amp, settings.clip_norm)
        self._graphed = None
        if graphs is None or not isinstance(model, FasterRCNN):
            prepare_optimizer(optimizer, model)
        else:
            self._graphed = GraphedTrainer(
                # As each epoch does: a run may begin with a model that was evaluated.
                model.train(),
                optimizer,
                graphs.shapes,
                graphs.max_boxes,
                amp=self.amp,
                clip_norm=settings.clip_norm,
                accumulate=settings.accumulate,
            )
            self._graphed.loss_scale = loss_scale
        self._module: nn.Module = PaddedLosses(model) if isinstance(model, FasterRCNN) else model
        if self.processes.count > 1:
            self._module = DistributedDataParallel(self._module)
            # Those that change are combined after each step, and processes may go through the network so many times.
            self._module.broadcast_buffers = False

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on, times the "lr_factor" of each group; no host sync."""
        set_learning_rate(self.optimizer, lr)

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target], batch_size: int) -> Tensor:
        """Take a step; its row, as of `training_step`, is on the device, and that of the whole batch in all processes.

        Args:
            images: those of this process, on the device; where the batch has fewer images than there are processes,
                any image, of which nothing is learned then.
            targets: theirs, on the CPU.
            batch_size: images of all processes.

        Raises:
            ValueError: bad images or targets.
        """
        learns = self.processes.rank < batch_size
        share = learns * len(images) / batch_size
        if not isinstance(self.model, FasterRCNN):
            weight = learns * self.processes.count / batch_size
            return self._step(self._list_losses(images, targets, weight), share)
        batch, padded, _ = self.model.preprocess(images, targets)
        assert padded is not None
        if self._graphed is not None and self._graphed.holds(batch, padded):
            return self._graphed.replay(batch.images, batch.sizes, padded, batch.scales)
        total = None
        if self.processes.count > 1:
            batch = batch._replace(images=self._pad_alike(batch.images, self.model.settings.size_buckets))
            total = partial(self.processes.divisors, learns)
        losses = batch_losses(
            self._module, batch, padded, amp=self.amp, accumulate=self.settings.accumulate, total=total
        )
        return self._step(losses, share)

    def _pad_alike(self, images: Tensor, buckets: Sequence[Size]) -> Tensor:
        """A part of a batch, padded as the whole batch is: what is beside an image reaches its features."""
        height, width = self.processes.largest(images.shape[-2:])
        height, width = smallest_bucket(buckets, (height, width)) or (height, width)
        return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))

    def _combine(self, share: float, losses: Tensor, statistics: list[Tensor]) -> None:
        """The losses of the whole batch, in place of this process's, and the running statistics, to which each process
        contributes by its share of the images."""
        losses /= self.processes.count
        for statistic in statistics:
            statistic *= share
        self.processes.add_up([losses, *statistics])

    def _step(self, losses: Sequence[Callable[[], Mapping[str, Tensor]]], share: float) -> Tensor:
        """`share` of the images of the batch is learned from in this process."""
        ddp: Any = self._module
        return training_step(
            self.model,
            self.optimizer,
            self.loss_scale,
            losses,
            amp=self.amp,
            clip_norm=self.settings.clip_norm,
            no_sync=ddp.no_sync if self.processes.count > 1 else nullcontext,
            combine=partial(self._combine, share) if self.processes.count > 1 else None,
        )

    def _list_losses(
        self, images: Sequence[Tensor], targets: Sequence[Target], weight: float
    ) -> list[Callable[[], Mapping[str, Tensor]]]:
        """The parts of a step of a model that is not ours: its losses are taken to be means over images, each of which
        has this weight."""
        size = -(-len(images) // self.settings.accumulate)

        def losses(start: int) -> Mapping[str, Tensor]:
            part = images[start : start + size]
            with autocast(part[0].device, self.amp):
                found: Mapping[str, Tensor] = self._module(part, targets[start : start + size])
            return {name: value * (weight * len(part)) for name, value in found.items()}

        return [partial(losses, start) for start in range(0, len(images), size)]


def choose_graphs(
    model: nn.Module, dataset: Dataset[Item], settings: TrainSettings, processes: Processes = ALONE
) -> GraphPlan | None:
    """What is captured of a run: on a GPU the steps of a detector, in one process, unless the settings forbid it, or
    torch is to take deterministic algorithms, some of which are host syncs."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    allowed = settings.graphs and not torch.are_deterministic_algorithms_enabled()
    if isinstance(model, FasterRCNN) and on_gpu and allowed and processes.count == 1:
        return plan_graphs(model.settings, settings, dataset)
    return None


def describe_steps(
    model: nn.Module, settings: TrainSettings, graphs: GraphPlan | None = None, processes: Processes = ALONE
) -> str:
    """How the steps of a run are taken, for people; `graphs` is what is captured."""
    device = next(model.parameters()).device
    precision = str(amp_dtype(settings, device) or torch.float32).removeprefix("torch.")
    words = [f"on {device.type}", precision]
    if processes.count > 1:
        words.append(f"{processes.count} processes" + (", without CUDA graphs" if device.type == "cuda" else ""))
    elif graphs:
        shapes = ", ".join(f"{height} x {width}" for *_, height, width in graphs.shapes)
        words.append(f"each one CUDA graph, of images padded to {shapes}")
    if settings.accumulate > 1:
        words.append(f"in {settings.accumulate} parts")
    trains = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
    if trains and (processes.count > 1 or settings.accumulate > 1):
        words.append(f"BatchNorm by the images of each {'part' if settings.accumulate > 1 else 'process'}")
    if settings.workers:
        words.append(f"{settings.workers} workers load images" + (" for each" if processes.count > 1 else ""))
    return ", ".join(words)
