"""Draw a table of results: how much faster than torchvision each row is, and how far above its floor.

python -m bench.plot bench/results/NAME.csv docs/benchmarks.png
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

_FASTER, _SLOWER, _FLOOR = "#2a7f62", "#b5523b", "#4a6fa5"


class Result(NamedTuple):
    """The part of a row of the table that is drawn; see `report.Row`."""

    op: str
    size: str
    dtype: str
    device: str
    ratio: float
    times_floor: float | None


def read(path: Path) -> list[Result]:
    """The rows of a CSV; one without floors has no such column or leaves it empty."""
    with path.open(newline="") as file:
        return [
            Result(
                *(line[name] for name in ("op", "size", "dtype", "device")),
                ratio=float(line["ratio"]),
                times_floor=float(line["times_floor"]) if line.get("times_floor") else None,
            )
            for line in csv.DictReader(file)
        ]


def label(row: Result) -> str:
    """The operation, its size and its dtype; fp32 and the integers of the sampler are left out."""
    return f"{row.op}: {row.size}" + (f", {row.dtype}" if "16" in row.dtype else "")


def draw(results: list[Result], path: Path) -> None:
    """Write a PNG: bars of the ratio to torchvision, and where there are floors how many times the floor."""
    with_floors = any(row.times_floor is not None for row in results)
    widths = [3, 2] if with_floors else [1]
    figure, panels = pyplot.subplots(
        1,
        len(widths),
        figsize=(14 if with_floors else 11, 1.6 + 0.27 * len(results)),
        sharey=True,
        squeeze=False,
        width_ratios=widths,
        layout="constrained",
    )
    panels[0, 0].set_ylim(-0.8, len(results) - 0.2)
    figure.suptitle(f"fastdet beside torchvision, on {results[0].device}", fontsize=14)
    ratios = [row.ratio for row in results]
    colors = [_FASTER if ratio >= 1 else _SLOWER for ratio in ratios]
    _bars(panels[0, 0], ratios, colors, "torchvision's time / ours: right of the line is faster")
    panels[0, 0].set_yticks(range(len(results)), [label(row) for row in results], fontsize=9)
    panels[0, 0].invert_yaxis()
    if with_floors:
        _bars(
            panels[0, 1], [row.times_floor for row in results], _FLOOR, "times the floor: at the line is the roofline"
        )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(axes: Axes, values: Sequence[float | None], color: str | list[str], title: str) -> None:
    """Horizontal bars from 1 on a log axis, each with its value; a row of None stays empty."""
    known = [value for value in values if value is not None]
    axes.set_xscale("log")
    # Space beside the longest bars for their values.
    axes.set_xlim(min([*known, 0.8]) / 1.8, max([*known, 1.25]) * 1.8)
    axes.axvline(1, color="black", linewidth=1)
    # A logarithm has no bar from 0: each starts at 1.
    axes.barh(range(len(values)), [(value or 1.0) - 1 for value in values], left=1, color=color, height=0.7)
    for place, value in enumerate(values):
        shown = "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
        left = value is not None and value < 1
        axes.annotate(
            shown,
            (value or 1.0, place),
            xytext=(-4 if left else 4, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=8,
        )
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a table of results as a PNG.")
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path)
    options = parser.parse_args(arguments)
    draw(read(options.csv), options.png)


if __name__ == "__main__":
    main()
