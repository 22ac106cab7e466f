"""Curves of the losses."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import BinaryIO

import numpy as np

# The columns of a metrics file, with the name and the color of their curves.
_LOSSES = {
    "loss": ("total", "#222222"),
    "loss_classifier": ("box classes", "#d1495b"),
    "loss_box_reg": ("box deltas", "#2e86ab"),
    "loss_objectness": ("proposal scores", "#edae49"),
    "loss_rpn_box_reg": ("proposal deltas", "#3b8a5a"),
}


def plot_losses(csv_path: str | Path, png: str | Path | BinaryIO) -> None:
    """Draw the losses in a trainer's metrics file against the step: the total, and its four parts.

    Faint lines are the file's values, strong ones their running mean. Where a step comes twice, as after a resumed
    run, the later row counts; a last row that was cut short is left out.

    Args:
        csv_path: a CSV file with the columns step, loss, loss_classifier, loss_box_reg, loss_objectness and
            loss_rpn_box_reg; others are ignored.
        png: the image to write, or an open file.

    Raises:
        ValueError: a column is missing, a value is not a number, or there is no row.
    """
    from matplotlib.figure import Figure

    steps, losses = _read_losses(Path(csv_path))
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    total, parts = figure.subplots(1, 2, sharex=True)
    for column, (name, color) in _LOSSES.items():
        axes = total if column == "loss" else parts
        axes.plot(steps, losses[column], color=color, alpha=0.22, linewidth=0.8)
        axes.plot(steps, _smooth(losses[column]), color=color, linewidth=1.8, label=name)
    for axes, title in ((total, "Total loss"), (parts, "Its four parts")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    parts.legend(frameon=False)
    figure.savefig(png, format="png")


def _read_losses(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in ("step", *_LOSSES) if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}")
        lines = list(reader)
    if lines and any(value is None for value in lines[-1].values()):
        lines.pop()
    rows: dict[int, list[float]] = {}
    for number, line in enumerate(lines, start=2):
        try:
            rows[int(line["step"])] = [float(line[name]) for name in _LOSSES]
        except (TypeError, ValueError):
            raise ValueError(f"{path}, row {number}: not a row of numbers") from None
    if not rows:
        raise ValueError(f"{path}: no rows yet")
    steps = sorted(rows)
    table = np.array([rows[step] for step in steps], dtype=np.float64)
    return np.array(steps), dict(zip(_LOSSES, table.T, strict=True))


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a centered window of about a twentieth of the values, shorter at the ends; NaN is skipped."""
    half, finite = max(1, len(values) // 40), np.isfinite(values)
    window, inside = np.ones(2 * half + 1), slice(half, half + len(values))
    sums, counts = (np.convolve(x, window)[inside] for x in (np.where(finite, values, 0.0), finite))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
