"""How a function of static tensors becomes a CUDA graph, what such a graph has baked in, and how many are kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdet.graphs.static_inputs import Shape, sorted_buckets
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.preserve import preserve_rng, preserve_tensors

# Kernels are compiled, and libraries choose their algorithms, before a capture.
_WARM_UP = 3

_AMP = (None, torch.bfloat16, torch.float16)

Key = TypeVar("Key", bound=Hashable)


class Program(NamedTuple):
    """A function bound to its static `inputs`: fill them, `run`, and read what it returns before the next run.

    nbytes: memory that is given back by `drop`, after which it must not be run.
    """

    inputs: Sequence[Tensor]
    run: Callable[[], Any]
    nbytes: int
    drop: Callable[[], None]


class Recent(Generic[Key]):
    """Programs by key, made when they are asked for; over a limit those go that were not used for longest.

    limit: bytes of all together; None: no limit. The one asked for is kept even if it is larger alone.
    """

    def __init__(self, make: Callable[[Key], Program], limit: int | None = None) -> None:
        self._make, self._limit = make, limit
        # A dict keeps the order of insertion: the first is the one not used for longest.
        self._programs: dict[Key, Program] = {}

    def __getitem__(self, key: Key) -> Program:
        program = self._programs.pop(key, None) or self._make(key)
        self._programs[key] = program
        while self._limit is not None and len(self._programs) > 1 and self.nbytes > self._limit:
            self._programs.pop(next(iter(self._programs))).drop()
        return program

    def __iter__(self) -> Iterator[Key]:
        return iter(self._programs)

    @property
    def nbytes(self) -> int:
        return sum(program.nbytes for program in self._programs.values())

    def clear(self) -> None:
        while self._programs:
            self._programs.popitem()[1].drop()


def eager(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Program:
    """The program that calls the function each time."""
    return Program(inputs, lambda: function(*inputs), _nbytes(inputs), lambda: None)


def captured(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    changed: Sequence[Tensor],
    stream: torch.cuda.Stream,
    pool: Any = None,
) -> Program:
    """The program that replays a CUDA graph of the function; waits for the device.

    Args:
        function: takes `inputs`, of which shapes and device stay, and makes the host wait nowhere.
        changed: tensors that it changes in place; they are put back after the warm-up, as is torch's generator.
        stream: where to warm up and capture, the same for all that share a pool.
        pool: memory that graphs share which never run at once; None: memory of its own, given back when dropped.
    """
    device = inputs[0].device
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    # A capture that fails leaves its own stream the current one.
    with preserve_rng(device), torch.cuda.stream(current):
        with torch.cuda.stream(stream), preserve_tensors(changed):
            for _ in range(_WARM_UP):
                function(*inputs)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on, such as one that pins the next batch: only this one's work is captured.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = function(*inputs)
    nbytes = torch.cuda.memory_reserved(device) - before + _nbytes(inputs)

    results = [output]
    del output

    def run() -> Any:
        graph.replay()
        return results[0]

    def drop() -> None:
        # It may be running.
        torch.cuda.synchronize(device)
        graph.reset()
        # What it wrote lies in its memory too.
        results.clear()
        torch.cuda.empty_cache()

    return Program(inputs, run, nbytes, drop)


class _Layer(NamedTuple):
    name: str
    layer: nn.Module
    training: bool
    children: dict[str, Any]


class _Kept(NamedTuple):
    name: str
    store: dict[Any, Any]
    key: Any
    tensor: Tensor
    requires_grad: bool
    address: int


class _Group(NamedTuple):
    group: dict[str, Any]
    numbers: dict[str, Any]
    parameters: list[Tensor]


class Baked:
    """What a captured step will go on using, whatever becomes of the model: tensors by address, layers, settings."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        self._model, self._settings = model, getattr(model, "settings", None)
        self._compiled_step = getattr(model, "compiled_step", None)
        self._layers = [
            _Layer(name, layer, layer.training, dict(layer._modules)) for name, layer in model.named_modules()
        ]
        self._kept = [
            _Kept(f"{name}.{key}" if name else key, store, key, tensor, tensor.requires_grad, tensor.data_ptr())
            for name, layer in model.named_modules()
            for store in (layer._parameters, layer._buffers)
            for key, tensor in store.items()
            if tensor is not None
        ]
        self._groups: list[_Group] = []
        self._states: list[dict[str, Any]] = []
        if optimizer is not None:
            self._groups = [
                _Group(group, _numbers(optimizer, group), list(group["params"])) for group in optimizer.param_groups
            ]
            self._states = list(optimizer.state.values())
            self._kept += [
                _Kept(f"{key} of the optimizer", store, key, tensor, tensor.requires_grad, tensor.data_ptr())
                for store in (*optimizer.param_groups, *optimizer.state.values())
                for key, tensor in store.items()
                if isinstance(tensor, Tensor)
            ]
        self._optimizer = optimizer

    def difference(self) -> str | None:
        """The first thing that is not any more as it was, in words; None if all is. Does not wait for the device."""
        for name, layer, training, children in self._layers:
            if layer._modules != children:
                return f"a layer of {name or 'the model'} was replaced"
            if layer.training != training:
                return f"{name or 'the model'} was put into {'evaluation' if training else 'training'} mode"
        if self._optimizer is not None:
            if not _same(self._optimizer.param_groups, [group for group, _, _ in self._groups]):
                return "the groups of the optimizer were replaced (by load_state_dict?)"
            if not _same(list(self._optimizer.state.values()), self._states):
                return "the state of the optimizer was replaced"
            for index, (group, numbers, parameters) in enumerate(self._groups):
                if not _same(group["params"], parameters):
                    return f"the parameters of group {index} of the optimizer were changed"
                now = _numbers(self._optimizer, group)
                changed = [key for key, value in now.items() if numbers.get(key) != value]
                if changed:
                    return f"{changed[0]} of group {index} of the optimizer was changed"
        for name, store, key, tensor, requires_grad, address in self._kept:
            if store.get(key) is not tensor or tensor.data_ptr() != address:
                return f"{name} was replaced"
            if tensor.requires_grad != requires_grad:
                return f"{name} was {'frozen' if requires_grad else 'unfrozen'}"
        if getattr(self._model, "settings", None) is not self._settings:
            return "the settings of the model were changed"
        if getattr(self._model, "compiled_step", None) is not self._compiled_step:
            return "the model was compiled"
        return None


