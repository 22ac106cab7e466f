"""Draw a table of results: how much faster than torchvision each row is, and how the time grows with the boxes.

    python -m bench.plot bench/results/NAME.csv FOLDER

writes benchmarks.png, and growth.png where calls were measured with several numbers of boxes.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from bench import report
from bench.report import Row
from bench.tables import FAMILIES, usual_condition, with_dtype

_FASTER, _SLOWER, _FLOOR = "#2a7f62", "#b5523b", "#4a6fa5"
_LINES = ("solid", "dashed", "dotted", "dashdot")
_COLUMNS = 4


def draw_ratios(results: Sequence[Row], path: Path) -> None:
    """Write a PNG: bars of the ratio to torchvision, and where there are floors how many times the floor.

    Rows of one kind of operation stand together.
    """
    families = list(FAMILIES.values())
    results = sorted(results, key=lambda row: [re.fullmatch(family, row.op) is None for family in families])
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
    figure.suptitle(f"fastdet beside torchvision, on {results[0].condition}", fontsize=14)
    ratios = [row.ratio for row in results]
    colors = [_FASTER if ratio >= 1 else _SLOWER for ratio in ratios]
    _bars(panels[0, 0], ratios, colors, "torchvision's time / ours: right of the line is faster")
    panels[0, 0].set_yticks(range(len(results)), [f"{row.op}: {with_dtype(row)}" for row in results], fontsize=9)
    panels[0, 0].invert_yaxis()
    if with_floors:
        _bars(
            panels[0, 1], [row.times_floor for row in results], _FLOOR, "times the floor: at the line is the roofline"
        )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_growth(results: Sequence[Row], path: Path) -> None:
    """Write a PNG: milliseconds by the number of boxes, ours and torchvision's, a panel for each call.

    Each condition (threads, a busy neighbor) has a kind of line of its own.
    """
    calls = list(dict.fromkeys((row.op, row.size) for row in results))
    styles = dict(zip(dict.fromkeys(row.condition for row in results), _LINES, strict=False))
    rows = -(-len(calls) // _COLUMNS)
    figure, panels = pyplot.subplots(
        rows, _COLUMNS, figsize=(14, 0.8 + 2.8 * rows), squeeze=False, layout="constrained"
    )
    for axes, call in zip(panels.flat, calls, strict=False):
        for condition, style in styles.items():
            points = [row for row in results if (row.op, row.size, row.condition) == (*call, condition)]
            points.sort(key=lambda row: row.num_boxes or 0)
            counts = [row.num_boxes for row in points]
            theirs, ours = [row.torchvision_p50_ms for row in points], [row.ours_p50_ms for row in points]
            axes.loglog(counts, theirs, color=_SLOWER, linestyle=style, label=f"torchvision, {condition}")
            axes.loglog(counts, ours, color=_FASTER, linestyle=style, marker=".", label=f"fastdet, {condition}")
        axes.set_title("\n".join(call), fontsize=8)
        axes.grid(alpha=0.3)
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            # Within a decade there would be no number but one.
            shown = "235" if high < 10 * low else ""
            axis.set_minor_formatter(
                matplotlib.ticker.FuncFormatter(
                    lambda value, _, shown=shown: f"{value:g}" if f"{value:e}"[0] in shown else ""
                )
            )
    for axes in panels.flat[len(calls) :]:
        axes.set_visible(False)
    figure.supxlabel("boxes")
    figure.supylabel("milliseconds")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2 * len(styles), fontsize=8
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _bars(axes: Axes, values: Sequence[float | None], color: str | list[str], title: str) -> None:
    """Horizontal bars from 1 on a log axis, each with its value; a row of None stays empty."""
    known = [value for value in values if value is not None]
    axes.set_xscale("log")
    # Space beside the longest bars for their values.
    low, high = min([*known, 0.8]), max([*known, 1.25])
    space = max((high / low) ** 0.15, 1.5)
    axes.set_xlim(low / space, high * space)
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
    parser = argparse.ArgumentParser(description="Draw a table of results as PNGs.")
    parser.add_argument("csv", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    rows = report.read(options.csv)
    growing = [row for row in rows if row.num_boxes is not None]
    usual = usual_condition(rows)
    draw_ratios(
        [row for row in rows if row not in growing and row.condition == usual], options.folder / "benchmarks.png"
    )
    if growing:
        draw_growth(growing, options.folder / "growth.png")


if __name__ == "__main__":
    main()
