"""`fastdet compare`: the settings in which runs differ, how well each did, and the curves of all."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdet.cli.values import UserError, raise_user_errors
from fastdet.engine.run.folder import COLUMNS, VALIDATION_COLUMNS, Row, read_rows
from fastdet.safe_files import printable, replace_file
from fastdet.visualize import plot_comparison
from fastdet.weights.files import one_line

# What differs between any two runs.
_OF_A_RUN = ("arguments",)


def run(options: argparse.Namespace) -> None:
    """Print the table of `options.runs`, and draw their curves where there is a folder for it, `options.out`."""
    print("\n".join(map(printable, describe(options.runs))))
    if options.out:
        print(f"curves: {printable(draw(options.runs, options.out))}")


def draw(folders: Sequence[Path], out: Path) -> Path:
    """Write `compare.png`, the curves of the losses and of the average precision of all runs, into a folder.

    Raises:
        UserError: there is nothing to draw yet.
    """
    names, picture = list(map(str, folders)), io.BytesIO()
    steps, evaluations = (dict(zip(names, rows, strict=True)) for rows in _read_rows(folders))
    with raise_user_errors(", ".join(names)):
        plot_comparison(steps, evaluations, picture)
    path = out / "compare.png"
    replace_file(path, lambda file: file.write(picture.getvalue()))
    return path


def describe(folders: Sequence[Path]) -> list[str]:
    """Lines of a table with a column for each run.

    Raises:
        UserError: a folder has no run.
    """
    settings = [_flatten(_read_settings(folder)) for folder in folders]
    names = dict.fromkeys(name for each in settings for name in each if name.split(".")[0] not in _OF_A_RUN)
    differing = [name for name in names if len({json.dumps(each.get(name)) for each in settings}) > 1]
    rows = [("run", [str(folder) for folder in folders])]
    rows += [(name, [_show(each.get(name)) for each in settings]) for name in differing]
    rows += _summarize(folders)
    widths = [max(len(row[0]) for row in rows), *(max(len(row[1][k]) for row in rows) for k in range(len(folders)))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip((name, *cells), widths, strict=True)).rstrip()
        for name, cells in rows
    ]


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the settings of a run: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the settings of a run")
    return content


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by names with dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _read_rows(folders: Sequence[Path]) -> tuple[list[list[Row]], list[list[Row]]]:
    """The rows of the losses and of the evaluations of each run; none where there is no file."""
    files = ("metrics.csv", COLUMNS), ("validation.csv", VALIDATION_COLUMNS)
    steps, evaluations = ([read_rows(folder / name, 1 << 60, columns) for folder in folders] for name, columns in files)
    return steps, evaluations


def _summarize(folders: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """The last loss, the best evaluation and the speed of each run."""
    steps, evaluations = _read_rows(folders)
    best = [max(rows, key=lambda row: row["AP"], default=None) for rows in evaluations]

    def cells(rows: Sequence[Row | None], name: str, digits: int) -> list[str]:
        return ["-" if row is None else f"{row[name]:.{digits}f}" for row in rows]

    last = [rows[-1] if rows else None for rows in steps]
    return [
        ("epochs done", cells(last, "epoch", 0)),
        ("last loss", cells(last, "loss", 4)),
        ("best AP", cells(best, "AP", 4)),
        ("AP50 then", cells(best, "AP50", 4)),
        ("of epoch", cells(best, "epoch", 0)),
        ("images/s", cells(last, "images_per_second", 1)),
    ]
