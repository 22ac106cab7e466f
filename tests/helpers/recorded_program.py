"""A stand-in for a CUDA graph on the CPU: the operators of one call, run again on the tensors of that call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastdet.graphs.capture import Program, StaticStep
from fastdet.preserve import preserve_rng, preserve_tensors
from tests.helpers.host_sync import RefuseHostSync


class Recorder(TorchDispatchMode):
    """The operators that are called, but for views, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if all(each.alias_info is None or each.alias_info.is_write for each in func._schema.returns):
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Run them again; each result goes where it was. Nothing of an earlier run is left, as graphs share memory."""
        for func, _, _, result in self.calls:
            for tensor in _made_by(func, result):
                tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for tensor, value in zip(_made_by(func, result), _made_by(func, again), strict=True):
                tensor.copy_(value)


def _made_by(func: Any, result: Any) -> list[Tensor]:
    """The tensors of a result; none where it is the arguments, written to."""
    if any(each.alias_info for each in func._schema.returns):
        return []
    return [tensor.detach() for tensor in pytree.tree_leaves(result) if isinstance(tensor, Tensor)]


def record_program(step: StaticStep) -> Program:
    """In the place of `fastdet.graphs.capture.eager_program`: as `capture_program`, of a recording.

    What the step depends on and Python computes, such as a learning rate that is a number, stays as it was then.
    """
    with preserve_rng(step.inputs[0].device), preserve_tensors(step.changed):
        step.function(*step.inputs)
    with preserve_rng(step.inputs[0].device), preserve_tensors(step.changed), RefuseHostSync(), Recorder() as recorder:
        output = step.function(*step.inputs)

    @torch.no_grad()
    def run() -> Any:
        recorder.replay()
        return output

    return Program(step.inputs, run, 0, recorder.calls.clear)
