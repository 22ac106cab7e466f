"""Work that leaves tensors, generators and modes as they were before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def preserve_tensors(tensors: Sequence[Tensor]) -> Iterator[None]:
    """The tensors hold afterwards what they hold now, where they are now."""
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)


@contextmanager
def preserve_rng(device: torch.device) -> Iterator[None]:
    """Torch's generators of the host and of `device` go on afterwards from where they are now."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def preserve_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode, and afterwards each module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before
