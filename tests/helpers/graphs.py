"""Small graphed trainers, what they change, and what they are given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdet import FasterRCNN
from fastdet.graphs import GraphedTrainer
from fastdet.graphs.batch_losses import padded_losses
from fastdet.structures import Batch, Targets
from tests.helpers.detectors import small_detector

# What the scene is padded to, and the rows that its ground truth is padded to: then all draws are the model's alone.
SHAPE, MAX_BOXES = (3, 3, 96, 88), 4
FIXED = {"size_buckets": (SHAPE[2:],)}
EMPTY = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 3


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    options = {"lr": torch.tensor(0.02), "momentum": 0.9, "weight_decay": 1e-3, "fused": True, **options}
    return torch.optim.SGD(model.parameters(), **options)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    options = {"lr": torch.tensor(1e-3), "fused": True, "capturable": True, **options}
    return torch.optim.AdamW(model.parameters(), **options)


def detector(**overrides: Any) -> FasterRCNN:
    return small_detector(**{**FIXED, **overrides}).train()


def trainer(
    model: FasterRCNN | None = None, make: Callable[..., Any] = sgd, shape: Any = SHAPE, **options: Any
) -> GraphedTrainer:
    model = detector() if model is None else model
    return GraphedTrainer(model, make(model), shape, options.pop("max_boxes", MAX_BOXES), **options)


def record_inputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Batch, Targets]]:
    """The static tensors of every eager step of a trainer that is captured from now on."""
    inputs = []

    def recorded(module: Any, batch: Batch, targets: Targets, divisors: Any, **options: Any) -> dict[str, Tensor]:
        inputs.append((batch, targets))
        return padded_losses(module, batch, targets, divisors, **options)

    monkeypatch.setattr("fastdet.graphs.batch_losses.padded_losses", recorded)
    return inputs


def clone_state(trainer: GraphedTrainer) -> list[Tensor]:
    """Clones of all that a step changes but the loss scale."""
    return [tensor.detach().clone() for tensor in changed_tensors(trainer)]


def changed_tensors(trainer: GraphedTrainer) -> list[Tensor]:
    state = [value for each in trainer.optimizer.state.values() for value in each.values()]
    return [*trainer.model.parameters(), *trainer.model.buffers(), *state]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def differ(found: list[Tensor], expected: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def crop_padding(model: FasterRCNN, images: Any, targets: Any) -> tuple[Any, ...]:
    """The arguments of `step_padded` of images on a canvas no larger than the largest of them."""
    batch, padded, _ = model.preprocess(images, targets)
    height, width = batch.sizes.amax(0).tolist()
    return batch.images[:, :, :height, :width], batch.sizes, padded, batch.scales
