"""Curves of the losses and of the average precision."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastdet.safe_files import printable

# The columns of a metrics file, with the name and the color of their curves.
_LOSSES = {
    "loss": ("total", "#222222"),
    "loss_classifier": ("box classes", "#d1495b"),
    "loss_box_reg": ("box deltas", "#2e86ab"),
    "loss_objectness": ("proposal scores", "#edae49"),
    "loss_rpn_box_reg": ("proposal deltas", "#3b8a5a"),
}
# Those of a file of evaluations.
_PRECISIONS = {
    "AP": ("AP, the mean of IoU .50 to .95", "#222222"),
    "AP50": ("AP50", "#2e86ab"),
    "AP75": ("AP75", "#d1495b"),
}
_VALIDATION = "#d1495b"
# Up to so many values each has a dot.
_DOTS = 25
# In characters.
_LONGEST_NAME, _LEGEND_WIDTH = 70, 140
# After so many of matplotlib's own colors, lines are dashed.
_COLORS = 10


def plot_losses(csv_path: str | Path, png: str | Path | BinaryIO, validation: str | Path | None = None) -> None:
    """Draw the losses in a trainer's metrics file against the step: the total, and its four parts.

    Faint lines are the file's values, strong ones their running mean. Where a step comes twice, as after a resumed
    run, the later row counts; a last row that was cut short is left out.

    Args:
        csv_path: a CSV file with the columns step, loss, loss_classifier, loss_box_reg, loss_objectness and
            loss_rpn_box_reg; others are ignored.
        png: the image to write, or an open file.
        validation: a file of evaluations with the columns step and val_loss, whose total is drawn too, if it is there.

    Raises:
        ValueError: a column is missing, a value is not a number, or there is no row.
    """
    steps, losses = _read_columns(Path(csv_path), "step", _LOSSES)
    figure = _figure(10, 4.2)
    total, parts = figure.subplots(1, 2, sharex=True)
    for column, (name, color) in _LOSSES.items():
        _draw_smoothed(total if column == "loss" else parts, steps, losses[column], color, name)
    if validation is not None and Path(validation).exists():
        steps, evaluated = _read_columns(Path(validation), "step", ["val_loss"])
        if np.isfinite(evaluated["val_loss"]).any():
            _draw(total, steps, evaluated["val_loss"], _VALIDATION, "validation", "--")
            total.lines[1].set_label("training")
            total.legend(frameon=False)
    _finish(total, "Total loss", "step")
    _finish(parts, "Its four parts", "step")
    parts.legend(frameon=False)
    figure.savefig(png, format="png")


def plot_average_precision(csv_path: str | Path, png: str | Path | BinaryIO) -> None:
    """Draw the average precision in a trainer's file of evaluations against the epoch.

    Args:
        csv_path: a CSV file with the columns epoch, AP, AP50 and AP75; others are ignored. NaN has no dot. Rows as of
            `plot_losses`.
        png: the image to write, or an open file.

    Raises:
        ValueError: as of `plot_losses`.
    """
    epochs, values = _read_columns(Path(csv_path), "epoch", _PRECISIONS)
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for column, (name, color) in _PRECISIONS.items():
        _draw(axes, epochs, values[column], color, name)
    _finish(axes, "Average precision", "epoch")
    # Below the curves, which may be anywhere.
    figure.legend(frameon=False, loc="outside lower center", ncols=len(_PRECISIONS))
    figure.savefig(png, format="png")


def plot_comparison(
    losses: Mapping[str, Sequence[Mapping[str, float]]],
    evaluations: Mapping[str, Sequence[Mapping[str, float]]],
    png: str | Path | BinaryIO,
) -> None:
    """Draw the curves of several runs in one image: the total loss, AP, AP50 and AP75.

    Args:
        losses: for the name of each run its rows, with "step" and "loss"; there may be none.
        evaluations: likewise, with "epoch", "AP", "AP50" and "AP75".
        png: the image to write, or an open file.

    Raises:
        ValueError: no run has a row.
    """
    if not any([*losses.values(), *evaluations.values()]):
        raise ValueError("no run has losses or evaluations yet")
    names = list(dict.fromkeys([*losses, *evaluations]))
    # Matplotlib leaves names that begin with an underscore out of a legend.
    labels = [f" {_shorten(name)}" for name in names]
    columns = max(1, min(4, _LEGEND_WIDTH // (max(map(len, labels)) + 8)))
    panels = [("loss", "step", "Total loss, running mean", losses)] if any(losses.values()) else []
    if any(evaluations.values()):
        panels += [(column, "epoch", column, evaluations) for column in _PRECISIONS]
    rows = -(-len(panels) // 2)
    figure = _figure(10, 3.7 * rows + 0.22 * -(-len(names) // columns))
    for place, (column, key, title, tables) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, min(len(panels), 2), place)
        for k, (name, label) in enumerate(zip(names, labels, strict=True)):
            x, y = (np.array([row[field] for row in tables.get(name, ())], dtype=np.float64) for field in (key, column))
            color, style = f"C{k % _COLORS}", ("-", "--", ":", "-.")[k // _COLORS % 4]
            _draw(axes, x, _smooth(y) if column == "loss" else y, color, label, style)
        _finish(axes, title, key)
    legend = figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(png, format="png")


def _figure(width: float, height: float) -> Any:
    """A figure of so many inches, without pyplot, which would keep it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _draw(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str, style: str = "-") -> None:
    """A line through the finite values; a few have dots, without which a single one would not show."""
    finite = np.isfinite(y)
    marker = "o" if finite.sum() <= _DOTS else None
    axes.plot(x[finite], y[finite], style, color=color, linewidth=1.8, marker=marker, markersize=4, label=label)


def _draw_smoothed(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str) -> None:
    """Faint values, and their running mean."""
    axes.plot(x, y, color=color, alpha=0.22, linewidth=0.8)
    _draw(axes, x, _smooth(y), color, label)


def _finish(axes: Any, title: str, xlabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if not any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
        axes.set_xticks(())
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color="#777777")


def _shorten(name: str) -> str:
    """The end of a long name, as of a path."""
    shown = printable(name)
    return shown if len(shown) <= _LONGEST_NAME else f"...{shown[3 - _LONGEST_NAME :]}"


def _read_columns(path: Path, key: str, columns: Iterable[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The sorted whole numbers of a column of a CSV file, and the values of others there."""
    names = list(columns)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in (key, *names) if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}")
        lines = list(reader)
    if lines and any(value is None for value in lines[-1].values()):
        lines.pop()
    rows: dict[int, list[float]] = {}
    for number, line in enumerate(lines, start=2):
        try:
            rows[int(line[key])] = [float(line[name]) for name in names]
        except (TypeError, ValueError):
            raise ValueError(f"{path}, row {number}: not a row of numbers") from None
    if not rows:
        raise ValueError(f"{path}: no rows yet")
    keys = sorted(rows)
    table = np.array([rows[each] for each in keys], dtype=np.float64)
    return np.array(keys), dict(zip(names, table.T, strict=True))


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a centered window of about a twentieth of the values, shorter at the ends; NaN is skipped."""
    if not len(values):
        return values
    half, finite = max(1, len(values) // 40), np.isfinite(values)
    window, inside = np.ones(2 * half + 1), slice(half, half + len(values))
    sums, counts = (np.convolve(x, window)[inside] for x in (np.where(finite, values, 0.0), finite))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
