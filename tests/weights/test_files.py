"""Files of tensors by the way they are written, and files that are not what they seem."""

import collections
import errno
import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from fastdet.weights import files, tensor_pickles
from fastdet.weights.files import TensorFileError

STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "steps": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}


def arrays(state):
    return {name: value.numpy() for name, value in state.items()}


def old_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def pickled(protocol):
    return lambda content, path: path.write_bytes(pickle.dumps(arrays(content), protocol=protocol))


WRITERS = {
    "torch": torch.save,
    "torch before 1.6": old_torch,
    "safetensors": safetensors.torch.save_file,
    **{f"pickle {protocol}": pickled(protocol) for protocol in range(6)},
}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert type(found[name]) is torch.Tensor
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("suffix", ["", ".pth", ".pkl"])
@pytest.mark.parametrize("way", WRITERS)
def test_the_content_decides_how_a_file_is_read(tmp_path, way, suffix):
    path = tmp_path / f"weights{suffix}"
    WRITERS[way](STATE, path)
    assert_same(files.read(path), STATE)
    assert_same(files.read(str(path)), STATE)
    for value in files.read(path).values():
        value.add_(1)  # The memory is the tensor's own, not the file's.
    assert_same(files.read_state_dict(path), STATE)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "array",
    [
        np.array(3.5, dtype=np.float32),
        np.arange(24, dtype=np.int16).reshape(2, 3, 4)[:, ::2],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(5, dtype=">f8"),
        np.array([True, False]),
        np.zeros((3, 0, 2), dtype=np.uint8),
        np.array([np.nan, -np.inf, 1e-40], dtype=np.float32),
    ],
    ids=lambda array: f"{array.dtype.str} {array.shape}",
)
def test_arrays_of_all_layouts(tmp_path, array, protocol):
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps({"a": [array, (array, 1)]}, protocol=protocol))
    first, (second, one) = files.read(path)["a"]
    expected = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))
    for found in (first, second):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert one == 1


def test_a_pickle_of_python_2(tmp_path):
    """Written out by hand: keys and bytes are strings without an encoding, and the module has its former name."""
    data = struct.pack("<2f", 1.0, -1.7e38)
    assert any(byte > 127 for byte in data)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02tcnumpy\ndtype\n"
        b"(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + data + b"tb"
    )
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"\x80\x02}(U\x05model}U\x01w" + array + b"sU\x0a__author__U\x05Caffeu.")
    content = files.read(path)
    assert content["__author__"] == "Caffe"
    assert torch.equal(content["model"]["w"], torch.tensor([1.0, -1.7e38]))


@pytest.mark.parametrize(
    "write", [torch.save, old_torch, lambda content, path: path.write_bytes(pickle.dumps(content))]
)
def test_numbers_of_numpy_beside_the_weights(tmp_path, write):
    """As checkpoints have them that note the best metric."""
    path = tmp_path / "weights"
    write({"best": np.float64(0.7), "epoch": np.int64(12), "done": np.bool_(True), "a": np.arange(3.0)}, path)
    content = files.read(path)
    assert torch.equal(content.pop("a"), torch.arange(3.0, dtype=torch.float64))
    assert content == {"best": 0.7, "epoch": 12, "done": True}
    assert [type(value) for value in content.values()] == [float, int, bool]


def test_a_pickled_state_dict_of_arrays_keeps_its_entries(tmp_path):
    """Its class is OrderedDict, with an attribute that notes the modules' versions."""
    state = torch.nn.Linear(2, 3).state_dict()
    assert state._metadata
    for name in state:
        state[name] = state[name].numpy()
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(state))
    assert set(files.read_state_dict(path)) == {"weight", "bias"}


def test_a_pickle_that_looks_like_safetensors_at_a_glance(tmp_path):
    path = tmp_path / "values.pkl"
    path.write_bytes(b"\x80\x02}U\x05abc{dK\x01s.")
    assert path.read_bytes()[8:9] == b"{"
    assert files.read(path) == {"abc{d": 1}


def test_the_suffix_safetensors_decides(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps(arrays(STATE)))
    with pytest.raises(TensorFileError, match="header"):
        files.read(path)


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.content = function, arguments

    def __reduce__(self):
        return self.content


def harmful_objects(folder):
    return {
        "a call": Call(os.mkdir, str(folder)),
        "a call within": {"model": {"a": [1, (Call(os.mkdir, str(folder)),)]}},
        "a class": {"a": collections.deque([1])},
        "a name": {"a": os.mkdir},
        "a builtin": Call(eval, f"__import__('os').mkdir({str(folder)!r})"),
        "an array of objects": {"a": np.array([Call(os.mkdir, str(folder))], dtype=object)},
        "an array of plain objects": {"a": np.array([{}, 1], dtype=object)},
        "an array of text": {"a": np.array(["text"])},
        "an array of records": {"a": np.zeros(2, dtype=[("x", "f4")])},
    }


