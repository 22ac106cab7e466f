"""How benchmarks measure: two contenders in turn in one process, medians, and one table at the end."""

import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Row:
    """One line of the table; times are medians in milliseconds, `ratio` is torchvision's over ours."""

    op: str
    size: str
    dtype: str
    device: str
    ours_ms: float
    torchvision_ms: float
    ratio: float


_ROWS: list[Row] = []


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.fixture
def versus(benchmark: Any) -> Callable[..., None]:
    """`versus(ours, theirs, op=, size=, dtype=, rounds=)` times both in turn: theirs runs before each round of ours."""

    def measure(
        ours: Callable[[], object],
        theirs: Callable[[], object],
        *,
        op: str,
        size: str,
        dtype: str = "float32",
        rounds: int = 10,
    ) -> None:
        theirs_seconds: list[float] = []
        for call in (ours, theirs):
            _timed(call)
        benchmark.group = op
        benchmark.pedantic(
            lambda: _timed(ours), setup=lambda: theirs_seconds.append(_timed(theirs)), rounds=rounds, iterations=1
        )
        ours_ms, theirs_ms = benchmark.stats.stats.median * 1e3, statistics.median(theirs_seconds) * 1e3
        row = Row(op, size, dtype, device_name(), ours_ms, theirs_ms, theirs_ms / ours_ms)
        benchmark.extra_info.update(asdict(row))
        _ROWS.append(row)

    return measure


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _ROWS:
        return
    terminalreporter.section(f"beside torchvision, on {device_name()}")
    line = "{:<24} {:<40} {:<9} {:>12} {:>14} {:>8}"
    terminalreporter.write_line(line.format("op", "size", "dtype", "ours, ms", "torchvision", "ratio"))
    for row in _ROWS:
        times = f"{row.ours_ms:.3f}", f"{row.torchvision_ms:.3f}", f"{row.ratio:.2f}"
        terminalreporter.write_line(line.format(row.op, row.size, row.dtype, *times))
    path = config.getoption("--bench-csv")
    if path:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [column.name for column in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in _ROWS)
