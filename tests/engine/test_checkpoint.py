import errno
import io
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from fastdet.engine import checkpoint
from fastdet.engine.checkpoint import CheckpointError
from fastdet.weights import files
from fastdet.weights.files import TensorFileError

CONTENT = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}, "class_names": ("a", "b"), "epoch": 3, "lr": 0.02}


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "new" / "folder" / "last.pth"
    checkpoint.save(path, CONTENT)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"]["weight"], CONTENT["model"]["weight"])
    assert {name: loaded[name] for name in ("class_names", "epoch", "lr")} == {
        "class_names": ("a", "b"),
        "epoch": 3,
        "lr": 0.02,
    }
    assert [file.name for file in path.parent.iterdir()] == ["last.pth"], "no temporary file is left"
    checkpoint.save(path, {"epoch": 4})
    assert checkpoint.load(path) == {"epoch": 4}


def write_a_part(content, file):
    file.write(b"PK, and then nothing more")


def fail_midway(content, file):
    write_a_part(content, file)
    raise RuntimeError("the power went\nout")


def interrupt_midway(content, file):
    write_a_part(content, file)
    raise KeyboardInterrupt


def fill_the_disk(content, file):
    write_a_part(content, file)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(fail_midway, CheckpointError), (fill_the_disk, CheckpointError), (interrupt_midway, KeyboardInterrupt)],
)
def test_a_failure_midway_leaves_the_last_good_file(tmp_path, monkeypatch, failure, raised):
    path = tmp_path / "last.pth"
    checkpoint.save(path, CONTENT)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failure)
        with pytest.raises(raised) as caught:
            checkpoint.save(path, {"epoch": 4})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "the temporary file is removed"
    if raised is CheckpointError:
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_of_the_disk_leaves_the_last_good_file(tmp_path, monkeypatch, call):
    path = tmp_path / "last.pth"
    checkpoint.save(path, CONTENT)

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError, match=r"last\.pth: the checkpoint cannot be written: .*Input/output"):
            checkpoint.save(path, {"epoch": 4})
    assert checkpoint.load(path)["epoch"] == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_an_interruption_within_the_writer_is_one(tmp_path, monkeypatch, call):
    checkpoint.save(tmp_path / "last.pth", CONTENT)
    plain, calls = io.BufferedWriter.write, []

    class Interrupted(io.BufferedWriter):
        def write(self, data):
            calls.append(len(data))
            if len(calls) == call:
                raise KeyboardInterrupt
            return plain(self, data)

    monkeypatch.setattr(Path, "open", lambda self, mode: Interrupted(io.FileIO(self, mode)))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "last.pth", {"epoch": 4, "weights": torch.zeros(100_000)})
    assert len(calls) >= call
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_a_kill_while_saving_leaves_a_good_file(tmp_path):
    path = tmp_path / "last.pth"
    code = (
        "import itertools, sys, torch\n"
        "from fastdet.engine import checkpoint\n"
        "for epoch in itertools.count():\n"
        "    checkpoint.save(sys.argv[1], {'epoch': epoch, 'model': torch.full((1 << 20,), float(epoch))})\n"
    )
    for wait in (0.0, 0.05, 0.11):
        child = subprocess.Popen([sys.executable, "-c", code, path], cwd=Path(__file__).parents[2])
        while not path.exists():
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(wait)
        child.kill()
        child.wait()
        content = checkpoint.load(path)
        assert (content["model"] == content["epoch"]).all()
        path.unlink()


def test_a_full_disk_is_an_error_of_one_line(tmp_path, monkeypatch):
    """The real thing: torch's writer against a file that takes no byte."""
    path = tmp_path / "last.pth"
    checkpoint.save(path, CONTENT)
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: plain(Path("/dev/full"), mode))
    with pytest.raises(CheckpointError, match=r"last\.pth: the checkpoint cannot be written") as caught:
        checkpoint.save(path, {"weight": torch.zeros(1_000_000)})
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 3


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/last\.pth: the checkpoint cannot be written"):
        checkpoint.save(tmp_path / "file" / "last.pth", CONTENT)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("/this must never be made",)


def truncated(path: Path) -> None:
    checkpoint.save(path, CONTENT)
    path.write_bytes(path.read_bytes()[:-300])


def harmful(path: Path) -> None:
    torch.save({"model": Harmful()}, path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Harmful()))


