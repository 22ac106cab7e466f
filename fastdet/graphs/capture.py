"""How a function of static tensors becomes a CUDA graph, and how many graphs of a model are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdet.graphs.guards import CaptureGuard
from fastdet.graphs.static_inputs import BatchShapes, Shape, parse_buckets
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.preserve import preserve_rng, preserve_tensors

# Calls before a capture, in which kernels are compiled and libraries choose their algorithms.
WARM_UP_CALLS = 3

# Calls after a capture at which everything is compared with what was captured.
FULL_CHECKS = 3


class StaticStep(NamedTuple):
    """A function of tensors whose shapes and addresses stay; it is free of host syncs.

    changed: tensors that it changes in place; a capture restores them, and torch's generators, after the warm-up.
    """

    function: Callable[..., Any]
    inputs: Sequence[Tensor]
    changed: Sequence[Tensor]


class Program(NamedTuple):
    """A function bound to its static `inputs`: fill them, `run`, and read what it returns before the next run.

    nbytes: memory that `drop` gives back, after which the program must not run.
    """

    inputs: Sequence[Tensor]
    run: Callable[[], Any]
    nbytes: int
    drop: Callable[[], None]


class LRUCache:
    """Programs by key, made on first use; over `limit` bytes (None: no limit) the least recently used are dropped.

    The program that was just asked for is kept even if it is above the limit alone. Iterates over the keys, least
    recently used first.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        # In order of use: a dict keeps the order of insertion.
        self._programs: dict[Any, Program] = {}

    def get(self, key: Any, make: Callable[[Any], Program]) -> Program:
        """The program of the key, by `make(key)` if there is none yet."""
        program = self._programs.pop(key, None) or make(key)
        self._programs[key] = program
        while self._limit is not None and len(self._programs) > 1 and self.nbytes > self._limit:
            self._programs.pop(next(iter(self._programs))).drop()
        return program

    def __iter__(self) -> Iterator[Any]:
        return iter(self._programs)

    @property
    def nbytes(self) -> int:
        return sum(program.nbytes for program in self._programs.values())

    def clear(self) -> None:
        while self._programs:
            self._programs.popitem()[1].drop()


def eager_program(step: StaticStep) -> Program:
    """The program that calls the function each time."""
    return Program(step.inputs, lambda: step.function(*step.inputs), _nbytes(step.inputs), lambda: None)


def capture_program(step: StaticStep, stream: torch.cuda.Stream, pool: Any = None) -> Program:
    """The program that replays a CUDA graph of the function. The capture is a host sync.

    Args:
        stream: where to warm up and capture, the same for all graphs that share a pool.
        pool: memory that graphs share which never run at once; None: memory of the graph's own, given back by `drop`.
    """
    device = step.inputs[0].device
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    # A capture that fails leaves its own stream the current one.
    with preserve_rng(device), torch.cuda.stream(current):
        with torch.cuda.stream(stream), preserve_tensors(step.changed):
            for _ in range(WARM_UP_CALLS):
                step.function(*step.inputs)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on, such as one that pins the next batch: only this one's work is captured.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = step.function(*step.inputs)
    nbytes = torch.cuda.memory_reserved(device) - before + _nbytes(step.inputs)

    # Without the step, whose function refers to the graphs: memory in a cycle would stay until Python looks for these.
    results, changed = [output], step.changed
    del output

    def run() -> Any:
        graph.replay()
        # Operators count the changes of a tensor, a replay does not.
        torch.autograd.graph.increment_version(changed)
        return results[0]

    def drop() -> None:
        # It may be running.
        torch.cuda.synchronize(device)
        graph.reset()
        # The outputs lie in its memory too.
        results.clear()
        torch.cuda.empty_cache()

    return Program(step.inputs, run, nbytes, drop)


class GraphedModel:
    """What `GraphedTrainer` and `GraphedDetector` share: the programs of a model by bucket, and their guard."""

    # Attributes that a captured step depends on.
    _arguments: ClassVar[tuple[str, ...]] = ("model", "amp")

    def __init__(
        self,
        model: FasterRCNN,
        batch_shape: BatchShapes,
        amp: torch.dtype | None,
        memory_limit: int | None,
        check_every_step: bool,
        training: bool,
    ) -> None:
        if amp not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"amp must be None, torch.bfloat16 or torch.float16, got {amp!r}")
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"memory_limit must be a number of bytes above 0, or None, got {memory_limit}")
        self.model, self.amp, self.check_every_step, self._training = model, amp, check_every_step, training
        self._check_mode()
        self.device = next(model.parameters()).device
        self.buckets = parse_buckets(batch_shape, model.settings)
        self._programs = LRUCache(memory_limit)
        # Calls since the capture of each bucket.
        self._replays: dict[Shape, int] = {}
        self._guard: CaptureGuard | None = None
        self._captured_arguments: dict[str, Any] = {}
        # Graphs that share memory take as much as the largest; but then none of them can give any back.
        self._shares_memory = memory_limit is None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pool: Any = None

    @property
    def captured(self) -> tuple[Shape, ...]:
        """The buckets that are captured, least recently used first."""
        return tuple(self._programs)

    @property
    def nbytes(self) -> int:
        """Memory in bytes that the graphs and their static tensors keep."""
        return self._programs.nbytes

    def recapture(self) -> None:
        """Drop what was captured: the next call captures the model as it is then."""
        self._programs.clear()
        self._guard = None

    def _define_step(self, bucket: Shape) -> StaticStep:
        """The step of a bucket, of the model as it is now."""
        raise NotImplementedError

    def _create_guard(self) -> CaptureGuard:
        return CaptureGuard(self.model)

    def _program(self, bucket: Shape) -> Program:
        """The program of a bucket. Raises RuntimeError if what was captured depends on what was changed since."""
        self._check_mode()
        if torch.is_autocast_enabled(self.device.type):
            raise RuntimeError("inside torch.autocast the step would keep casts of weights: give amp=... instead")
        replays = self._replays[bucket] + 1 if bucket in self._programs else 0
        difference = None
        if self._guard is not None:
            changed = [name for name, value in self._captured_arguments.items() if getattr(self, name) is not value]
            full = self.check_every_step or replays <= FULL_CHECKS
            difference = f"its {changed[0]} was changed" if changed else self._guard.difference(full)
        if difference:
            name = type(self).__name__
            raise RuntimeError(f"since {name} captured its step, {difference}: undo that, or call its recapture()")
        # Static tensors of inference mode could not be filled outside it.
        with torch.inference_mode(False):
            program = self._programs.get(bucket, self._make_program)
        if self._guard is None:
            self._guard = self._create_guard()
            self._captured_arguments = {name: getattr(self, name) for name in self._arguments}
        self._replays[bucket] = replays
        return program

    def _make_program(self, bucket: Shape) -> Program:
        step = self._define_step(bucket)
        if self._stream is None:
            return eager_program(step)
        with torch.cuda.device(self.device):
            if self._shares_memory and not self.captured:
                # Memory whose last graph is gone takes no new ones.
                self._pool = torch.cuda.graph_pool_handle()
            return capture_program(step, self._stream, self._pool)

    def _check_mode(self) -> None:
        if self.model.training != self._training:
            mode, call = ("training", "train()") if self._training else ("evaluation", "eval()")
            raise ValueError(f"the model must be in {mode} mode: call model.{call} first")


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
