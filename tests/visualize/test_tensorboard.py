"""Event files, as TensorBoard itself reads them."""

import math
import sys
from pathlib import Path

import pytest

from fastdet.visualize import require_tensorboard, write_events


def row_of(step: int, loss: float) -> dict[str, float]:
    return {"epoch": 1, "step": step, "loss": loss, "lr": 0.02}


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar, as TensorBoard shows them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def _tensorboard() -> None:
    pytest.importorskip("tensorboard")


@pytest.mark.usefixtures("_tensorboard")
def test_each_value_is_a_scalar_of_its_step(tmp_path):
    with write_events(tmp_path / "run") as add:
        for step in range(200):
            add("train", row_of(step, step / 2))
        # Before the file is closed, as after a kill.
        assert read(tmp_path / "run")["train/loss"] == [(step, step / 2) for step in range(200)]
        add("validation", {"epoch": 1, "step": 20, "AP": 0.25, "AP50": math.nan})
    found = read(tmp_path / "run")
    assert found.keys() == {"train/loss", "train/lr", "validation/AP", "validation/AP50"}
    assert found["validation/AP"] == [(20, 0.25)]
    assert math.isnan(found["validation/AP50"][0][1])


@pytest.mark.usefixtures("_tensorboard")
def test_a_resumed_run_repeats_no_step_and_a_new_one_starts_anew(tmp_path):
    with write_events(tmp_path) as add:
        for step in (10, 20, 30):
            add("train", row_of(step, 100.0 - step))
        add("validation", {"step": 20, "AP": 0.5})
        add("validation", {"step": 30, "AP": 0.75})
    with write_events(tmp_path, first_step=21) as add:
        add("train", row_of(25, 5.0))
    found = read(tmp_path)
    assert found["train/loss"] == [(10, 90.0), (20, 80.0), (25, 5.0)]
    assert found["validation/AP"] == [(20, 0.5)]
    with write_events(tmp_path) as add:
        add("train", row_of(10, 1.0))
    assert read(tmp_path) == {"train/loss": [(10, 1.0)], "train/lr": [(10, pytest.approx(0.02))]}


def test_without_the_package_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install tensorboard"):
        require_tensorboard()
    with pytest.raises(ImportError, match="pip install"), write_events(tmp_path):
        pass
