"""What is written and shown: nothing that was there is lost, no name commands a terminal, no letter stops a result."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from fastdet.cli.main import main
from fastdet.engine import checkpoint
from fastdet.engine.evaluate import Evaluation
from fastdet.metrics import coco_average_precision, voc_average_precision
from fastdet.safe_files import printable, replace_file

# What a terminal obeys, what reverses the direction of writing, and letters that few encodings have.
HOSTILE = "a\x1b[2J\x07\rb\x9bc\u202ed\u2028e\ud800"
FOREIGN = "Tiger 老虎 ž"


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A checkpoint of a detector that was not trained: every box has some score."""
    torch.manual_seed(0)
    settings = {"min_size": 32, "max_size": 64, "box_representation_size": 8, "box_score_thresh": 0.01}
    settings |= {"rpn_anchors_inside_only": False, "rpn_min_size": 0.0}
    architecture = {"backbone": "small", "num_classes": 3, "settings": settings}
    path = tmp_path_factory.mktemp("detector") / "last.pth"
    model = checkpoint.build_model(architecture)
    checkpoint.save(
        path, {"architecture": architecture, "class_names": [HOSTILE, FOREIGN], "model": model.state_dict()}
    )
    return path


def picture(path, color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), color).save(path, "PNG")
    return path


def detect(detector, out, *images):
    return main(["detect", *map(str, images), "--weights", str(detector), "--out", str(out), "--score", "0.2"])


def test_every_input_has_its_own_file_and_none_is_overwritten(tmp_path, detector, capsys):
    images = [picture(tmp_path / name) for name in ("1/a.png", "2/a.png", "1/a_2.png", "3/a.png")]
    out = tmp_path / "out"
    assert detect(detector, out, *images) == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(first) == len(images)
    named = [line.rsplit(" -> ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert sorted(named) == sorted(str(out / name) for name in first)
    assert detect(detector, out, *images) == 0  # again, beside them
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name in first} == first
    assert len(list(out.iterdir())) == 2 * len(images)


def test_inputs_and_links_in_the_output_s_folder_are_left_alone(tmp_path, detector):
    image, victim = picture(tmp_path / "a.png"), picture(tmp_path / "victim/b.png", "blue")
    before = image.read_bytes(), victim.read_bytes()
    other = picture(tmp_path / "elsewhere/b.png", "green")
    (tmp_path / "b.png").symlink_to(victim)
    (tmp_path / "b_2.png").symlink_to(tmp_path / "victim/new.png")
    assert detect(detector, tmp_path, image, other) == 0
    assert (image.read_bytes(), victim.read_bytes()) == before
    assert not (tmp_path / "victim/new.png").exists()
    assert (tmp_path / "a_2.png").is_file()
    assert (tmp_path / "b_3.png").is_file()


@pytest.mark.parametrize(
    "name", [HOSTILE.replace("\ud800", ""), FOREIGN, b"\xff\xfe.png"], ids=["hostile", "foreign", "bytes"]
)
def test_names_are_shown_and_not_obeyed(tmp_path, detector, capsys, name):
    path = tmp_path / (os.fsdecode(name) if isinstance(name, bytes) else name)
    picture(path)
    assert detect(detector, tmp_path / "out", path, tmp_path / f"missing{path.name}") == 2
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert text.strip()
        assert all(c.isprintable() for c in text.replace("\n", ""))
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_letters_that_an_encoding_lacks_are_escaped(tmp_path, detector, encoding):
    path = picture(tmp_path / f"{FOREIGN}.png")
    options = ["--weights", str(detector), "--out", str(tmp_path / "out"), "--score", "0"]
    command = [sys.executable, "-m", "fastdet", "detect", str(path), str(tmp_path / "缺.png"), *options]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert "no such image file" in done.stderr.decode(encoding)
    assert FOREIGN.encode(encoding, "backslashreplace") in done.stdout


def test_results_are_on_the_disk_before_a_table_is_printed(tmp_path, monkeypatch):
    from fastdet.cli import commands

    target = {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1])}
    target["ignore"] = torch.zeros(1, dtype=torch.bool)
    prediction = {**target, "scores": torch.tensor([0.9])}
    arguments = [prediction], [target], 3
    voc07, voc12 = (voc_average_precision(*arguments, method=method) for method in ("voc07", "voc12"))
    pytest.importorskip("pycocotools")
    evaluation = Evaluation((HOSTILE, "b" * 500), [prediction], voc07, voc12, coco_average_precision(*arguments))
    assert all(c.isprintable() for c in evaluation.table().replace("\n", ""))
    assert max(map(len, evaluation.table().splitlines())) < 160

    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("nobody reads")

    class Images(list):
        pass

    monkeypatch.setattr(commands, "evaluate", lambda *args, **kwargs: evaluation)
    monkeypatch.setattr(sys, "stdout", Gone())
    options = type("Options", (), {"out": tmp_path / "out", "workers": 0, "limit": None})
    with pytest.raises(BrokenPipeError):
        commands._evaluate(options, None, Images([(torch.zeros(3, 20, 20), target)]), (HOSTILE, "b"), 0, {})
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["classes"][HOSTILE]["AP"] == pytest.approx(1)
    assert (tmp_path / "out/detections.png").is_file()


def test_a_text_becomes_a_line_of_sensible_length():
    assert printable("plain ž 老虎") == "plain ž 老虎"
    assert printable("a\x1b\n\x9b\u202e\ud800") == "a\\x1b\\n\\x9b\\u202e\\ud800"
    assert len(printable("x" * 10**6)) < 1100
    assert printable("x" * 10**6).endswith("(1000000 characters)")


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "file"
    replace_file(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"a part")
        raise ValueError("in between")

    with pytest.raises(ValueError, match="in between"):
        replace_file(path, fail)
    assert path.read_bytes() == b"old"
    assert [each.name for each in path.parent.iterdir()] == ["file"]
