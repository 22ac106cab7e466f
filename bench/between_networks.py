"""The part of a training step that lies between the networks: all but the backbone, the box head and their update."""

import time
from typing import Any

from torch import Tensor, nn

from bench.costs import Step


class Stopwatch:
    """Seconds that a layer takes forward and backward, on a CPU, where every call is synchronous.

    The backward pass of a layer whose input takes no gradient ends when `end` is called.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.seconds = 0.0
        self._since: float | None = None
        layer.register_forward_pre_hook(self._before)
        layer.register_forward_hook(self._after)

    def begin(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def end(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        # Its gradient is the last that the layer's backward pass gives.
        if isinstance(args[0], Tensor) and args[0].requires_grad:
            args[0].register_hook(lambda gradient: self.end())
        self.begin()

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.end()
        # The layer's backward pass begins with it.
        output.register_hook(lambda gradient: self.begin())


class TimerOutsideNetworks:
    """Called, it takes a training step on the CPU and gives the milliseconds outside of the networks."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._watches = [Stopwatch(layer) for layer in (step.model.backbone, step.model.roi_heads.box_head)]
        self._end = 0.0
        step.optimizer.register_step_pre_hook(self._before_update)

    def __call__(self) -> float:
        for watch in self._watches:
            watch.seconds = 0.0
        start = time.perf_counter()
        self._step.run()
        return (self._end - start - sum(watch.seconds for watch in self._watches)) * 1e3

    def _before_update(self, *_: Any) -> None:
        # Images take no gradient: the backbone's backward pass ends with the loss's.
        self._watches[0].end()
        self._end = time.perf_counter()
