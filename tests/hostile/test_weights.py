"""Files of tensors that would take all memory or never end, or are damaged: refused in a line, in a moment."""

import argparse
import collections
import io
import json
import math
import pickle
import random
import resource
import struct
import subprocess
import sys
import textwrap
import warnings
import zipfile

import numpy as np
import pytest
import torch

from fastdet import weights
from fastdet.weights.files import TensorFileError, read, write_state_dict

STATE = {"a.weight": torch.arange(60.0).reshape(20, 3), "b": torch.ones(7, dtype=torch.float64), "c": torch.tensor(3)}


def torch_archive(program: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """An archive of torch around a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in {"data.pkl": program, "version": b"3\n", "byteorder": b"little", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def join(archive: bytes, records: dict[str, bytes]) -> bytes:
    """An archive with more records."""
    out = io.BytesIO(archive)
    with zipfile.ZipFile(out, "a") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there already
        for name, content in records.items():
            file.writestr(name, content)
    return out.getvalue()


def call(name: str, argument: bytes) -> bytes:
    """A pickle that calls a function by name with one argument."""
    module, function = name.rsplit(".", 1)
    return b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"(" + argument + b"tR."


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def nested(levels: int) -> bytes:
    """Lists that contain the one before twice: as small as deep, and without end if each is visited each time."""
    program = b"\x80\x02]q\x00"
    for level in range(levels):
        program += b"]q" + bytes([level + 1]) + b"(h" + bytes([level]) + b"h" + bytes([level]) + b"e"
    return program + b"."


def shared_tuples(levels: int) -> bytes:
    """A tuple that contains the one before twice: to hash it takes two to the power of its levels."""
    program = b"\x80\x02)q\x00"
    for level in range(levels):
        program += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return program


def long(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(storage: int, size: int, stride: int, *, key: str = "0", old: bool = False) -> bytes:
    """A tensor of `size` fp32 elements, as the pickles of torch have it, of a storage of so many."""
    refers = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + long(storage)
    refers += (b"N" if old else b"") + b"tQ"
    shape = long(size) + b"\x85" + long(stride) + b"\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + refers + b"K\x00" + shape + b"\x89NtR"


def state_dict(*tensors: bytes) -> bytes:
    return b"\x80\x02}" + b"".join(text(f"w{i}") + value + b"s" for i, value in enumerate(tensors)) + b"."


def old_torch(program: bytes, keys: list[str], data: bytes) -> bytes:
    """A file in torch's older format."""
    start = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(start) + program + pickle.dumps(keys, 2) + data


def array_made(times: int) -> bytes:
    """An array of NumPy, of one megabyte that the file has once."""
    content = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"q\x01"
    dtype = b"0cnumpy\ndtype\n" + text("u1") + b"\x85Rq\x02"
    call = b"h\x03(h\x01h\x02J" + struct.pack("<i", 1 << 20) + b"\x85" + text("C") + b"tR"
    return b"\x80\x02" + content + dtype + b"0cnumpy.core.numeric\n_frombuffer\nq\x030](" + call * times + b"e."


def long_header(names: int) -> bytes:
    """Safetensors of empty tensors."""
    entries = (f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(names))
    header = "{" + ",".join(entries) + "}"
    return struct.pack("<Q", len(header)) + header.encode()


def storage_of(count: int, data: bytes) -> bytes:
    """A tensor whose storage has `count` numbers by the pickle."""
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        names = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    program = names.pop("data.pkl")
    # The number of elements, after the location.
    assert program.count(b"K\x04tq\x07Q") == 1
    program = program.replace(b"K\x04tq\x07Q", b"J" + struct.pack("<i", count) + b"tq\x07Q")
    return torch_archive(program, **{**names, "data/0": data})


def claiming(compression: int) -> bytes:
    """An archive with a record that claims ten bytes and decompresses to many more."""
    archive = bytearray(torch_archive(state_dict(), compression, **{"data/0": bytes(30_000_000)}))
    # The sizes lie before the name, in the directory and before the record.
    directory = archive.rfind(b"archive/data/0")
    for place in (directory - 22, archive.rfind(b"archive/data/0", 0, directory) - 8):
        archive[place : place + 4] = struct.pack("<I", 10)
    return bytes(archive)


def many_entries(count: int) -> bytes:
    """An archive whose directory is long, and refers to one record."""
    start, end = torch_archive(state_dict()), b""
    place = start.rfind(b"PK\x05\x06")
    entry = start[start.find(b"PK\x01\x02") : start.find(b"PK\x01\x02") + 46 + len("archive/data.pkl")]
    directory = entry * count
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), place, 0)
    return start[:place] + directory + end


