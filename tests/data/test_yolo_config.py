"""The data.yaml of YOLO's layout: names of classes, and files that are wrong or hostile."""

import os
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.yolo import configure, fails, open_quietly, warnings_of, write_pair


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_pair(tmp_path / "set")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("names: [no, 007]\n", ("no", "007")),
        ("names:\n- 1e3\n- null\nnc: 2\n", ("1e3", "null")),
        ("names: {1: dog, 0: cat}\n", ("cat", "dog")),
        ("names: {10: dog, 1: cow, 0: cat}\nnc: 3\n", ("cat", "cow", "dog")),
        ('names: {"1": " dog ", "0": "c\\u00e4t"}\nnc:\n', ("cät", "dog")),
    ],
)
def test_names(root: Path, text: str, expected: tuple[str, ...]) -> None:
    configure(root, f"train: images/train\n{text}")
    assert open_quietly(root).class_names == expected


def test_classes_without_names(root: Path) -> None:
    configure(root, "train: images/train\nnc: 2\n")
    data, messages = warnings_of(root)
    assert data.class_names == ("0", "1")
    assert len(messages) == 1
    assert "2 class(es) without a name, named by their numbers: 0 in data.yaml; 1 in data.yaml" in messages[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names is None, not a list"),
        ("names: coco.names\n", "names is 'coco.names', not a list"),
        ("names: []\n", "there are 0 classes"),
        ("nc: 0\n", "there are 0 classes"),
        ("nc: 999999\n", "there are 65537 classes, not 1 to 65536"),
        ("nc: 99999999999999999999\n", "nc is '9999"),
        ("nc: two\n", "nc is 'two', not a whole number"),
        ("nc: [2]\n", "nc is ['2'], not a whole number"),
        ("nc: 3\nnames: [cat, dog]\n", "nc is 3, but there are 2 names"),
        ("names: [cat, '  ']\n", "'  ' of class 1 is not a name"),
        ("names: [cat, {a: b}]\n", "of class 1 is not a name"),
        ("names: {0: cat, 00: dog}\n", "class 0 has two names"),
        ("names: {0: cat, 0: dog}\n", "has the key '0' twice"),
        ("names: {0: cat, -1: dog}\n", "is '-1', not a whole number"),
        ("names: {cat: 0}\n", "is 'cat', not a whole number"),
        ("names: {[a]: 0}\n", "has a key that is no text"),
        ('names: [cat, "\\e[31mdog"]\n', r"'\x1b[31mdog' of class 1 is not a name"),
        ('names: [cat, "do\\ng"]\n', r"'do\ng' of class 1 is not a name"),
        ('names: [cat, "do\\Lg"]\n', "of class 1 is not a name"),
        ('names: [cat, "\\ud800"]\n', "data.yaml: "),
        ("path: [a]\nnames: [cat]\n", "path is ['a'], not a folder"),
    ],
)
def test_a_data_yaml_that_is_wrong_is_named(root: Path, text: str, message: str) -> None:
    error = fails(configure(root, f"train: images/train\n{text}"))
    assert error.startswith(f"{root / 'data.yaml'}: ")
    assert message in error


BOMB = "a: &a [x]\n" + "".join(f"b{k}: &b{k} [{', '.join([f'*b{k - 1}' if k else '*a'] * 9)}]\n" for k in range(40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), "line 1 has an anchor or an alias, a, "),
        (b"train: *a\n", "line 1 has an anchor or an alias, a, "),
        (b"train: &a [*a]\n", "line 1 has an anchor or an alias, a, "),
        (b"a: " + b"[" * 30, "nested deeper than 16 levels"),
        (b"a: " + b"[" * 100_000, "nest"),
        (b"a: " + b"{a: " * 20_000, "nested deeper than 16 levels"),
        (b"".join(b" " * k + b"- \n" for k in range(300)), "nested deeper than 16 levels"),
        (b"train: \xff\n", "neither UTF-8 nor UTF-16 with a byte order mark: 'utf-8' codec"),
        (b"\xff\xfet", "neither UTF-8 nor UTF-16 with a byte order mark: 'utf-16"),
        (b"train: a\x1b[31m\n", "does not parse"),
        (b"train: a\x00\n", "does not parse"),
        (b"train: [a\n", "does not parse"),
        (b"\ttrain: a\n", "does not parse"),
        (b'train: "\\UFFFFFFFF"\n', "does not parse"),
        (b"train: !!python/object/apply:os.system [true]\n", "names is None"),
        (b"", "not a mapping"),
        (b"- a\n", "not a mapping"),
        (b"a: b\n---\na: b\n", "line 3 begins a second document"),
        (b"".join(b"%%TAG !%d! x\n" % k for k in range(8_000)), "has more than 16 directives"),
        (b"names: [" + b"a," * (1 << 19), "has more than 512 KB"),
    ],
)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_hostile_yaml(
    root: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str, is_compiled: bool
) -> None:
    if not is_compiled:
        monkeypatch.delattr("yaml.CSafeLoader", raising=False)
    (root / "data.yaml").write_bytes(content)
    error = fails(root)
    assert error.startswith(f"{root / 'data.yaml'}: ")
    assert (message if is_compiled else message.replace("512", "128")) in error


@pytest.mark.parametrize("is_compiled", [True, False])
def test_the_largest_yaml_takes_at_most_about_a_second(
    root: Path, monkeypatch: pytest.MonkeyPatch, is_compiled: bool
) -> None:
    if not is_compiled:
        monkeypatch.delattr("yaml.CSafeLoader", raising=False)
    size = (512 if is_compiled and hasattr(yaml, "CSafeLoader") else 128) << 10
    (root / "data.yaml").write_text("names: [" + "a," * (size // 2 - 7) + "'']")
    start = time.process_time()
    assert "classes, not 1 to 65536" in fails(root) if size > 1 << 18 else "is not a name" in fails(root)
    assert time.process_time() - start < 3


def test_halves_of_characters_are_no_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(root, 'names: ["\\ud800"]\n')
    assert "does not parse" in fails(root)
    monkeypatch.delattr("yaml.CSafeLoader", raising=False)
    assert r"'\ud800' of class 0 is not a name" in fails(root)


def test_without_a_data_yaml(root: Path) -> None:
    assert f"{root}/other.yaml: no such file" in fails(root / "other.yaml")
    assert f"{root}/images/data.yaml: no such file" in fails(root / "images")
    (root / "data.yaml").unlink()
    os.mkfifo(root / "data.yaml")
    assert "data.yaml: the file cannot be read: a pipe, not a file" in fails(root)


def test_classes_of_one_name_are_one_class(root: Path) -> None:
    """As in COCO's format, and where data sets are joined: a class is its name."""
    configure(root, "train: images/train\nnames: {0: cat, 1: dog, 4: ' cat'}\n")
    (root / "labels/train/a.txt").write_text("4 0.5 0.5 0.5 0.5\n0 0.5 0.5 1 1\n1 0.5 0.5 1 1\n")
    data, messages = warnings_of(root)
    assert data.class_names == ("cat", "dog")
    assert data[0][1]["labels"].tolist() == [1, 1, 2]
    assert len(messages) == 1
    expected = "1 class(es) with the name of another, taken as one: data.yaml class 4 and class 0, 'cat'"
    assert messages[0].endswith(expected)