BAD_FILES = {
    "missing": (lambda path: None, "no such checkpoint"),
    "folder": (lambda path: path.mkdir(), "a folder"),
    "empty": (lambda path: path.touch(), "not a checkpoint"),
    "text": (lambda path: path.write_text("hello, I am not a checkpoint\n" * 20), "not a checkpoint"),
    "truncated": (truncated, "not a checkpoint, or cut short"),
    "harmful": (harmful, "refused"),
    "plain pickle": (plain_pickle, "not a checkpoint"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), "it holds a Tensor"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_errors_of_one_line(tmp_path, kind):
    path = tmp_path / "bad.pth"
    make, message = BAD_FILES[kind]
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_every_length_of_a_cut_short_file_is_noticed(tmp_path):
    buffer = io.BytesIO()
    torch.save(CONTENT, buffer)
    path = tmp_path / "bad.pth"
    for length in range(0, len(buffer.getvalue()), 97):
        path.write_bytes(buffer.getvalue()[:length])
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


def refused(path, data):
    """Whether bytes in a file are refused in one line, as a checkpoint and as weights."""
    path.write_bytes(data)
    messages = []
    for load, error in ((checkpoint.load, CheckpointError), (files.read_state_dict, TensorFileError)):
        try:
            load(path)
        except error as caught:
            messages.append(str(caught))
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)
    return len(messages) == 2


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    checkpoint.save(tmp_path / "last.pth", CONTENT)
    data, path = bytearray((tmp_path / "last.pth").read_bytes()), tmp_path / "flipped.pth"
    for place in range(len(data)):
        for bit in range(8):
            data[place] ^= 1 << bit
            assert refused(path, data), (place, bit)
            data[place] ^= 1 << bit
    assert not refused(path, data)


def test_a_checkpoint_with_more_or_fewer_bytes_is_refused(tmp_path):
    checkpoint.save(tmp_path / "last.pth", CONTENT)
    data, path = (tmp_path / "last.pth").read_bytes(), tmp_path / "changed.pth"
    for length in range(len(data)):
        assert refused(path, data[:length]), length
    for more in (b"\0", b"x" * 100, data[-22:], data[-44:], data):
        assert refused(path, data + more)
        assert refused(path, more + data)
    for start in range(0, len(data) - 64, 97):
        assert refused(path, data[:start] + data[start + 64 :])
        assert refused(path, data[:start] + data[start : start + 64] + data[start:])


def test_a_checkpoint_is_a_file_of_torch_and_theirs_need_no_checksum(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save(path, CONTENT)
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(path, **options)["model"]["weight"], CONTENT["model"]["weight"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"fastdet.crc32=")
    torch.save(CONTENT, path)
    assert checkpoint.load(path)["epoch"] == 3


def test_another_kind_of_checkpoint_is_not_a_detector(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save(path, {"model": {}, "names": ["a"]})
    with pytest.raises(CheckpointError, match="it has no architecture, class_names"):
        checkpoint.load_model(path)


ARCHITECTURE = {
    "backbone": "small",
    "num_classes": 3,
    "anchors": checkpoint.describe_anchors("small", sizes=(12, 20)),
    "settings": {"rpn_hidden_channels": 8, "box_representation_size": 8},
}


def write_detector(path, **settings):
    """A checkpoint whose architecture holds further settings."""
    model = checkpoint.build_model(ARCHITECTURE)
    architecture = {**ARCHITECTURE, "settings": {**ARCHITECTURE["settings"], **settings}}
    content = {"architecture": architecture, "class_names": ("a", "b"), "model": model.state_dict()}
    checkpoint.save(path, content)
    return model


@pytest.mark.parametrize("settings", [{}, {"mask_padding": False}])
def test_a_detector_comes_back_also_from_an_older_checkpoint(tmp_path, settings):
    saved = write_detector(tmp_path / "last.pth", **settings)
    loaded, class_names = checkpoint.load_model(tmp_path / "last.pth")
    assert class_names == ("a", "b")
    assert loaded.settings == saved.settings
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_mask_of_the_padding_is_refused_in_one_line(tmp_path):
    write_detector(tmp_path / "last.pth", mask_padding=True)
    with pytest.raises(CheckpointError, match=r"last\.pth: .*mask_padding=True.*size_buckets") as caught:
        checkpoint.load_model(tmp_path / "last.pth")
    assert "\n" not in str(caught.value)