def header_and_archive(bytes_of_header: int) -> bytes:
    """What is safetensors by its suffix, with a header of this length, and an archive of torch by its start."""
    archive = torch_archive(state_dict())
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(archive)], "data_offsets": [0, len(archive)]}}).encode()
    return b"PK\x03\x04" + bytes(4) + header.ljust(bytes_of_header) + archive


def two_keys_of_one_text() -> bytes:
    """An old file with two names of a storage, which are one in latin-1 and two in UTF-8."""
    other = tensor(4, 4, 1, old=True).replace(text("0"), b"U\x02\xc3\xa9")
    first = tensor(4, 4, 1, key="\u00c3\u00a9", old=True)
    return old_torch(state_dict(first, other), ["\u00c3\u00a9"], struct.pack("<q", 4) + bytes(16))


def with_attribute(name: str, value: bytes) -> bytes:
    """An ordered dict that has an attribute in place of a method."""
    entry = text("w") + tensor(2, 2, 1) + b"s"
    return b"\x80\x02ccollections\nOrderedDict\n)R" + entry + b"}" + text(name) + value + b"sb."


# Numbers that have the hash 0.
SAME_HASH = b"".join(b"\x8a\x0a" + ((2**61 - 1) * k).to_bytes(10, "little") + b"N" for k in range(1, 100_000))
BYTEARRAY = b"\x80\x02c__builtin__\nbytearray\nJ\x00\x01\x00\x00\x85R."

ENCODED = b"\x80\x02" + text("a" * 100_000) + b"q\x01]" + b"(" + b"c_codecs\nencode\n(h\x01tR" * 20_000 + b"e."

