"""What a captured step depends on, and whether it was changed since the capture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from fastdet.models.faster_rcnn import FasterRCNN


class _Entry(NamedTuple):
    """A tensor and the dict that held it; with its address, as `.data` may be replaced inside a tensor."""

    name: str
    store: dict[Any, Any]
    key: Any
    tensor: Tensor
    requires_grad: bool
    address: int


class CaptureGuard:
    """Compares a model and an optimizer with what a graph was captured of, which the graph goes on using.

    `GraphedTrainer` lists what the full and the quick comparison detect. The quick one takes a few microseconds for a
    model of any size, the full one visits every layer and tensor. Neither is a host sync.
    """

    def __init__(self, model: FasterRCNN, optimizer: Optimizer | None = None) -> None:
        self._model, self._settings, self._compiled_step = model, model.settings, model.compiled_step
        # torch's own dicts, as its public iterators over them are five times slower.
        self._layers = [(name, layer, layer.training, dict(layer._modules)) for name, layer in model.named_modules()]
        stores = [
            (f"{name}." if name else "", store)
            for name, layer, _, _ in self._layers
            for store in (layer._parameters, layer._buffers)
        ]
        self._optimizer, self._groups, self._states = optimizer, [], []
        if optimizer is not None:
            # Of a group, the options that the optimizer reads: what a schedule keeps there does not matter to a step.
            self._groups = [
                (group, {key: group[key] for key in optimizer.defaults}, list(group["params"]))
                for group in optimizer.param_groups
            ]
            self._state, self._states = optimizer.state, list(optimizer.state.values())
            stores += [("optimizer.", store) for store in (*optimizer.param_groups, *self._states)]
        self._entries = [
            _Entry(f"{prefix}{key}", store, key, value, value.requires_grad, value.data_ptr())
            for prefix, store in stores
            for key, value in store.items()
            if isinstance(value, Tensor)
        ]
        self._first = [next(entry for entry in self._entries if isinstance(entry.tensor, nn.Parameter))]

    def difference(self, full: bool) -> str | None:
        """The first difference that the full or the quick comparison finds, in words; None if there is none."""
        if self._model.settings is not self._settings:
            return "the settings of the model were changed"
        if self._model.compiled_step is not self._compiled_step:
            return "the model was compiled"
        for name, layer, training, children in self._layers if full else ():
            if layer._modules != children:
                return f"a layer of {name or 'the model'} was replaced"
            if layer.training != training:
                return f"{name or 'the model'} was put into {'evaluation' if training else 'training'} mode"
        found = self._optimizer and self._optimizer_difference(self._optimizer, full)
        if found:
            return found
        for name, store, key, tensor, requires_grad, address in self._entries if full else self._first:
            if store.get(key) is not tensor or tensor.data_ptr() != address:
                return f"{name} was replaced"
            if tensor.requires_grad != requires_grad:
                return f"{name} was {'frozen' if requires_grad else 'unfrozen'}"
        return None

    def _optimizer_difference(self, optimizer: Optimizer, full: bool) -> str | None:
        if not _are_same(optimizer.param_groups, [group for group, _, _ in self._groups]):
            return "the groups of the optimizer were replaced (by load_state_dict?)"
        state = optimizer.state
        replaced = state is not self._state or len(state) != len(self._states)
        if replaced or (full and not _are_same(list(state.values()), self._states)):
            return "the state of the optimizer was replaced"
        for index, (group, options, parameters) in enumerate(self._groups):
            now = group["params"]
            if len(now) != len(parameters) or (full and not _are_same(now, parameters)):
                return f"the parameters of group {index} of the optimizer were changed"
            for key, value in options.items():
                # Tensors by identity: to compare their values would be a host sync.
                found = group.get(key)
                if found is not value and (isinstance(found, Tensor) or isinstance(value, Tensor) or found != value):
                    return f"{key} of group {index} of the optimizer was changed"
        return None


def _are_same(now: Sequence[object], then: Sequence[object]) -> bool:
    """Whether they hold the very same objects."""
    return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))
