"""Context managers that restore tensors, generators and modes on exit, also after an exception."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def preserve_tensors(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the values of the tensors in place, so that their addresses stay."""
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)


@contextmanager
def preserve_rng(device: torch.device) -> Iterator[None]:
    """Restore torch's generators of the host and of `device`."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def preserve_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model into training or evaluation mode; restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
