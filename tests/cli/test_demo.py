import json
from dataclasses import replace

import pytest

from fastdet.cli import demo
from fastdet.cli.main import main
from fastdet.data import Shapes
from fastdet.engine import checkpoint


@pytest.fixture
def short(monkeypatch):
    """The demo with a handful of pictures: what it does, not how well."""
    monkeypatch.setattr(demo, "TRAIN_IMAGES", 8)
    monkeypatch.setattr(demo, "TEST_IMAGES", 4)
    monkeypatch.setattr(demo, "SETTINGS", replace(demo.SETTINGS, epochs=1, batch_size=4))


@pytest.mark.usefixtures("short")
def test_the_demo_saves_what_detect_loads(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        ".lock",
        "detections.png",
        "last.pth",
        "loss.png",
        "metrics.csv",
        "result.json",
        "settings.json",
    }
    output = capsys.readouterr().out
    assert all(name in output for name in (*Shapes.class_names, "AP50", "minutes"))
    assert json.loads((out / "result.json").read_text())["images"] == 4
    assert checkpoint.load_model(out / "last.pth")[1] == Shapes.class_names
    arguments = ["detect", str(out / "detections.png"), "--weights", str(out / "last.pth"), "--out", str(tmp_path)]
    assert main(arguments) == 0


@pytest.mark.usefixtures("short")
def test_the_demo_repeats_and_can_be_run_again(tmp_path):
    first, second = (demo.run(tmp_path / "demo", progress=False) for _ in range(2))
    for expected, found in zip(first.predictions, second.predictions, strict=True):
        assert expected["scores"].tolist() == found["scores"].tolist()


def test_it_is_tested_on_images_that_it_was_not_trained_on():
    train, test = demo.load_data()
    assert train.seed != test.seed
    assert (len(train), len(test)) == (demo.TRAIN_IMAGES, demo.TEST_IMAGES)
