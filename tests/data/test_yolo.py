"""YOLO's layout: what it gives, and what it reports of labels and images that are wrong."""

import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastdet.data import VOC, DataError, Shapes
from fastdet.data.formats.yolo import YOLO
from tests.helpers.voc import write_voc
from tests.helpers.yolo import (
    NAMES,
    boxes_of,
    configure,
    fails,
    label,
    open_quietly,
    picture,
    warnings_of,
    write_pair,
    write_yolo,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_pair(tmp_path / "set")


def test_items(root: Path) -> None:
    data = open_quietly(root / "data.yaml")
    assert data.class_names == ("cat", "dog")
    assert data.ids == ("images/train/a.jpg", "images/train/part/b.jpg")
    assert data.sizes == [(20, 40), (20, 40)]
    assert data.image_path(1) == root / "images/train/part/b.jpg"
    image, target = data[0]
    assert image.shape == (3, 20, 40)
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[10, 5, 30, 15]]
    assert target["labels"].tolist() == [2]
    assert target["ignore"].tolist() == [False]
    assert boxes_of(data, 1) == [[0, 0, 20, 20]]
    assert open_quietly(root).ids == data.ids


def test_class_names_give_the_labels(root: Path) -> None:
    assert open_quietly(root, class_names=["dog", "cow", "cat"])[0][1]["labels"].tolist() == [1]
    (root / "labels/train/part/b.txt").write_text("")
    assert open_quietly(root, class_names=["dog"]).class_names == ("dog",)
    assert "labels/train/a.txt: class 'dog' is not among the 1 class names" in fails(root, class_names=["cat"])
    for path in (root / "images/train/a.jpg", root / "labels/train/a.txt"):
        path.rename(path.with_stem("\x1b[31ma"))
    assert r"labels/train/\x1b[31ma.txt: class 'dog' is not among" in fails(root, class_names=["cat"])


def test_one_data_set_in_two_formats_is_the_same(tmp_path: Path) -> None:
    voc = VOC(write_voc(tmp_path / "voc", {"train": 6, "val": 3}), "val", Shapes.class_names)
    yolo = open_quietly(write_yolo(tmp_path / "yolo", {"train": 6, "val": 3}), "val")
    assert len(yolo) == len(voc) == 3
    for index in range(3):
        assert yolo.image_path(index).name == voc.image_path(index).name
        assert torch.equal(yolo[index][0], voc[index][0])
        assert torch.equal(yolo[index][1]["labels"], voc[index][1]["labels"])
        torch.testing.assert_close(yolo[index][1]["boxes"], voc[index][1]["boxes"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("line", "boxes"),
    [
        ("1.0 0.5 0.5 0.5 0.5", [[10, 5, 30, 15]]),
        ("1.000000e+00\t5e-1  .5 \t0.5 0.5  ", [[10, 5, 30, 15]]),
        ("1 0.1 0.9 0.5 0.2 0.3 0.4", [[4, 4, 20, 18]]),
        ("1 0.25 0.25 0.75 0.25 0.75 0.5 0.25 0.5", [[10, 5, 30, 10]]),
        ("1 0.5 0.5 2 2", [[-20, -10, 60, 30]]),
        ("1 0 0 0.5 0.5", [[-10, -5, 10, 5]]),
        ("1 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5", [[10, 5, 30, 15]] * 2),
    ],
)
def test_lines(root: Path, line: str, boxes: list[list[float]]) -> None:
    (root / "labels/train/a.txt").write_text(line)
    torch.testing.assert_close(torch.tensor(boxes_of(open_quietly(root))), torch.tensor(boxes, dtype=torch.float32))


def test_boxes_without_a_place_in_the_image_are_left_out(root: Path) -> None:
    bad = ["0.5 0.5 0 0.5", "0.5 0.5 0.5 -0.5", "1.5 0.5 0.5 0.5", "nan 0.5 0.5 0.5", "0.5 1e999 0.5 0.5"]
    # A polygon whose smallest and largest value would not show what is not a number.
    bad += ["0.1 0.1 0.5 nan 0.5 0.5", "0.1 0.1 0.5 0.1 0.9 0.1"]
    (root / "labels/train/a.txt").write_text("\n".join(f"1 {line}" for line in [*bad, "0.5 0.5 0.5 0.5"]))
    data, messages = warnings_of(root)
    assert len(messages) == 1
    assert "7 box(es) left out" in messages[0]
    assert "images/train/a.jpg dog (0.5 0.5 0 0.5)" in messages[0]
    assert boxes_of(data) == [[10, 5, 30, 15]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 0.5 0.5 0.5 0.5 0.9", "has 6 values, not 5"),
        ("1 0.5 0.5 0.5", "has 4 values"),
        ("1", "has 1 values"),
        ("1 0.1 0.2 0.3 0.4 0.5 0.6 0.7", "has 8 values"),
        ("2 0.5 0.5 0.5 0.5", "class 2 is not among the 2 of"),
        ("-1 0.5 0.5 0.5 0.5", "class -1 is not among"),
        ("0.5 0.5 0.5 0.5 0.5", "class 0.5 is not among"),
        ("nan 0.5 0.5 0.5 0.5", "class nan is not among"),
        ("1e999 0.5 0.5 0.5 0.5", "class 1e999 is not among"),
        ("dog 0.5 0.5 0.5 0.5", "not all are numbers: dog 0.5"),
        ("1 0,5 0,5 0,5 0,5", "not all are numbers: 1 0,5"),
        ("0_1 0.5 0.5 0.5 0.5", "not all are numbers: 0_1"),
        ("1 0.5 0.5 0.5 \x1b[31m", r"0.5 \x1b[31m"),
        ("1 0.5 0.5 0.5 0.5\x00", r"0.5\x00"),
        ("1 " + "0 " * 100_000, "has more than 65536 values"),
        ("x" * 1_000_000, "not all are numbers: xxx"),
    ],
)
def test_lines_that_are_wrong_are_named(root: Path, line: str, message: str) -> None:
    path = root / "labels/train/a.txt"
    path.write_text(f"1 0.5 0.5 0.5 0.5\n\n{line}\n0 0.5 0.5 1 1\n")
    error = fails(root)
    assert error.startswith(f"{path}:3: ")
    assert message in error
    problems: list[DataError] = []
    data = open_quietly(root, problems=problems)
    assert [str(problem) for problem in problems] == [error]
    assert boxes_of(data) == [[10, 5, 30, 15], [0, 0, 40, 20]]