class Graphed:
    """What trainer and detector have in common: programs by bucket, and the check that nothing was changed since."""

    def __init__(
        self,
        model: FasterRCNN,
        batch_shape: Sequence[int] | Sequence[Sequence[int]],
        amp: torch.dtype | None,
        memory_limit: int | None,
        training: bool,
    ) -> None:
        if amp not in _AMP:
            raise ValueError(f"amp must be None, torch.bfloat16 or torch.float16, got {amp!r}")
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"memory_limit must be a number of bytes above 0, or None, got {memory_limit}")
        self.model, self.amp, self._training = model, amp, training
        self._check_mode()
        self.device = next(model.parameters()).device
        self.buckets = sorted_buckets(batch_shape, len(model.settings.image_mean), model.settings.size_divisible)
        self._programs: Recent[Shape] = Recent(self._make, memory_limit)
        self._baked: Baked | None = None
        # Graphs that share memory take as much as the largest; but then none of them can give any back.
        self._shares_memory = memory_limit is None
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)

    @property
    def captured(self) -> tuple[Shape, ...]:
        """The buckets that are ready, the one not used for longest first."""
        return tuple(self._programs)

    def recapture(self) -> None:
        """Forget what was captured: the next call captures the model as it is then."""
        self._programs.clear()
        self._baked = None

    def _check_mode(self) -> None:
        if self.model.training != self._training:
            mode, call = ("training", "train()") if self._training else ("evaluation", "eval()")
            raise ValueError(f"the model must be in {mode} mode: call model.{call} first")

    def _program(self, bucket: Shape) -> Program:
        self._check_mode()
        if torch.is_autocast_enabled(self.device.type):
            raise RuntimeError("inside torch.autocast the step would keep casts of weights: give amp=... instead")
        difference = None if self._baked is None else self._baked.difference()
        if difference is not None:
            name = type(self).__name__
            raise RuntimeError(f"since {name} captured its step, {difference}: undo that, or call its recapture()")
        # Static tensors of inference mode could not be filled outside it.
        with torch.inference_mode(False):
            if self._baked is None:
                self._prepare()
            program = self._programs[bucket]
        self._baked = self._baked or self._bake()
        return program

    def _build(self, step: Callable[..., Any], inputs: Sequence[Tensor], changed: Sequence[Tensor]) -> Program:
        if self._stream is None:
            return eager(step, inputs)
        with torch.cuda.device(self.device):
            if self._shares_memory and not self.captured:
                # Memory whose last graph is gone takes no new ones.
                self._pool = torch.cuda.graph_pool_handle()
            return captured(step, inputs, changed, self._stream, self._pool)

    def _prepare(self) -> None:
        """Get ready for the first capture of the model as it is now."""

    def _make(self, bucket: Shape) -> Program:
        raise NotImplementedError

    def _bake(self) -> Baked:
        raise NotImplementedError


def _same(now: Sequence[object], then: Sequence[object]) -> bool:
    """Whether they hold the very same things."""
    return len(now) == len(then) and all(one is other for one, other in zip(now, then, strict=True))


def _numbers(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a group that the optimizer reads; what schedules keep there does not matter to a step."""
    return {key: value for key, value in group.items() if key in optimizer.defaults and not isinstance(value, Tensor)}


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