FILES = {
    "memo index of 2^30": b"\x80\x02]r" + struct.pack("<I", 2**30) + b".",
    "memo index as text": b"(lp1073741824\n.",
    "memo index in an archive": torch_archive(b"\x80\x02]r" + struct.pack("<I", 2**30) + b"."),
    "bytearray of 20 GB": torch_archive(call("builtins.bytearray", b"\x8a\x05\x00\xc8\x17\xa8\x04")),
    "bytearray of Python 2": torch_archive(call("__builtin__.bytearray", b"J\xff\xff\xff\x7f")),
    "bytearray in a plain pickle": call("builtins.bytearray", b"J\xff\xff\xff\x7f"),
    "a text encoded 20,000 times": ENCODED,
    "a text encoded 20,000 times, in an archive": torch_archive(ENCODED),
    "bytes that are not there": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.",
    "a text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "a bytearray that is not there": b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"abc.",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "dicts": b"\x80\x02](" + b"}" * 3_000_000 + b"e.",
    "a deflated archive": torch_archive(b"\x80\x02}.", zipfile.ZIP_DEFLATED, **{"data/0": bytes(300_000_000)}),
    "a deflated pickle": torch_archive(b"\x80\x02](" + b"]" * 30_000_000 + b"e.", zipfile.ZIP_DEFLATED),
    "a storage larger than its record": storage_of(2**30, bytes(16)),
    "a storage smaller than its record": storage_of(2, bytes(16)),
    "a name of names": b"\x80\x04cnone\nname\n" + b"\x93" * 200 + b".",
    "a name of a long text": b"\x80\x04" + text("a" * 300) + text("b") + b"\x93.",
    "nested tuples": b"\x80\x02N" + b"\x85" * 500_000 + b".",
    "a key of nested tuples": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "a key of nested tuples, in an archive": torch_archive(b"\x80\x02})" + b"\x85" * 200_000 + b"Ns."),
    "a key of shared tuples": shared_tuples(60) + b"}h\x3cNs.",
    "keys of shared tuples": shared_tuples(60) + b"}(h\x3cNu.",
    "a key of shared tuples, in an archive": torch_archive(shared_tuples(60) + b"}h\x3cNs."),
    "a set of shared tuples": torch_archive(shared_tuples(60) + b"c__builtin__\nset\n](h\x3ce\x85R."),
    "an ordered dict of shared tuples": shared_tuples(60) + b"ccollections\nOrderedDict\n](](h\x3cNee\x85R.",
    "a layout of shared tuples": torch_archive(shared_tuples(60) + b"ctorch.serialization\n_get_layout\nh\x3c\x85R."),
    "a storage with a key of shared tuples": torch_archive(
        shared_tuples(60) + b"(" + text("storage") + b"ctorch\nFloatStorage\nh\x3c" + text("cpu") + b"K\x01tQ."
    ),
    "punycode": torch_archive(b"\x80\x02c_codecs\nencode\n(" + text("\u00e9" * 200_000) + text("punycode") + b"tR."),
    "lists that contain each other often": nested(60),
    "lists that contain each other often, in an archive": torch_archive(nested(60)),
    "a list in itself": b"\x80\x02]q\x00(h\x00e.",
    "a tensor of a number": torch_archive(b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R."),
    "a tensor that is given its storage": torch_archive(b"\x80\x02ctorch\nTensor\n)\x81(" + b"NK\x00))tb."),
    "a tensor of one element 2^40 times": torch_archive(state_dict(tensor(2, 1 << 40, 0)), **{"data/0": bytes(8)}),
    "one storage in 500 tensors": torch_archive(
        state_dict(*[tensor(1 << 18, 1 << 18, 1)] * 500), **{"data/0": bytes(1 << 20)}
    ),
    "a negative size": torch_archive(state_dict(tensor(2, -1, 1)), **{"data/0": bytes(8)}),
    "a storage of two sizes": torch_archive(state_dict(tensor(2, 2, 1), tensor(4, 2, 1)), **{"data/0": bytes(8)}),
    "two archives in one": join(torch_archive(state_dict()), {"other/data.pkl": b"\x80\x02}."}),
    "two records of one name": join(torch_archive(state_dict()), {"archive/data.pkl": b"\x80\x02}."}),
    "an old file without its storages": old_torch(state_dict(tensor(2, 2, 1, old=True)), [], b""),
    "an old file that does not list its storage": old_torch(state_dict(tensor(2, 2, 1, old=True)), [], bytes(16)),
    "an old file with a storage too short": old_torch(state_dict(tensor(9, 9, 1, old=True)), ["0"], bytes(16)),
    "an array made 1000 times": array_made(1000),
    "a record that claims ten bytes, deflated": claiming(zipfile.ZIP_DEFLATED),
    "a record that claims ten bytes, bzip2": claiming(zipfile.ZIP_BZIP2),
    "many entries of a directory": many_entries(500_000),
    "a pickle in capitals": torch_archive(state_dict()).replace(b"/data.pkl", b"/DATA.PKL"),
    "keys of one hash": b"\x80\x02}(" + SAME_HASH + b"u.",
    "keys of one hash, in an archive": torch_archive(b"\x80\x02}(" + SAME_HASH + b"u."),
    "complex keys": torch_archive(b"\x80\x02}c__builtin__\ncomplex\nG" + bytes(8) + b"\x85RNs."),
    "a key of bytes": b"\x80\x04}C\x01aNs.",
    "a key of a long text": b"\x80\x02}" + text("a" * 10_000) + b"Ns.",
    "a tensor as a key": torch_archive(b"\x80\x02}" + tensor(2, 2, 1) + b"Ns.", **{"data/0": bytes(8)}),
    "a sparse tensor": torch_archive(call("torch._utils._rebuild_sparse_tensor", b"N")),
    "a long text a thousand times": b"\x80\x02" + text("a" * 20_000) + b"q\x00](" + b"h\x00" * 2000 + b"e.",
    "numbers in another order": torch_archive(state_dict(), byteorder=b"big"),
    "an empty file": b"",
}


