"""Clocks for a CPU and a GPU, calls in turn, and a process that keeps a core busy meanwhile."""

import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from bench.costs import Call

Clock = Callable[[Call], float]  # milliseconds of one call

# A call on the CPU is repeated until it takes so long, so that the clock's resolution and its own cost do not matter.
SHORTEST_MS = 2.0
# Seconds for the rounds of one comparison, of which there are at least three.
LONGEST_S = 4.0

# Ends with the process that started it, however that ends.
_SPIN = """
import os, sys
parent = int(sys.argv[1])
print("busy", flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


class Times(NamedTuple):
    """Milliseconds of a call in each round, and those of CPU time, of all threads of the process."""

    wall_ms: list[float]
    cpu_ms: list[float]


def cpu_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def gpu_clock() -> Clock:
    """A clock of the GPU's own time with nothing of the call's data in its cache.

    Writing 512 MiB empties the cache, and a few times over it keeps the GPU busy for as long as the host needs to
    launch a call of some tens of kernels, so that what is timed is not the host.
    """
    scratch = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")

    def milliseconds(call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(4):
            scratch.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return milliseconds


def capture_replay(call: Call) -> Call | None:
    """The replay of `call` as one CUDA graph, None (and a warning) where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        # A capture that failed may leave its own stream the current one.
        torch.cuda.set_stream(torch.cuda.default_stream())
        warnings.warn(f"not captured: {error}", stacklevel=2)
        return None
    return graph.replay


def count_repeats(once_ms: float) -> int:
    """How often a call of so many milliseconds is made in one round."""
    return max(1, math.ceil(SHORTEST_MS / max(once_ms, 1e-3)))


def count_rounds(round_ms: float, most: int) -> int:
    """How many rounds of so many milliseconds fit into `LONGEST_S`: at least 3, at most `most`."""
    return max(3, min(most, int(LONGEST_S * 1e3 / max(round_ms, 1e-3))))


def timed(call: Call, clock: Clock, repeats: int) -> tuple[float, float]:
    """(milliseconds, milliseconds of CPU time) of a call, the mean of `repeats`."""

    def repeated() -> None:
        for _ in range(repeats):
            call()

    before = time.process_time()
    wall_ms = clock(call if repeats == 1 else repeated)
    return wall_ms / repeats, (time.process_time() - before) * 1e3 / repeats


def add_round(calls: Sequence[Call], times: Sequence[Times], clock: Clock, repeats: int) -> None:
    """Time each call once, one after another, into the `times` of each."""
    for call, each in zip(calls, times, strict=True):
        wall_ms, cpu_ms = timed(call, clock, repeats)
        each.wall_ms.append(wall_ms)
        each.cpu_ms.append(cpu_ms)


@contextmanager
def busy_neighbor() -> Iterator[int]:
    """A second process that computes without a pause, as a loader's worker would; yields its process id."""
    process = subprocess.Popen([sys.executable, "-c", _SPIN, str(os.getpid())], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.communicate()
