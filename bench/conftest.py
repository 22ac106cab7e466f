"""How benchmarks measure: two implementations in turn, percentiles, roofline, and one table at the end."""

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bench import report, roofline
from bench.costs import Call, Cost

Clock = Callable[[Call], float]  # milliseconds of one call

_ROWS: list[report.Row] = []


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def rates(device: torch.device) -> roofline.Device | None:
    """The rates that floors are computed from, None on a GPU whose rates are unknown."""
    return roofline.DEVICES.get(device_name()) if device.type == "cuda" else roofline.this_cpu()


@pytest.fixture(scope="session")
def clock(device: torch.device) -> Clock:
    return gpu_clock() if device.type == "cuda" else cpu_clock


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


if importlib.util.find_spec("pytest_benchmark") is None:

    class _PlainBenchmark:
        """The part of pytest-benchmark's fixture that is used here, where it is not installed."""

        def __init__(self) -> None:
            self.group = ""
            self.extra_info: dict[str, Any] = {}

        def pedantic(self, function: Call, *, setup: Call, rounds: int, iterations: int) -> None:
            for _ in range(rounds * iterations):
                setup()
                function()

    @pytest.fixture
    def benchmark() -> _PlainBenchmark:
        return _PlainBenchmark()


@pytest.fixture
def compare(benchmark: Any, clock: Clock, rates: roofline.Device | None) -> Callable[..., None]:
    """`compare(ours, theirs, op=, size=, ...)` times both in turn: theirs runs before each round of ours.

    `floor` are the phases of the work (see roofline.py), left out where none is known. With `graph` a GPU times ours in
    a CUDA graph as well: for calls without a host sync. `rounds` is 50 on a GPU and 10 elsewhere if left out.
    `clock` takes the place of the usual one. `images` of a whole step, and the `costs` of ours and theirs, go into the
    table.
    """
    cuda = torch.cuda.is_available()

    def measure(
        ours: Call,
        theirs: Call,
        *,
        op: str,
        size: str,
        dtype: str = "float32",
        rounds: int | None = None,
        floor: Sequence[roofline.Work] = (),
        graph: bool = False,
        clock: Clock = clock,
        images: int | None = None,
        costs: tuple[Cost, Cost] | None = None,
    ) -> None:
        rounds = rounds or (50 if cuda else 10)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(3 if cuda else 1):
            theirs()
            ours()
        benchmark.group = op
        benchmark.pedantic(
            lambda: times["ours"].append(clock(ours)),
            setup=lambda: times["theirs"].append(clock(theirs)),
            rounds=rounds,
            iterations=1,
        )
        replay = capture_replay(ours) if graph and cuda else None
        graphed_ms = None if replay is None else report.spread([clock(replay) for _ in range(rounds)]).p50
        floor_us = roofline.floor_us(rates, floor) if rates and floor else None
        row = report.make_row(
            op,
            size,
            dtype,
            device_name(),
            report.spread(times["ours"]),
            report.spread(times["theirs"]),
            graphed_ms,
            None if floor_us is None else floor_us / 1e3,
            images,
            costs,
        )
        benchmark.extra_info.update(vars(row))
        _ROWS.append(row)

    return measure


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _ROWS:
        return
    terminalreporter.section(f"beside torchvision, on {device_name()}")
    for line in report.lines(_ROWS):
        terminalreporter.write_line(line)
    steps = [row for row in _ROWS if row.images_per_s is not None]
    if steps:
        terminalreporter.section("whole steps, ours / torchvision's")
        for line in report.step_lines(steps):
            terminalreporter.write_line(line)
    path = config.getoption("--bench-csv")
    if path:
        report.write(path, _ROWS)