def limited(paths, gigabytes=2.0, seconds=90):
    """Read files in a process that has so little memory and time; a line of each."""
    program = textwrap.dedent("""
        import sys, time
        from fastdet.weights.files import TensorFileError, read
        import torch, safetensors.torch
        start = time.perf_counter()
        for path in sys.argv[1:]:
            start = time.perf_counter()
            try:
                read(path)
                print("read")
            except TensorFileError as error:
                print(f"{time.perf_counter() - start:.1f} s: {error}")
    """)

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)

    command = [sys.executable, "-c", program, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, preexec_fn=limit)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_files_out_of_proportion_are_refused_in_a_line(tmp_path):
    paths = []
    for number, content in enumerate(FILES.values()):
        paths.append(tmp_path / f"{number}.pth")
        paths[-1].write_bytes(content)
    lines = limited(paths)
    assert len(lines) == len(FILES)
    for name, path, line in zip(FILES, paths, lines, strict=True):
        assert line != "read", name
        seconds, message = line.split(" s: ", 1)
        assert message.startswith(f"{path}: not a file of tensors"), name
        assert float(seconds) < 8, name  # mostly one or two, on a busy machine more
        assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_two_formats_is_read_as_the_one_that_was_checked(tmp_path, suffix):
    path = (tmp_path / "two").with_suffix(suffix)
    path.write_bytes(header_and_archive(1000))
    assert read(path) == {}
    path.write_bytes(
        join(torch_archive(state_dict(tensor(2, 2, 1)), **{"data/0": bytes(8)}), {"archive/DATA.PKL": BYTEARRAY})
    )
    assert torch.equal(read(path)["w0"], torch.zeros(2))


