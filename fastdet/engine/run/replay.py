"""The step of a run at which a loss or gradient was not finite, taken again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from fastdet.data import Item
from fastdet.engine.epoch import NotFiniteError, train_epoch
from fastdet.engine.loading import AugmentedDataset, EpochPlans, load_batches, sizes_of
from fastdet.engine.recipes import TrainSettings
from fastdet.engine.run.progress import show_progress
from fastdet.engine.run.state import RunState
from fastdet.engine.step import Stepper


def replay(
    state: RunState, dataset: Dataset[Item], augmented: AugmentedDataset, settings: TrainSettings, step: int
) -> list[str]:
    """Go on from a run's `last.pth` up to a step, and watch what every layer gives in that step. No file is written.

    Args:
        state: with the model of the run as it was built; it is changed.
        dataset: of the run.
        augmented: the same with the run's augmentation.
        settings: of the run.
        step: counted from 1, in the epoch after the checkpoint.

    Returns:
        Lines: the losses of the steps before and of this, the first layer that gives a value that is not finite, and
        the parameters with such gradients.

    Raises:
        CheckpointError: `last.pth` cannot be read, or is not of this run.
        ValueError: the step is not in the epoch after the checkpoint.
    """
    state.restore()
    length: int = len(dataset)  # type: ignore[arg-type]
    epochs = range(state.epoch, state.epoch + 1)
    plans = EpochPlans(length, settings, epochs, state.step, sizes_of(dataset))
    first, last = state.epoch * plans.steps + state.step + 1, (state.epoch + 1) * plans.steps
    if not first <= step <= last:
        raise ValueError(f"step {step} is not in {first}..{last}, the steps after the checkpoint")
    model, lines = state.model, list[str]()
    stepper = Stepper(model, state.optimizer, settings, state.loss_scale)
    batches = load_batches(augmented, plans, 0, settings.seed + state.epoch, next(model.parameters()).device)
    with show_progress(length, state.step * settings.batch_size, True) as bar:
        bar.set_description("replay")
        # It reads the losses after each step, so that the next call takes one step.
        rows = train_epoch(stepper, dataset, batches, plans, state.epoch, bar, lambda: True, state.average)
        for before in range(first, step):
            lines.append(f"step {before}: loss {next(rows)['loss']:.6g}")
        with _watch(model) as (not_finite, wrong):
            try:
                lines.append(f"step {step}: loss {next(rows)['loss']:.6g}, all finite this time")
            except NotFiniteError as error:
                lines.append(str(error))
    if not_finite:
        lines.append(f"the first layer that gives values that are not finite: {not_finite[0]}")
    if wrong:
        lines.append(f"parameters with gradients that are not finite: {len(wrong)}, such as {', '.join(wrong[:3])}")
    return lines


@contextmanager
def _watch(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """The names of the layers, in the order of their calls, of which an output is not finite, and of the parameters
    with such gradients."""
    found, wrong = list[str](), list[str]()

    def inspect(name: str, output: Any) -> None:
        tensors = output if isinstance(output, (tuple, list)) else [output]
        if any(isinstance(x, Tensor) and x.is_floating_point() and not bool(x.isfinite().all()) for x in tensors):
            found.append(name)

    def inspect_gradient(name: str, gradient: Tensor) -> None:
        if not bool(gradient.isfinite().all()):
            wrong.append(name)

    layers = [(name, layer) for name, layer in model.named_modules() if not any(True for _ in layer.children())]
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: inspect(name, output)) for name, layer in layers
    ]
    handles += [
        parameter.register_hook(partial(inspect_gradient, name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield found, wrong
    finally:
        for handle in handles:
            handle.remove()
