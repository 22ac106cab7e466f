"""Curves from the trainer's file."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdet.visualize import curves, plot_losses

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


def test_one_row_is_enough(tmp_path: Path) -> None:
    plot_losses(write_metrics(tmp_path / "m.csv", rows_of(1)), tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 1000


def test_later_rows_of_a_step_count_and_a_torn_row_does_not(tmp_path: Path) -> None:
    rows = rows_of(4)
    repeated: list[object] = [0, 2, 0.02, 9, 8, 7, 6, 5, 1]
    path = write_metrics(tmp_path / "m.csv", [*rows[1:], repeated, rows[0]])
    with path.open("a") as file:
        file.write("0,5,0.02,1.")
    steps, losses = curves._read_losses(path)
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