@pytest.mark.parametrize("kind", harmful_objects(Path()))
@pytest.mark.parametrize("way", ["torch", "torch before 1.6", "pickle 0", "pickle 2", "pickle 5"])
def test_other_objects_are_refused_and_nothing_runs(tmp_path, way, kind):
    folder, path = tmp_path / "made by the pickle", tmp_path / "bad.pkl"
    content = harmful_objects(folder)[kind]
    if way.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(way[-1])))
    else:
        WRITERS[way](content, path)
    # The folder's name has the word "refused" in it too.
    with pytest.raises(TensorFileError, match=r"other than tensors and plain values, refused \(") as caught:
        files.read(path)
    assert_one_line_about(path, caught)
    assert not folder.exists()
    # The file is one that would run: read without care, it makes the folder (or is merely an odd object).
    if kind in ("a call", "a builtin"):
        with path.open("rb") as file:
            if way.startswith("pickle"):
                pickle.load(file)
            else:
                torch.load(path, weights_only=False)
        assert folder.is_dir()


@pytest.mark.parametrize(
    "data",
    [
        # (a codec other than that of bytes), (records), (a state for a function), (a class that is no array), and
        # arrays with too few bytes, or a size of their own.
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8tR",
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00V8K\x00K\x01tR",
        b"cnumpy\ndtype\n(X\x01\x00\x00\x00OK\x00K\x01tR",
        b"cnumpy.core.multiarray\nscalar\n}X\x08\x00\x00\x00__name__K\x01sb",
        b"cnumpy\ndtype\n}b0K\x01",
        b"cnumpy\ndtype\nN}X\x05\x00\x00\x00numpyK\x01s\x86b",
        b"cnumpy\ndtype\n",
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4K\x00K\x01tR",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tX\x01\x00\x00\x00btR",
        b"cnumpy\nmemmap\n(X\x03\x00\x00\x00/etctR",
        b"cnumpy\nload\n(X\x03\x00\x00\x00/etctR",
        b"cnumpy.core.multiarray\nfromfile\n(X\x03\x00\x00\x00/etctR",
        b"ccollections\nOrderedDict\n(cnumpy\ndtype\ntR",
        b"cfastdet.weights.tensor_pickles\nSTAND_INS\n",
        b"Q",
        b"X\x01\x00\x00\x00aQ",
    ],
)
def test_what_is_no_array_is_refused(tmp_path, data):
    before = {name: (value, getattr(value, "__dict__", None)) for name, value in tensor_pickles.STAND_INS.items()}
    attributes = {name: set(vars(value)) for name, value in vars(tensor_pickles).items() if isinstance(value, type)}
    path = tmp_path / "bad.pkl"
    path.write_bytes(b"\x80\x02" + data + b".")
    with pytest.raises(TensorFileError) as caught:
        files.read(path)
    assert_one_line_about(path, caught)
    after = {name: (value, getattr(value, "__dict__", None)) for name, value in tensor_pickles.STAND_INS.items()}
    assert before == after
    assert attributes == {
        name: set(vars(value)) for name, value in vars(tensor_pickles).items() if isinstance(value, type)
    }


@pytest.mark.parametrize("shape", [(3,), (1, 1), (-5,), (2**62, 4)])
def test_an_array_whose_size_is_not_its_content_s_is_refused(tmp_path, shape):
    path = tmp_path / "bad.pkl"
    dtype = Call(np.dtype, "f4")
    array = Call(array_reconstruct(), np.ndarray, (0,), b"b")
    array.content = (*array.content, (1, shape, dtype, False, b"12345678"))
    path.write_bytes(pickle.dumps(array))
    with pytest.raises(TensorFileError) as caught:
        files.read(path)
    assert_one_line_about(path, caught)