def test_keypoints_without_their_shape_are_no_polygon(root: Path) -> None:
    path = root / "labels/train/a.txt"
    path.write_text("0 .5 .5 .2 .4 .45 .4 2 .55 .4 0\n")
    assert "a.txt:1: the line is a box with keypoints" in fails(root)
    # A polygon that touches the sides of the image, and one of another number of points.
    path.write_text("0 0 0 .5 0 1 0 1 1 .5 1\n0 .1 .1 .5 .1 .9 .9 .5 .9\n")
    assert len(boxes_of(open_quietly(root))) == 2


def test_keypoints_are_not_corners(root: Path) -> None:
    configure(root, f"train: images/train\n{NAMES}kpt_shape: [2, 3]\n")
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.5 0.5 0 0 2 0.9 0.9 1\n")
    assert boxes_of(open_quietly(root)) == [[10, 5, 30, 15]]
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.5 0.5 0 0\n")
    assert "has 7 values, not 5 (a box) or 11" in fails(root)
    configure(root, f"train: images/train\n{NAMES}kpt_shape: 17\n")
    assert "data.yaml: kpt_shape is '17', not two numbers" in fails(root)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_ends_of_lines(root: Path, encoding: str, end: str) -> None:
    for path, text in (
        (root / "data.yaml", "path: .\ntrain: list.txt\nnames:\n- Käse\n- 犬\n"),
        (root / "list.txt", "\n./images/train/a.jpg\n\n  images/train/part/b.jpg\t\n"),
        (root / "labels/train/a.txt", "\n1 0.5 0.5 0.5 0.5\n\n\n0 0.5 0.5 1 1"),
    ):
        path.write_bytes(text.replace("\n", end).encode(encoding))
    data = open_quietly(root)
    assert data.class_names == ("Käse", "犬")
    assert data.ids == ("images/train/a.jpg", "images/train/part/b.jpg")
    assert data[0][1]["labels"].tolist() == [2, 1]


