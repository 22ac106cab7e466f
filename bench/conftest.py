"""How benchmarks measure: calls in turn, percentiles, roofline, and one table at the end."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from bench import report, roofline, timing
from bench.costs import Call, Cost
from bench.timing import Clock, Times

_ROWS: list[report.Row] = []


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


@pytest.fixture(scope="session", autouse=True)
def _machine(pytestconfig: pytest.Config) -> Iterator[None]:
    """The number of threads, and the neighbor, that the command line wants."""
    threads = pytestconfig.getoption("--threads")
    if threads is not None:
        torch.set_num_threads(threads)
    with timing.busy_neighbor() if pytestconfig.getoption("--busy") else nullcontext():
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def rates(device: torch.device) -> roofline.Device | None:
    """The rates that floors are computed from, None on a GPU whose rates are unknown."""
    return roofline.DEVICES.get(device_name()) if device.type == "cuda" else roofline.this_cpu()


@pytest.fixture(scope="session")
def device_clock(device: torch.device) -> Clock:
    return timing.gpu_clock() if device.type == "cuda" else timing.cpu_clock


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
def take_turns(benchmark: Any, device_clock: Clock) -> Callable[..., list[Times]]:
    """`take_turns(calls, rounds=, clock=)` times calls one after another, in rounds; short ones several times a round.

    `rounds` is 50 on a GPU if left out, and elsewhere 10 or as many as `timing.LONGEST_S` allows; `clock` the device's.
    """
    cuda = torch.cuda.is_available()

    def run(calls: Sequence[Call], *, rounds: int | None = None, clock: Clock | None = None) -> list[Times]:
        for _ in range(3 if cuda else 1):
            once = [timing.cpu_clock(call) for call in calls]
        repeats = 1
        if clock is None and not cuda:
            if sum(once) < timing.SHORTEST_MS * 100:
                # The first call of all may have been slow.
                once = [timing.cpu_clock(call) for call in calls]
            repeats = timing.count_repeats(min(once))
            rounds = rounds or timing.count_rounds(repeats * sum(once), 10)
        times = [Times([], []) for _ in calls]
        turns = lambda part: timing.add_round(calls[part], times[part], clock or device_clock, repeats)  # noqa: E731
        benchmark.pedantic(
            lambda: turns(slice(-1, None)), setup=lambda: turns(slice(-1)), rounds=rounds or 50, iterations=1
        )
        return times

    return run


@pytest.fixture
def record(benchmark: Any, pytestconfig: pytest.Config) -> Callable[..., None]:
    """`record(op, size, dtype, ours, theirs, ...)` adds a row to the table and to the file; see `report.make_row`."""

    def add(op: str, size: str, dtype: str, ours: Times, theirs: Times, **more: Any) -> None:
        busy, path = bool(pytestconfig.getoption("--busy")), pytestconfig.getoption("--bench-csv")
        row = report.make_row(op, size, dtype, device_name(), ours, theirs, busy=busy, **more)
        benchmark.group = op
        benchmark.extra_info.update(vars(row))
        _ROWS.append(row)
        if path:
            # At once, so that what interrupts a later benchmark loses no row.
            report.update(path, [row])

    return add


@pytest.fixture
def compare(
    take_turns: Callable[..., list[Times]],
    record: Callable[..., None],
    device_clock: Clock,
    rates: roofline.Device | None,
) -> Callable[..., None]:
    """`compare(ours, theirs, op=, size=, ...)` times both in turn: theirs runs before each round of ours.

    `floor` are the phases of the work (see roofline.py), left out where none is known. With `graph` a GPU times ours in
    a CUDA graph as well: for calls without a host sync. `rounds` and `clock` are those of `take_turns`. `num_boxes`,
    where the size grows, and of a whole step its `images` and the `costs` of ours and theirs go into the table.
    """

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
        clock: Clock | None = None,
        num_boxes: int | None = None,
        images: int | None = None,
        costs: tuple[Cost, Cost] | None = None,
    ) -> None:
        their_times, our_times = take_turns([theirs, ours], rounds=rounds, clock=clock)
        replay = timing.capture_replay(ours) if graph and torch.cuda.is_available() else None
        count = len(our_times.wall_ms)
        graphed_ms = None if replay is None else report.spread([device_clock(replay) for _ in range(count)]).p50
        floor_us = roofline.floor_us(rates, floor) if rates and floor else None
        record(
            op,
            size,
            dtype,
            our_times,
            their_times,
            graphed_ms=graphed_ms,
            floor_ms=None if floor_us is None else floor_us / 1e3,
            num_boxes=num_boxes,
            images=images,
            costs=costs,
        )

    return measure


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _ROWS:
        return
    neighbor = ", with a busy neighbor" if config.getoption("--busy") else ""
    terminalreporter.section(f"beside torchvision, on {device_name()}{neighbor}")
    for line in report.lines(_ROWS):
        terminalreporter.write_line(line)
    steps = [row for row in _ROWS if row.images_per_s is not None]
    if steps:
        terminalreporter.section("whole steps, ours / torchvision's")
        for line in report.step_lines(steps):
            terminalreporter.write_line(line)
