"""`fastdet detect` on files and folders: pictures, and the same boxes as JSON."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastdet.cli import detect
from fastdet.cli.main import main
from fastdet.data import Shapes
from fastdet.engine import build_model, checkpoint
from tests.helpers.cli import message
from tests.helpers.weights import randomize_heads


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector with random weights, which finds something everywhere."""
    settings = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "box_detections_per_img": 5}
    architecture = {"backbone": "small", "num_classes": 5, "settings": settings}
    torch.manual_seed(0)
    model = build_model(architecture)
    randomize_heads(model)
    path = tmp_path_factory.mktemp("weights") / "last.pth"
    content = {"model": model.state_dict(), "architecture": architecture, "class_names": Shapes.class_names}
    checkpoint.save(path, content)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three images, and what is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("b.png", "a.JPG", "c.webp")):
        pixels = Shapes(3, size=64)[number][0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels[: 40 + 8 * number]).save(folder / name, format={"a.JPG": "JPEG"}.get(name))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def run(weights: Path, *arguments: object) -> int:
    return main(["detect", "--weights", str(weights), "--device", "cpu", "--score", "0", *map(str, arguments)])


def test_a_folder_gives_pictures_and_json(weights: Path, photos: Path, tmp_path: Path) -> None:
    found = tmp_path / "new/boxes.json"
    assert run(weights, photos, "--out", tmp_path / "drawn", "--json", found) == 0
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"a.png", "b.png", "c.png"}
    records = json.loads(found.read_text())
    assert [Path(record["file_name"]) for record in records] == [photos / name for name in ("a.JPG", "b.png", "c.webp")]
    model, class_names = checkpoint.load_model(weights)
    for record, expected in zip(records, detect.detect(model, [photos / "a.JPG", photos / "b.png"]), strict=False):
        assert [record["height"], record["width"]] == list(expected.image.shape[1:])
        assert len(record["boxes"]) == 5
        torch.testing.assert_close(torch.tensor(record["boxes"]), expected.boxes)
        torch.testing.assert_close(torch.tensor(record["scores"]), expected.scores)
        assert record["labels"] == expected.labels.tolist()
        assert record["class_names"] == [class_names[label - 1] for label in record["labels"]]


def test_boxes_below_the_score_are_left_out(weights: Path, photos: Path, tmp_path: Path) -> None:
    assert run(weights, photos / "b.png", "--json", tmp_path / "all.json") == 0
    assert run(weights, photos / "b.png", "--json", tmp_path / "none.json", "--score", "1") == 0
    ((all_of_it,), (nothing,)) = (json.loads((tmp_path / name).read_text()) for name in ("all.json", "none.json"))
    assert len(all_of_it["boxes"]) == 5
    assert nothing == {**all_of_it, "boxes": [], "labels": [], "class_names": [], "scores": []}


def test_images_that_cannot_be_read_are_named_and_the_others_go_on(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "aa.png").write_text("no image")
    assert run(weights, photos, tmp_path / "gone.jpg", "--json", tmp_path / "boxes.json") == 2
    names = [Path(record["file_name"]).name for record in json.loads((tmp_path / "boxes.json").read_text())]
    assert names == ["a.JPG", "b.png", "c.webp"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert str(photos / "aa.png") in lines[0]
    assert str(tmp_path / "gone.jpg") in lines[1]
    assert lines[2] == "fastdet: 2 of 5 images could not be read"


def test_after_ctrl_c_there_is_what_was_found(
    weights: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = detect.detect

    def interrupted(model, paths, **options):
        if paths[0].name == "b.png":
            raise KeyboardInterrupt
        return original(model, paths, **options)

    monkeypatch.setattr(detect, "detect", interrupted)
    assert run(weights, photos, "--json", tmp_path / "boxes.json") == 130
    assert [Path(record["file_name"]).name for record in json.loads((tmp_path / "boxes.json").read_text())] == ["a.JPG"]


def test_what_is_wrong_is_named_before_any_work(
    weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: object) -> str:
        return message(capsys, "detect", *arguments, "--weights", weights)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "--out" in (line := error(photos))
    assert "--json" in line
    assert f"{empty}: a folder without image files" in error(photos, empty, "--out", tmp_path / "drawn")
    there = tmp_path / "there.json"
    there.write_text("mine")
    assert f"{there} is there already" in error(photos, "--json", there, "--out", tmp_path / "drawn")
    assert there.read_text() == "mine"
    assert not (tmp_path / "drawn").exists()