def test_exif_orientation_is_applied(root: Path) -> None:
    """Shares are of the image as it is shown: here 20 wide and 40 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "images/train/a.jpg", (40, 20), exif=exif)
    (root / "labels/train/a.txt").write_text("1 0.25 0.5 0.5 1\n")
    data, messages = warnings_of(root)
    assert len(messages) == 1
    assert "1 image(s) whose EXIF orientation is applied" in messages[0]
    assert data[0][0].shape == (3, 40, 20)
    assert boxes_of(data) == [[0, 0, 10, 40]]
    assert boxes_of(warnings_of(root, orientation="stored")[0]) == [[0, 0, 20, 20]]


def test_labels_lie_beside_images_where_there_is_no_other_folder(root: Path) -> None:
    picture(root / "obj/c.jpg")
    label(root / "obj/c.txt", "0 0.5 0.5 1 1")
    assert boxes_of(open_quietly(configure(root, f"train: obj\n{NAMES}"))) == [[0, 0, 40, 20]]
    picture(root / "images/own/c.jpg")
    label(root / "images/own/c.txt", "1 0.5 0.5 0.5 1")
    assert boxes_of(open_quietly(configure(root, f"train: images/own\n{NAMES}"))) == [[10, 0, 30, 20]]


def test_labels_are_those_of_the_last_images_in_the_path(root: Path) -> None:
    picture(root / "images/x/images/c.v2.jpg")
    label(root / "images/x/labels/c.v2.txt", "0 0.5 0.5 1 1")
    label(root / "labels/x/images/c.v2.txt", "1 0.5 0.5 1 1")
    data, messages = warnings_of(configure(root, f"train: images/x\n{NAMES}"))
    assert data[0][1]["labels"].tolist() == [1]
    assert len(messages) == 1
    assert "1 file(s) of labels without an image: labels/x/images/c.v2.txt" in messages[0]


def test_labels_are_not_read_beside_the_data_set(tmp_path: Path) -> None:
    """A folder `images` above the data set is none of its own."""
    picture(tmp_path / "images/set/c.jpg")
    label(tmp_path / "images/set/c.txt", "0 0.5 0.5 1 1")
    label(tmp_path / "labels/set/c.txt", "1 0.5 0.5 1 1")
    data = open_quietly(configure(tmp_path / "images/set", f"train: .\n{NAMES}"))
    assert data[0][1]["labels"].tolist() == [1]


def test_what_has_no_counterpart_is_counted(root: Path) -> None:
    for stem in ("c", "d"):
        picture(root / f"images/train/{stem}.png")
    label(root / "labels/train/empty.txt", "")
    label(root / "labels/train/lost/e.txt", "x")
    label(root / "labels/train/classes.txt", "cat\ndog\n")
    label(root / "labels/train/.hidden.txt", "")
    label(root / "labels/val/other.txt", "")
    data, messages = warnings_of(root)
    assert [len(data[index][1]["boxes"]) for index in range(4)] == [1, 0, 0, 1]
    assert len(messages) == 2
    assert "2 image(s) without a file of labels, taken as background: " in messages[0]
    assert "images/train/c.png has no labels/train/c.txt; images/train/d.png has" in messages[0]
    assert "2 file(s) of labels without an image: labels/train/empty.txt; labels/train/lost/e.txt" in messages[1]
    (root / "list.txt").write_text("images/train/a.jpg")
    open_quietly(configure(root, f"train: list.txt\n{NAMES}"))


def test_images_with_a_file_of_labels_in_common_are_named(root: Path) -> None:
    picture(root / "images/train/a.png")
    picture(root / "images/train/part/a.png")
    label(root / "labels/train/part/a.txt", "")
    data, messages = warnings_of(root)
    assert len(data) == 4
    assert len(messages) == 1
    assert "1 file(s) of labels that several images have in common: labels/train/a.txt of a.jpg, a.png" in messages[0]


@pytest.mark.parametrize("name", ["a.jpg", "dangling.jpg", "pipe.jpg", "no image.jpg", "escape\x1b.jpg"])
def test_images_that_are_none_are_named(root: Path, name: str) -> None:
    path = root / "images/train" / name
    path.unlink(missing_ok=True)
    if name == "pipe.jpg":
        os.mkfifo(path)
    elif name == "dangling.jpg":
        path.symlink_to(root / "nowhere.jpg")
    elif name == "a.jpg":
        path.symlink_to(path)
    else:
        path.write_bytes(b"no image")
    problems: list[DataError] = []
    data, _ = warnings_of(root, problems=problems)
    assert len(problems) == 1
    assert str(problems[0]).startswith(str(root / "images/train" / name[:6]))
    with pytest.raises(DataError, match=re.escape(str(problems[0]))):
        YOLO(root)
    assert path not in {data.image_path(k) for k in range(len(data))}
    assert "images/train/part/b.jpg" in data.ids


def test_files_of_labels_that_cannot_be_read_are_named(root: Path) -> None:
    path = root / "labels/train/a.txt"
    problems: list[DataError] = []
    for content, message in (
        (b"1 0.5 0.5 0.5 0.5 \xff\n", "text is neither UTF-8 nor UTF-16 with a byte order mark: 'utf-8' codec"),
        (b"\xfe\xff1", "text is neither UTF-8 nor UTF-16 with a byte order mark: 'utf-16"),
        (b"\n" * 70_000 + b"0 0.5 0.5 1 1", "file has more than 65536 lines"),
    ):
        path.write_bytes(content)
        assert f"{path}: the {message}" in fails(root)
    with path.open("wb") as file:
        file.truncate(65 << 20)
    assert f"{path}: the file has more than 16 MB" in fails(root)
    path.unlink()
    path.symlink_to(path.with_name("nowhere.txt"))
    assert f"{path}: no such file" in fails(root)
    path.unlink()
    os.mkfifo(path)
    assert f"{path}: the file cannot be read: a pipe, not a file" in fails(root)
    path.unlink()
    path.symlink_to(path)
    assert f"{path}: the file cannot be read" in fails(root)
    path.unlink()
    path.mkdir()
    assert f"{path}: the file cannot be read: a folder, not a file" in fails(root)
    # The image is left out, and not taken as background.
    assert open_quietly(root, problems=problems).ids == ("images/train/part/b.jpg",)
    assert len(problems) == 1
