"""`fastdet compare`, on folders as training leaves them."""

import argparse
import json
from pathlib import Path

import pytest
from PIL import Image

from fastdet.cli import compare
from fastdet.cli.values import UserError
from fastdet.engine.run.folder import COLUMNS, VALIDATION_COLUMNS, to_csv


def write_run(folder: Path, lr: float, losses: list[float], precisions: list[float]) -> Path:
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"lr": lr, "epochs": len(losses)}))
    rows = [{**dict.fromkeys(COLUMNS, 0.0), "epoch": k, "step": k, "loss": x} for k, x in enumerate(losses, 1)]
    (folder / "metrics.csv").write_bytes(to_csv(rows, header=True))
    if precisions:
        rows = [dict(zip(VALIDATION_COLUMNS, (k, k, *[x] * 8), strict=True)) for k, x in enumerate(precisions, 1)]
        (folder / "validation.csv").write_bytes(to_csv(rows, VALIDATION_COLUMNS, header=True))
    return folder


def run(out: Path | None, *folders: Path) -> None:
    compare.run(argparse.Namespace(runs=list(folders), out=out))


def test_the_curves_are_drawn_where_there_is_a_folder(tmp_path, capsys):
    first = write_run(tmp_path / "first", 0.1, [3.0, 2.0], [0.1, 0.3])
    second = write_run(tmp_path / "second", 0.2, [2.5], [])
    run(None, first, second)
    table = capsys.readouterr().out
    assert [line.split() for line in table.splitlines()][1] == ["lr", "0.1", "0.2"]
    assert not list(tmp_path.glob("**/*.png"))
    run(tmp_path / "out", first, second)
    assert capsys.readouterr().out == f"{table}curves: {tmp_path / 'out/compare.png'}\n"
    with Image.open(tmp_path / "out/compare.png") as picture:
        assert picture.width == 1300


def test_runs_without_rows_have_no_curves(tmp_path):
    folder = write_run(tmp_path / "run", 0.1, [], [])
    with pytest.raises(UserError, match="no run has losses"):
        run(tmp_path, folder)
    assert not list(tmp_path.glob("*.png"))
