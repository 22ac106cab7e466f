"""The table of results: one row for each comparison, as text for the terminal and as CSV."""

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from bench.costs import Cost
from bench.timing import Times


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
    measured. `times_floor` is the graphed median over the floor, or ours where there is no graphed one. From
    `images_per_s` to the host syncs the columns are of whole steps, and None of operations; see `costs.Cost`.
    `num_boxes` is given where the same call is measured with several numbers of boxes. `busy`: another process kept one
    core busy. The last two are medians of the CPU time of all threads.
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
    num_boxes: int | None = None
    busy: bool = False
    ours_cpu_ms: float | None = None
    torchvision_cpu_ms: float | None = None

    @property
    def described(self) -> str:
        """The size with the number of boxes."""
        if self.num_boxes is None:
            return self.size
        return f"{self.size}, {self.num_boxes} box{'es' if self.num_boxes > 1 else ''}"

    @property
    def condition(self) -> str:
        """What the row was measured on, and beside what."""
        return self.device + (", busy" if self.busy else "")

    @property
    def key(self) -> tuple[Any, ...]:
        """What distinguishes this row from all others of a table."""
        return self.op, self.size, self.num_boxes, self.dtype, self.device, self.busy


def make_row(
    op: str,
    size: str,
    dtype: str,
    device: str,
    ours: Times,
    theirs: Times,
    *,
    graphed_ms: float | None = None,
    floor_ms: float | None = None,
    num_boxes: int | None = None,
    busy: bool = False,
    images: int | None = None,
    costs: tuple[Cost, Cost] | None = None,
) -> Row:
    """The row of two calls; of whole steps with how many `images` they take, and the costs of ours and theirs."""
    our_ms, their_ms = spread(ours.wall_ms), spread(theirs.wall_ms)
    times_floor = None if floor_ms is None else (our_ms.p50 if graphed_ms is None else graphed_ms) / floor_ms
    rates = (None, None) if images is None else (images / our_ms.p50 * 1e3, images / their_ms.p50 * 1e3)
    pairs = (None,) * 6 if costs is None else tuple(value for pair in zip(*costs, strict=True) for value in pair)
    # What a GPU's work takes of the host is no measure of it.
    cpu_ms = [spread(times.cpu_ms).p50 if device.startswith("cpu") else None for times in (ours, theirs)]
    return Row(
        op,
        size,
        dtype,
        device,
        *our_ms,
        *their_ms,
        their_ms.p50 / our_ms.p50,
        graphed_ms,
        floor_ms,
        times_floor,
        *rates,
        *pairs,
        num_boxes,
        busy,
        *cpu_ms,
    )


def read(path: str | Path) -> list[Row]:
    """The rows of a CSV. A column that it lacks, or a cell that is empty, is None; without the column none is busy."""
    optional = {column.name: None for column in fields(Row) if type(None) in get_args(column.type)}
    with open(path, newline="") as file:
        return [Row(**optional | _convert_cells(line)) for line in csv.DictReader(file)]


def _convert_cells(line: dict[str, str]) -> dict[str, Any]:
    kinds = {column.name: (*get_args(column.type), column.type)[0] for column in fields(Row)}
    present = {name: cell for name, cell in line.items() if cell}
    return {name: cell == "True" if kinds[name] is bool else kinds[name](cell) for name, cell in present.items()}


def update(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows to a CSV: in the place of those that measured the same, or behind what it holds already."""
    before = read(path) if Path(path).exists() else []
    merged = {row.key: row for row in [*before, *rows]}
    part = Path(f"{path}.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in merged.values())
    # A process that is killed meanwhile leaves the file as it was.
    os.replace(part, path)


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows under a head, columns aligned; "-" where there is no value. CPU times are ours / torchvision's."""
    head = (
        "op",
        "size",
        "dtype",
        "ours, ms",
        "torchvision",
        "ratio",
        "CPU ms",
        "in a graph",
        "floor",
        "times the floor",
    )
    cells = [
        (
            row.op,
            row.described,
            row.dtype,
            f"{row.ours_p50_ms:.3f}",
            f"{row.torchvision_p50_ms:.3f}",
            f"{row.ratio:.2f}",
            f"{_or_dash(row.ours_cpu_ms, '.3f')} / {_or_dash(row.torchvision_cpu_ms, '.3f')}",
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
            row.described,
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
