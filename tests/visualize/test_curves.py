"""Curves from the trainer's files."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdet.visualize import curves, plot_average_precision, plot_comparison, plot_losses

LOSSES = ["loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
COLUMNS = ["epoch", "step", "lr", *LOSSES, "images_per_second"]


def write_metrics(path: Path, rows: list[list[object]], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def rows_of(count: int) -> list[list[object]]:
    return [
        [k // 10, k, 0.02, 4 / (k + 1), 1 / (k + 1), 1 / (k + 1), 1 / (k + 1), 1 / (k + 1), 9.5] for k in range(count)
    ]


def test_plot_losses(tmp_path: Path) -> None:
    pyplot = "matplotlib.pyplot" in sys.modules
    path = write_metrics(tmp_path / "metrics.csv", rows_of(60))
    plot_losses(path, tmp_path / "losses.png")
    picture = Image.open(tmp_path / "losses.png").convert("RGB")
    assert picture.width > 1000
    assert len(picture.getcolors(1 << 24)) > 50  # type: ignore[arg-type]
    first = picture.tobytes()
    plot_losses(write_metrics(path, rows_of(30)), tmp_path / "losses.png")
    assert Image.open(tmp_path / "losses.png").convert("RGB").tobytes() != first
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def has_color(png: Path, color: str) -> bool:
    """Whether some pixels are of this color, as #rrggbb."""
    pixels = np.asarray(Image.open(png).convert("RGB"))
    return int((pixels == tuple(bytes.fromhex(color[1:]))).all(axis=2).sum()) > 5


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    figures, make = list[Any](), curves._figure
    monkeypatch.setattr(curves, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    return figures


def test_one_row_is_enough(tmp_path: Path, drawn: list[Any]) -> None:
    plot_losses(write_metrics(tmp_path / "m.csv", rows_of(1)), tmp_path / "m.png")
    dots = [line.get_label() for axes in drawn[0].axes for line in axes.lines if line.get_marker() == "o"]
    assert dots == [name for name, _ in curves._LOSSES.values()]


def lines_of(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of each line, by its name."""
    return {line.get_label(): list(zip(*map(np.ndarray.tolist, line.get_data()), strict=True)) for line in axes.lines}


def evaluations_of(values: list[float]) -> list[list[object]]:
    return [[epoch, 10 * epoch, value, value + 0.1, value + 0.2] for epoch, value in enumerate(values, start=1)]


def test_plot_average_precision(tmp_path: Path, drawn: list[Any]) -> None:
    columns = ["epoch", "step", "AP", "AP50", "AP75"]
    path = write_metrics(tmp_path / "validation.csv", evaluations_of([0.25, np.nan, 0.5]), columns)
    plot_average_precision(path, tmp_path / "ap.png")
    (axes,) = drawn[0].axes
    points = list(lines_of(axes).values())
    assert points[0] == [(1, 0.25), (3, 0.5)]
    np.testing.assert_allclose(points[1], [(1, 0.35), (3, 0.6)])
    np.testing.assert_allclose(points[2], [(1, 0.45), (3, 0.7)])
    assert all(has_color(tmp_path / "ap.png", color) for _, color in curves._PRECISIONS.values())


def test_the_loss_of_evaluations_is_drawn_beside_that_of_training(tmp_path: Path, drawn: list[Any]) -> None:
    losses = write_metrics(tmp_path / "m.csv", rows_of(30))
    path, columns = tmp_path / "validation.csv", ["epoch", "step", "val_loss"]
    for values in (None, [2.5, np.nan, 1.5], [np.nan]):
        if values is not None:
            write_metrics(path, [[k, 10 * k, value] for k, value in enumerate(values, start=1)], columns)
        plot_losses(losses, tmp_path / "m.png", path)
    without, with_values, only_nan = (lines_of(figure.axes[0]) for figure in drawn)
    assert with_values["validation"] == [(10, 2.5), (30, 1.5)]
    assert "validation" not in {*without, *only_nan}
    assert [text.get_text() for text in drawn[1].axes[0].get_legend().get_texts()] == ["training", "validation"]


def test_of_one_epoch_the_axis_has_one_tick_and_without_values_there_is_a_note(
    tmp_path: Path, drawn: list[Any]
) -> None:
    columns = ["epoch", "step", "AP", "AP50", "AP75"]
    for values in ([0.25], [np.nan]):
        path = write_metrics(tmp_path / "validation.csv", evaluations_of(values), columns)
        plot_average_precision(path, tmp_path / "ap.png")
    (one,), (none,) = drawn[0].axes, drawn[1].axes
    low, high = one.get_xlim()
    assert [tick for tick in one.get_xticks() if low <= tick <= high] == [1]
    assert [text.get_text() for text in none.texts] == ["no values"]
    assert not one.texts


def test_runs_are_compared_in_one_picture(tmp_path: Path, drawn: list[Any]) -> None:
    losses = {"_a": [{"step": k, "loss": 2.0} for k in (10, 20)], "b $\\x$": [{"step": 10, "loss": 1.0}], "none": []}
    found = {"b $\\x$": [{"epoch": 1, "AP": 0.25, "AP50": 0.5, "AP75": 0.125}]}
    plot_comparison(losses, found, tmp_path / "c.png")
    panels = {axes.get_title(loc="left"): lines_of(axes) for axes in drawn[0].axes}
    assert list(panels) == ["Total loss, running mean", "AP", "AP50", "AP75"]
    assert panels["Total loss, running mean"] == {" _a": [(10, 2.0), (20, 2.0)], " b $\\x$": [(10, 1.0)], " none": []}
    assert [panels[name][" b $\\x$"] for name in ("AP", "AP50", "AP75")] == [[(1, 0.25)], [(1, 0.5)], [(1, 0.125)]]
    (legend,) = drawn[0].legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_a", "b $\\x$", "none"]
    plot_comparison(losses, {"b $\\x$": []}, tmp_path / "c.png")
    assert len(drawn[1].axes) == 1
    with pytest.raises(ValueError, match="no run has losses or evaluations"):
        plot_comparison({"a": []}, {"a": []}, tmp_path / "c.png")


def test_many_runs_and_long_names_differ_in_their_lines_and_ends(tmp_path: Path, drawn: list[Any]) -> None:
    names = [f"{'long/' * 30}{k}" for k in range(25)]
    plot_comparison({name: [{"step": 1, "loss": 1.0}] for name in names}, {}, tmp_path / "c.png")
    (axes,) = drawn[0].axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 25
    labels = [line.get_label().strip() for line in axes.lines]
    assert len(set(labels)) == 25
    assert {len(label) for label in labels} == {70}


def test_later_rows_of_a_step_count_and_a_torn_row_does_not(tmp_path: Path) -> None:
    rows = rows_of(4)
    repeated: list[object] = [0, 2, 0.02, 9, 8, 7, 6, 5, 1]
    path = write_metrics(tmp_path / "m.csv", [*rows[1:], repeated, rows[0]])
    with path.open("a") as file:
        file.write("0,5,0.02,1.")
    steps, losses = curves._read_columns(path, "step", curves._LOSSES)
    assert steps.tolist() == [0, 1, 2, 3]
    assert losses["loss"].tolist() == [4, 2, 9, 1]
    assert losses["loss_rpn_box_reg"].tolist() == [1, 0.5, 5, 0.25]


def test_what_is_wrong_with_a_metrics_file(tmp_path: Path) -> None:
    path = write_metrics(
        tmp_path / "m.csv", [[1] * 7], [name for name in COLUMNS if name not in ("step", "loss_box_reg")]
    )
    with pytest.raises(ValueError, match=r"m\.csv: no column step, loss_box_reg"):
        plot_losses(path, tmp_path / "m.png")
    with pytest.raises(ValueError, match="no rows"):
        plot_losses(write_metrics(path, []), tmp_path / "m.png")
    bad = rows_of(3)
    bad[1][3] = "high"
    with pytest.raises(ValueError, match=r"m\.csv, row 3"):
        plot_losses(write_metrics(path, bad), tmp_path / "m.png")


def test_the_running_mean() -> None:
    values = np.array([1.0, 2.0, 6.0, np.nan, 8.0])
    np.testing.assert_allclose(curves._smooth(values), [1.5, 3, 4, 7, 8])
    np.testing.assert_allclose(curves._smooth(np.full(1000, 3.0)), 3)
    assert np.isnan(curves._smooth(np.full(3, np.nan))).all()
    noisy = np.random.default_rng(0).normal(0, 1, 1000)
    assert curves._smooth(noisy).std() < 0.25