def test_a_storage_with_two_names_has_the_values_of_the_file(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(two_keys_of_one_text())
    assert [value.tolist() for value in read(path).values()] == [[0.0] * 4] * 2


@pytest.mark.parametrize("name", ["get", "items", "keys", "__len__", "detach"])
def test_attributes_in_a_file_hide_no_method(tmp_path, name):
    path = tmp_path / "state.pth"
    path.write_bytes(torch_archive(with_attribute(name, b"c__builtin__\nset\n"), **{"data/0": bytes(8)}))
    assert torch.equal(weights.read_state_dict(path)["w"], torch.zeros(2))
    value = torch.full((3,), math.nan)
    value.detach = torch.Tensor
    torch.save({"w": value}, path)
    assert vars(read(path)["w"]) == {}


def test_elements_in_one_place_become_elements_of_their_own(tmp_path):
    path = tmp_path / "state.pth"
    torch.save({"w": torch.zeros(1).expand(3, 2), "v": torch.arange(5.0).as_strided((3, 3), (1, 1))}, path)
    with_gaps = {"w": torch.zeros(14).as_strided((4, 3), (0, 6)), "v": torch.zeros(30).as_strided((2, 2, 3), (3, 1, 9))}
    torch.save(with_gaps, tmp_path / "gaps.pth")
    assert read(tmp_path / "gaps.pth")["w"].is_contiguous()
    assert read(tmp_path / "gaps.pth")["v"].stride() == (3, 1, 9)
    found = read(path)
    for value in found.values():
        assert value.is_contiguous()
        value += torch.arange(value.numel()).reshape(value.shape)
    assert found["w"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_messages_are_of_one_line_also_with_names_of_several(tmp_path):
    path = tmp_path / "state.pth"
    torch.save({"a\n\x1b[2J": torch.full((2,), math.nan)}, path)
    model = torch.nn.Linear(2, 2)
    for content in ({"a\n\x1b[2J": torch.full((2,), math.nan)}, {"a\n\x1b[2J": torch.zeros(2)}, {"a\n": 5}):
        torch.save(content, path)
        with pytest.raises((weights.WeightsError, TensorFileError)) as caught:
            weights.load(model, path)
        assert str(caught.value).isprintable()
    path.write_bytes(b"c\x1b[31mevil\nx\n)R.")
    with pytest.raises(TensorFileError) as caught:
        read(path)
    assert str(caught.value).isprintable()


def test_a_header_of_many_names_is_refused(tmp_path):
    many, fewer = tmp_path / "many.safetensors", tmp_path / "fewer.safetensors"
    many.write_bytes(long_header(200_000))
    fewer.write_bytes(long_header(20_000))
    refused, accepted = limited([many, fewer])
    assert "its header has more than 2 MB" in refused
    assert accepted == "read"


def contents_of_checkpoints():
    """Plain values and tensors of every kind that checkpoints have."""
    layer, tagged = torch.nn.Linear(3, 2), torch.rand(3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    tagged.note = "x"
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    plain = [
        {1: 2, "a": True, None: 3},
        {1, "b"},
        frozenset([3]),
        argparse.Namespace(lr=0.1, data="x"),
        1 + 2j,
        2**70,
        b"abc\xff",
        "é" * 1000,
        (),
        None,
        0.5,
        True,
    ]
    described = [torch.Size([1, 2]), torch.float32, torch.device("cpu"), collections.Counter({3: 1, 5: 2})]
    dtypes = [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128, torch.bool, torch.int8]
    tensors = [torch.zeros(3, dtype=dtype) for dtype in dtypes] + [torch.zeros(1).expand(1000), layer.weight, tagged]
    states = [layer.state_dict(), optimizer.state_dict(), schedule.state_dict(), torch.get_rng_state()]
    return [*plain, *described, *tensors, *states, np.float64(3), np.arange(3.0)]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", contents_of_checkpoints(), ids=lambda content: type(content).__name__)
@pytest.mark.filterwarnings("ignore")
def test_what_checkpoints_have_is_read(tmp_path, content, zipped):
    path = tmp_path / "checkpoint.pth"
    torch.save({"content": content}, path, _use_new_zipfile_serialization=zipped)
    found = read(path)["content"]
    if isinstance(content, np.ndarray):
        content = torch.from_numpy(content)
    torch.testing.assert_close(found, content, rtol=0, atol=0) if isinstance(content, torch.Tensor) else None
    assert isinstance(content, torch.Tensor) or str(found) == str(plain(content))


def plain(content):
    """What ordered dicts and parsed options are read as."""
    content = vars(content) if isinstance(content, argparse.Namespace) else content
    return dict(content) if isinstance(content, collections.OrderedDict) else content


def test_what_is_in_proportion_is_read(tmp_path):
    """Checkpoints as large as they are deep: with an optimizer's state, many small tensors, arrays, old formats."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.rand(3)) for _ in range(300)])
    content = {"model": {f"layer.{i}": torch.rand(2, 3) for i in range(2000)}, "optimizer": optimizer.state_dict()}
    content["order"] = collections.OrderedDict((f"name {i}", [i, i / 3, None, (True, "x" * i)]) for i in range(500))
    content["empty"], content["shared"] = torch.zeros(0), [content["model"]["layer.0"].view(-1)[1:]] * 2
    for old in (True, False):
        path = tmp_path / f"{old}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=not old)
        torch.testing.assert_close(read(path)["model"], content["model"], rtol=0, atol=0)
    arrays = {f"w{i}": np.random.default_rng(i).random((i, 5)).astype(np.float32) for i in range(200)}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(arrays, protocol))
        found = read(path)
        assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def read_or_message(path):
    """The content, or the message of its refusal."""
    message = None
    try:
        content = read(path)
    except TensorFileError as error:
        content = message = str(error)
    assert message is None or (message.startswith(str(path)) and "\n" not in message and len(message) < 500)
    return content


def flip(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path, suffix):
    path, damaged = tmp_path / f"state{suffix}", tmp_path / f"damaged{suffix}"
    write_state_dict(path, STATE)
    content, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        damaged.write_bytes(flip(content, draw.randrange(len(content)), draw.randrange(8)))
        found = read_or_message(damaged)
        if isinstance(found, str):
            refused += 1
        else:
            torch.testing.assert_close(found, STATE, rtol=0, atol=0)
    assert refused > 100


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(value):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["1.weight"][0, 1] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(weights.WeightsError, match=r"1\.weight has 1 of 4 values that are not finite"):
        weights.load(model, state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["archive", "old", "pickle", "safetensors"])
def test_mutated_files_are_read_or_refused(tmp_path, kind):
    """Bytes changed, cut out, doubled and inserted at random places."""
    path, draw = tmp_path / "valid", random.Random(1)
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        write_state_dict(path, STATE)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({name: value.numpy() for name, value in STATE.items()}, 2))
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "archive")
    content, mutated = path.read_bytes(), path.with_stem("mutated")
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            place, length = draw.randrange(len(changed)), draw.choice([1, 1, 2, 4, 8, 30])
            new = draw.choice([bytes(draw.randbytes(length)), b"\xff" * length, b"\0" * length, b"", changed[:length]])
            changed[place : place + draw.choice([0, length])] = new
        mutated.write_bytes(changed)
        read_or_message(mutated)


def in_a_frame(content: bytes) -> bytes:
    """Bytes whose length begins in a frame and ends behind it: Python's reader takes the four bytes behind for the
    length, and runs what others take for the bytes."""
    length = struct.pack("<I", 0)
    return (
        b"\x80\x04\x95" + struct.pack("<Q", 3) + b"B" + struct.pack("<H", len(content) + 2) + length + content + b"0N."
    )


def array_of_given(call: bytes, times: int) -> bytes:
    """Arrays of bytes that a call has given back."""
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n)R"
    data = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20)
    start = b"\x80\x02" + call + data + b"\x85Rq\x010cnumpy\ndtype\n" + text("u1") + b"\x85Rq\x020]("
    return start + (reconstruct + b"(K\x01J\x00\x00\x10\x00\x85h\x02\x89h\x01tb") * times + b"e."


EQUAL = b"](K\x01K\x01eq\x0a0" + b"".join(
    b"](" + b"h" + bytes([k]) * 1 + b"h" + bytes([k]) + b"eq" + bytes([k + 1]) + b"0" for k in range(10, 60)
)
MORE = {
    "an instruction across the end of a frame": in_a_frame(b"0" + text("other") + b"."),
    "bytes that a call gives back": array_of_given(b"ctorch._utils\n_rebuild_parameter\n", 200),
    "a dtype that is a list": b"\x80\x02" + EQUAL + b"cnumpy\ndtype\nh\x3c\x85R.",
    "an old file whose keys are lists": old_torch(b"\x80\x02}.", [], b"")[:-6] + EQUAL + b"](h\x3ce.",
    "sizes that are bytes": torch_archive(
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + tensor(2, 2, 1).partition(b"(")[2].partition(b"K\x00")[0]
        + b"K\x00B\x02\x00\x00\x00\xff\xffB\x02\x00\x00\x00\x01\x01\x89NtR.",
        **{"data/0": bytes(8)},
    ),
    "a tensor beyond its storage": torch_archive(state_dict(tensor(2, 3, 1)), **{"data/0": bytes(8)}),
    "keys of one hash in tuples": b"\x80\x02}(K\x01K\x02\x86NK\x03K\x04\x86Nu.",
    "fractions as keys": b"\x80\x02}G" + bytes(8) + b"Ns.",
    # The name of a storage of 16 bytes, and one that is the same once it is decoded.
    "one storage by two texts": torch_archive(
        b"\x80\x02]("
        + tensor(4, 4, 1)
        + tensor(1, 1 << 24, 0).replace(text("0"), b"V\\u0030\n").replace(b"FloatStorage", b"ByteStorage")
        + b"e.",
        **{"data/0": bytes(16), "data/\\u0030": bytes(1)},
    ),
    "a quantized dtype": torch_archive(
        state_dict(tensor(2, 2, 1)).replace(b"FloatStorage", b"quint8"), **{"data/0": bytes(2)}
    ),
    "bits": torch_archive(state_dict(tensor(2, 2, 1)).replace(b"FloatStorage", b"bits8"), **{"data/0": bytes(2)}),
    "an archive with a comment": torch_archive(state_dict())[:-2] + b"\x01\x00x",
}


def test_what_two_readers_would_take_differently_is_refused(tmp_path):
    paths = [tmp_path / f"{number}" for number in range(len(MORE))]
    for path, content in zip(paths, MORE.values(), strict=True):
        path.write_bytes(content)
    for name, line in zip(MORE, limited(paths), strict=True):
        assert "not a file of tensors" in line, name
        assert float(line.split(" s: ")[0]) < 5, name
