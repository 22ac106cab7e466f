"""What lint finds in data sets that are broken on purpose, and that a cleaned copy has none of it."""

import shutil
from pathlib import Path

import pytest
import torch

from fastdet.data import COCO, VOC, YOLO, DataError, JoinedImages
from fastdet.data.convert import write_coco
from fastdet.data.lint import clean, find_shared_images, lint
from tests.helpers.voc import write_voc
from tests.helpers.yolo import write_yolo


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_voc(tmp_path / "voc", {"train": 6, "test": 3})


def check(root: Path, split: str = "train"):
    problems: list[DataError] = []
    data = JoinedImages([VOC(root, split, problems=problems)])
    return data, lint(data, problems)


def kinds(found) -> dict[str, list[str]]:
    return {finding.kind: finding.items for finding in found.findings}


def add_object(root: Path, stem: str, name: str, box: tuple[int, int, int, int]) -> None:
    path = root / f"Annotations/{stem}.xml"
    corners = "".join(f"<{k}>{x}</{k}>" for k, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    text = path.read_text().replace("</annotation>", "")
    path.write_text(f"{text}<object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>")


def test_nothing_is_wrong_in_drawn_shapes(root):
    data, found = check(root)
    assert not [finding for finding in found.findings if finding.is_error]
    assert len({digest for digest in found.digests if digest}) == len(data)
    assert found.unreadable == []


@pytest.mark.filterwarnings("ignore")
def test_each_fault_is_found_and_cleaned(root, tmp_path):
    images, annotations = root / "JPEGImages", root / "Annotations"
    content = (images / "train_1.jpg").read_bytes()
    (images / "train_1.jpg").write_bytes(content[: len(content) // 2])
    (images / "train_2.jpg").unlink()
    shutil.copyfile(images / "train_0.jpg", images / "train_3.jpg")
    (annotations / "train_4.xml").write_text("<annotation>")
    add_object(root, "train_5", "star", (10, 10, 10, 30))
    add_object(root, "train_5", "star", (100, 10, 120, 30))
    add_object(root, "train_5", "star", (5, 5, 25, 25))
    add_object(root, "train_5", "star", (5, 5, 25, 25))
    add_object(root, "train_5", "circle", (30, 30, 50, 50))
    add_object(root, "train_5", "square", (30, 30, 50, 50))
    add_object(root, "train_5", "square", (40, 40, 70, 64))
    data, found = check(root)
    assert data.ids == ("train_0", "train_1", "train_3", "train_5")
    listed = kinds(found)
    unread = listed.pop("image(s) or annotation(s) that cannot be read")
    assert sorted("train_2" in text for text in unread) == sorted("train_4" in text for text in unread) == [False, True]
    (undecodable,) = listed.pop("image(s) that cannot be decoded")
    assert "train_1.jpg" in undecodable
    assert found.unreadable == [1]
    assert listed.pop("image(s) whose pixels another has too") == ["train_0, train_3"]
    assert listed.pop("box(es) left out, empty, not finite or outside the image") == [
        "train_5.xml star (10, 10, 10, 30)",
        "train_5.xml star (100, 10, 120, 30)",
    ]
    twice = listed.pop("box(es) that are there twice")
    assert "train_5 star (4, 4, 25, 25)" in twice
    assert "train_5 circle and square (29, 29, 50, 50)" in twice
    assert listed.pop("box(es) that reach over the border by more than a pixel") == ["train_5 (39, 39, 70, 64)"]
    listed.pop("class(es) without a box", None)
    assert not listed
    marked = {mark.text for finding in found.findings for mark in finding.marks}
    assert {"star: left out", "star: there twice", "square: there twice", "square: over the border"} <= marked

    cleaned, repeated = clean(data, found)
    assert cleaned.ids == ("train_0", "train_5")
    write_coco(cleaned, tmp_path / "clean", leave_out=repeated)
    copy = COCO(tmp_path / "clean/images", tmp_path / "clean/instances.json")
    assert torch.equal(copy[0][0], data[0][0])
    again = lint(JoinedImages([copy]), ())
    left = {finding.kind: finding.items for finding in again.findings if finding.is_error}
    # Which of two classes is right only a person can say.
    assert [len(items) for items in left.values()] == [1]
    assert "circle and square" in left["box(es) that are there twice"][0]


def test_images_to_evaluate_on_that_are_trained_on(root):
    shutil.copyfile(root / "JPEGImages/train_3.jpg", root / "JPEGImages/test_1.jpg")
    train, of_train = check(root)
    val, of_val = check(root, "test")
    both = find_shared_images(train, val, of_train, of_val)
    assert (both.is_error, both.items) == (True, ["test_1 as train_3"])
    cleaned, _ = clean(train, of_train, of_val.digests)
    assert cleaned.ids == ("train_0", "train_1", "train_2", "train_4", "train_5")
    assert not find_shared_images(cleaned, val, lint(cleaned, ()), of_val).items


def test_crowds_may_lie_on_objects(root):
    add_object(root, "train_0", "star", (5, 5, 25, 25))
    path = root / "Annotations/train_0.xml"
    path.write_text(path.read_text().replace("</annotation>", "") + "</annotation>")
    add_object(root, "train_0", "star", (5, 5, 25, 25))
    _, found = check(root)
    assert "box(es) that are there twice" in kinds(found)
    text = path.read_text()
    last = text.rindex("<bndbox>")
    path.write_text(f"{text[:last]}<difficult>1</difficult>{text[last:]}")
    _, found = check(root)
    assert "box(es) that are there twice" not in kinds(found)


def test_of_boxes_that_are_there_twice_one_stays(root):
    for _ in range(3):
        add_object(root, "train_0", "star", (5, 5, 25, 25))
    data, found = check(root)
    rows = [row for row, box in enumerate(data.target(0)["boxes"].tolist()) if box == [4, 4, 25, 25]]
    assert found.repeated_boxes == {0: rows[1:]}


def test_boxes_are_compared_with_those_that_stay(root):
    for k in range(6):
        add_object(root, "train_0", "star", (2, 2, 40, 40 + 3 * k))
    for name in ("circle", "square", "square"):
        add_object(root, "train_1", name, (30, 30, 60, 60))
    data, found = check(root)
    boxes = data.target(0)["boxes"].tolist()
    left = [box for row, box in enumerate(boxes) if row not in found.repeated_boxes[0] and box[:3] == [1, 1, 40]]
    assert [box[3] for box in left] == [40, 46, 52]
    assert found.repeated_boxes[1] == [len(data.target(1)["labels"]) - 1]


def test_images_without_labels_are_no_error(tmp_path):
    path = write_yolo(tmp_path / "yolo", {"train": 3})
    next((tmp_path / "yolo/labels/train").iterdir()).unlink()
    found = lint(JoinedImages([YOLO(path)]), ())
    assert not [finding for finding in found.findings if finding.is_error]
    assert any("taken as background" in finding.kind for finding in found.findings)
