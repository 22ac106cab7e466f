"""The table of results: one row for each comparison, as text for the terminal and as CSV."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.costs import Cost


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
    measured. `times_floor` is the graphed median over the floor, or ours where there is no graphed one. The rest is of
    whole steps, and None of operations; see `costs.Cost`.
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
    images_per_s: float | None = None
    torchvision_images_per_s: float | None = None
    peak_mib: float | None = None
    torchvision_peak_mib: float | None = None
    launches: int | None = None
    torchvision_launches: int | None = None
    host_syncs: int | None = None
    torchvision_host_syncs: int | None = None


def make_row(
    op: str,
    size: str,
    dtype: str,
    device: str,
    ours: Spread,
    theirs: Spread,
    graphed_ms: float | None = None,
    floor_ms: float | None = None,
    images: int | None = None,
    costs: tuple[Cost, Cost] | None = None,
) -> Row:
    """The row of two times; of whole steps with how many `images` they take, and the costs of ours and theirs."""
    times_floor = None if floor_ms is None else (ours.p50 if graphed_ms is None else graphed_ms) / floor_ms
    ratio = theirs.p50 / ours.p50
    rates = () if images is None else (images / ours.p50 * 1e3, images / theirs.p50 * 1e3)
    pairs = () if costs is None else tuple(value for pair in zip(*costs, strict=True) for value in pair)
    return Row(op, size, dtype, device, *ours, *theirs, ratio, graphed_ms, floor_ms, times_floor, *rates, *pairs)


def write(path: str | Path, rows: Iterable[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows under a head, columns aligned; "-" where there is no value."""
    head = ("op", "size", "dtype", "ours, ms", "torchvision", "ratio", "in a graph", "floor", "times the floor")
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
    return _align_columns([head, *cells])


def step_lines(rows: Sequence[Row]) -> list[str]:
    """What is measured of whole steps alone: ours / torchvision's in each column."""
    head = ("op", "size", "dtype", "images/s", "peak, MiB", "launches", "host syncs")
    cells = [
        (
            row.op,
            row.size,
            row.dtype,
            f"{_or_dash(row.images_per_s, '.1f')} / {_or_dash(row.torchvision_images_per_s, '.1f')}",
            f"{_or_dash(row.peak_mib, '.0f')} / {_or_dash(row.torchvision_peak_mib, '.0f')}",
            f"{_or_dash(row.launches, 'd')} / {_or_dash(row.torchvision_launches, 'd')}",
            f"{_or_dash(row.host_syncs, 'd')} / {_or_dash(row.torchvision_host_syncs, 'd')}",
        )
        for row in rows
    ]
    return _align_columns([head, *cells])


def _align_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(_pad_cells(line, widths)) for line in lines]


def _pad_cells(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [f"{cell:{'<' if i < 3 else '>'}{width}}" for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
