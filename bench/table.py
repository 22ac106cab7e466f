"""The table of results: one row for each comparison, as text for the terminal and as CSV."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """Percentiles of times."""

    p20: float
    p50: float
    p80: float


def spread(times: Sequence[float]) -> Spread:
    return Spread(*np.quantile(times, (0.2, 0.5, 0.8)).tolist())


@dataclass(frozen=True)
class Row:
    """One comparison, times in milliseconds.

    `ratio` is torchvision's median over ours. `graphed_ms` is our median inside a CUDA graph, None where that was not
    measured. `times_floor` is the graphed median over the floor, or ours where there is no graphed one.
    """

    op: str
    size: str
    dtype: str
    device: str
    ours_p20_ms: float
    ours_p50_ms: float
    ours_p80_ms: float
    torchvision_p20_ms: float
    torchvision_p50_ms: float
    torchvision_p80_ms: float
    ratio: float
    graphed_ms: float | None
    floor_ms: float | None
    times_floor: float | None


def compared(
    op: str,
    size: str,
    dtype: str,
    device: str,
    ours: Spread,
    theirs: Spread,
    graphed_ms: float | None = None,
    floor_ms: float | None = None,
) -> Row:
    times_floor = None if floor_ms is None else (ours.p50 if graphed_ms is None else graphed_ms) / floor_ms
    ratio = theirs.p50 / ours.p50
    return Row(op, size, dtype, device, *ours, *theirs, ratio, graphed_ms, floor_ms, times_floor)


def write(path: str | Path, rows: Iterable[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows under a head, columns aligned; "-" where there is no value."""
    head = ("op", "size", "dtype", "ours, ms", "torchvision", "ratio", "graphed", "floor", "times the floor")
    cells = [
        (
            row.op,
            row.size,
            row.dtype,
            f"{row.ours_p50_ms:.3f}",
            f"{row.torchvision_p50_ms:.3f}",
            f"{row.ratio:.2f}",
            _or_dash(row.graphed_ms, ".4f"),
            _or_dash(row.floor_ms, ".4f"),
            _or_dash(row.times_floor, ".1f"),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return ["  ".join(_aligned(line, widths)) for line in (head, *cells)]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [f"{cell:{'<' if i < 3 else '>'}{width}}" for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