def array_reconstruct():
    return np.zeros(1).__reduce__()[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("way", WRITERS)
def test_every_length_of_a_cut_short_file_is_noticed(tmp_path, way, suffix):
    whole, path = tmp_path / "whole", tmp_path / f"bad{suffix}"
    WRITERS[way](STATE, whole)
    data = whole.read_bytes()
    lengths = {*range(0, len(data), 61), *range(40), len(data) - 1}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        with pytest.raises(TensorFileError) as caught:
            files.read(path)
        assert_one_line_about(path, caught)


def assert_one_line_about(path, caught):
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def header(text, length=None):
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


BAD_FILES = {
    "missing": (lambda path: None, "no such file of tensors"),
    "folder": (lambda path: path.mkdir(), "the file of tensors cannot be read: a folder"),
    "empty": (lambda path: path.touch(), "not a file of tensors, or cut short"),
    "text": (lambda path: path.write_text("hello, I hold no tensors\n" * 9), "not a file of tensors"),
    "zip": (lambda path: np.savez(path.open("wb"), a=np.zeros(3)), "not a file of tensors"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), "not a file of tensors"),
    "header that is no JSON": (lambda path: path.write_bytes(header(b'{"a": nonsense}')), "header"),
    "header with a wrong size": (
        lambda path: path.write_bytes(header(b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}')),
        "not a file of tensors, or cut short",
    ),
    "header beyond the end": (lambda path: path.write_bytes(header(b"{}", 10_000)), "header"),
    "header of no end": (lambda path: path.write_bytes(header(b"{}", 2**63)), "not a file of tensors"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_errors_of_one_line(tmp_path, kind, suffix):
    path = tmp_path / f"bad{suffix}"
    make, message = BAD_FILES[kind]
    make(path)
    with pytest.raises(TensorFileError, match=message) as caught:
        files.read(path)
    assert_one_line_about(path, caught)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_file_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "weights.pth"
    path.touch(mode=0)
    with pytest.raises(TensorFileError, match="Permission denied"):
        files.read(path)


LAYOUTS = {
    "bare": STATE,
    "fastdet's": {"architecture": {"backbone": "small"}, "class_names": ("a",), "model": STATE, "epoch": 3},
    "torchvision's": {"model": STATE, "optimizer": {"state": {}}, "lr_scheduler": {}, "args": {"lr": 0.02}, "epoch": 1},
    "detectron2's": {"model": STATE, "__author__": "Detectron2 Model Zoo"},
    "simple-faster-rcnn's": {"model": STATE, "config": {"data": "voc"}, "other_info": {"best_map": np.float64(0.7)}},
    "a state_dict": {"state_dict": STATE, "epoch": 3},
    "parallel": {f"module.{name}": value for name, value in STATE.items()},
    "parallel within": {"model": {f"module.{name}": value for name, value in STATE.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_checkpoints(tmp_path, layout):
    path = tmp_path / "weights.pth"
    torch.save(LAYOUTS[layout], path)
    assert_same(files.read_state_dict(path), STATE)


def test_a_prefix_that_is_not_common_stays(tmp_path):
    state = {"module.a": torch.zeros(1), "modules": torch.ones(1)}
    torch.save(state, tmp_path / "weights.pth")
    assert_same(files.read_state_dict(tmp_path / "weights.pth"), state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "it is a Tensor"),
        ([STATE], "it is a list"),
        (7, "it is a int"),
        ({"epoch": 3, "lr": 0.1}, "its entry 'epoch' is a int, not a tensor"),
        ({"model": 3}, "its entry 'model' is a int"),
        ({"model": {**STATE, "more": {"a": STATE["a.bias"]}}}, "its entry 'more' is a dict"),
        ({0: torch.zeros(1)}, "its key 0 is not a name"),
        ({"model": {}}, "it is empty"),
        ({}, "it is empty"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(TensorFileError, match=f"not a state dict: {message}") as caught:
        files.read_state_dict(path)
    assert_one_line_about(path, caught)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / "new" / f"weights{suffix}"
    files.write_state_dict(path, STATE)
    assert_same(files.read_state_dict(path), STATE)
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"
    assert path.read_bytes().startswith(b"PK") == (suffix == ".pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_tied_strided_and_trained_tensors_are_written(tmp_path, suffix):
    path, plain = tmp_path / f"weights{suffix}", torch.arange(24.0).reshape(2, 3, 2, 2)
    state = {
        "one": plain,
        "tied": plain,
        "part": plain[1],
        "turned": plain[0, 0].t(),
        "channels last": plain.contiguous(memory_format=torch.channels_last),
        "broadcast": torch.ones(1).expand(5),
        "trained": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0),
        "empty too": torch.zeros(0),
    }
    files.write_state_dict(path, state)
    found = files.read_state_dict(path)
    assert_same(found, {name: value.detach() for name, value in state.items()})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_failure_leaves_the_last_good_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"weights{suffix}"
    files.write_state_dict(path, STATE)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(TensorFileError, match=r"the state dict cannot be written: .*No space left") as caught:
            files.write_state_dict(path, {"a": torch.zeros(3)})
    assert_one_line_about(path, caught)
    assert_same(files.read_state_dict(path), STATE)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "state", "message"),
    [
        ("weights.pth", {"a": 3}, "its entry 'a' is a int"),
        ("weights.safetensors", {}, "it is empty"),
        ("weights.safetensors", {"a": torch.zeros(1, dtype=torch.complex128)}, "complex128"),
        ("file/weights.pth", STATE, "File exists"),
    ],
)
def test_what_cannot_be_written_is_an_error_of_one_line(tmp_path, name, state, message):
    (tmp_path / "file").touch()
    with pytest.raises(TensorFileError, match=message) as caught:
        files.write_state_dict(tmp_path / name, state)
    assert_one_line_about(tmp_path / name, caught)


def test_an_open_file_of_any_content_is_written(tmp_path):
    files.write(tmp_path / "a", lambda file: file.write(b"abc"))
    assert (tmp_path / "a").read_bytes() == b"abc"
    with pytest.raises(TensorFileError, match="the picture cannot be written: nothing to see"):
        files.write(tmp_path / "a", fail_within, kind="picture")
    assert (tmp_path / "a").read_bytes() == b"abc"


def fail_within(file: io.BytesIO) -> None:
    file.write(b"a part")
    raise RuntimeError("nothing\nto see")
