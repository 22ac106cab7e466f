"""What lint finds in data sets that are broken on purpose, and that a cleaned copy has none of it."""

import json
import shutil
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from fastdet.data import COCO, VOC, YOLO, DataError, JoinedImages
from fastdet.data.convert import write_coco
from fastdet.data.findings import Kind, group
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


def kinds(found) -> dict[Kind, list[str]]:
    return {kind: [finding.text for finding in of_kind] for kind, of_kind in group(found.findings).items()}


def add_object(root: Path, stem: str, name: str, box: tuple[int, int, int, int]) -> None:
    path = root / f"Annotations/{stem}.xml"
    corners = "".join(f"<{k}>{x}</{k}>" for k, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    text = path.read_text().replace("</annotation>", "")
    path.write_text(f"{text}<object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>")


def test_nothing_is_wrong_in_drawn_shapes(root):
    data, found = check(root)
    assert not [finding for finding in found.findings if finding.kind.is_error]
    assert len({digest for digest in found.digests if digest}) == len(data)
    assert all(found.digests)


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
    unread = listed.pop(Kind.UNREADABLE)
    assert sorted("train_2" in text for text in unread) == sorted("train_4" in text for text in unread) == [False, True]
    (undecodable,) = listed.pop(Kind.UNDECODABLE)
    assert "train_1.jpg" in undecodable
    assert [bool(digest) for digest in found.digests] == [True, False, True, True]
    counts = [len(data.target(index)["labels"]) for index in (2, 0)]
    assert listed.pop(Kind.EQUAL_PIXELS) == [f"train_3 ({counts[0]} boxes) as train_0 ({counts[1]} boxes)"]
    assert listed.pop(Kind.BOX_LEFT_OUT) == [
        "train_5 star (10, 10, 10, 30)",
        "train_5 star (100, 10, 120, 30)",
    ]
    twice = listed.pop(Kind.BOX_TWICE)
    assert "train_5 star (4, 4, 25, 25)" in twice
    assert "train_5 circle and square (29, 29, 50, 50)" in twice
    assert listed.pop(Kind.OVER_BORDER) == ["train_5 (39, 39, 70, 64)"]
    listed.pop(Kind.CLASS_WITHOUT_BOX, None)
    assert not listed
    marked = {finding.mark.text for finding in found.findings if finding.mark}
    assert {"star: left out", "star: there twice", "square: there twice", "square: over the border"} <= marked

    cleaned, repeated = clean(data, found)
    assert cleaned.ids == ("train_0", "train_3", "train_5")
    write_coco(cleaned, tmp_path / "clean", leave_out=repeated)
    copy = COCO(tmp_path / "clean/images", tmp_path / "clean/instances.json")
    assert torch.equal(copy[0][0], data[0][0])
    again = lint(JoinedImages([copy]), ())
    # Which of two classes is right, and which of two annotations, only a person can say.
    left = {kind: texts for kind, texts in kinds(again).items() if kind.is_error}
    assert left.keys() == {Kind.EQUAL_PIXELS, Kind.BOX_TWICE}
    assert "circle and square" in left[Kind.BOX_TWICE][0]


def test_images_to_evaluate_on_that_are_trained_on(root):
    shutil.copyfile(root / "JPEGImages/train_3.jpg", root / "JPEGImages/test_1.jpg")
    train, of_train = check(root)
    val, of_val = check(root, "test")
    both = find_shared_images(train, val, of_train, of_val)
    counts = [len(data.target(index)["labels"]) for data, index in ((val, 1), (train, 3))]
    assert [finding.text for finding in both] == [f"test_1 ({counts[0]} boxes) as train_3 ({counts[1]} boxes)"]
    cleaned, _ = clean(train, of_train, of_val.digests)
    assert cleaned.ids == ("train_0", "train_1", "train_2", "train_4", "train_5")
    assert not find_shared_images(cleaned, val, lint(cleaned, ()), of_val)


def test_crowds_may_lie_on_objects(root):
    add_object(root, "train_0", "star", (5, 5, 25, 25))
    path = root / "Annotations/train_0.xml"
    path.write_text(path.read_text().replace("</annotation>", "") + "</annotation>")
    add_object(root, "train_0", "star", (5, 5, 25, 25))
    _, found = check(root)
    assert Kind.BOX_TWICE in kinds(found)
    text = path.read_text()
    last = text.rindex("<bndbox>")
    path.write_text(f"{text[:last]}<difficult>1</difficult>{text[last:]}")
    _, found = check(root)
    assert Kind.BOX_TWICE not in kinds(found)


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
    (tmp_path / "yolo/labels/train/train_0.txt").unlink()
    found = lint(JoinedImages([YOLO(path)]), ())
    assert not [finding for finding in found.findings if finding.kind.is_error]
    assert kinds(found)[Kind.WITHOUT_LABELS] == ["images/train/train_0.jpg has no labels/train/train_0.txt"]


def test_of_images_with_equal_pixels_and_boxes_one_stays(root):
    for source, copy in (("train_1", "train_3"), ("train_0", "train_4")):
        for name in ("JPEGImages/{}.jpg", "Annotations/{}.xml"):
            shutil.copyfile(root / name.format(source), root / name.format(copy))
    path = root / "Annotations/train_3.xml"
    parts = path.read_text().split("<object>")
    path.write_text("<object>".join([parts[0], *reversed([part.removesuffix("</annotation>") for part in parts[1:]])]))
    path.write_text(path.read_text() + "</annotation>")
    add_object(root, "train_4", "star", (1, 1, 60, 20))
    data, found = check(root)
    counts = [len(data.target(index)["labels"]) for index in range(6)]
    assert kinds(found)[Kind.EQUAL_IMAGE] == [f"train_3 ({counts[3]} boxes) as train_1 ({counts[1]} boxes)"]
    assert kinds(found)[Kind.EQUAL_PIXELS] == [f"train_4 ({counts[4]} boxes) as train_0 ({counts[0]} boxes)"]
    assert clean(data, found)[0].ids == ("train_0", "train_1", "train_2", "train_4", "train_5")


@pytest.mark.parametrize("places", ["spread", "one", "row"])
def test_ten_thousand_boxes_of_an_image(tmp_path, places):
    count, rng = 10_000, np.random.default_rng(0)
    corners = {"spread": rng.uniform(0, 900, (count, 2)), "one": np.ones((count, 2))}.get(places)
    if corners is None:
        corners = np.stack((np.arange(count) * 0.09, np.full(count, 7)), 1)
    sides = np.full((count, 2), 0.08 if places == "row" else 30)
    Image.new("L", (1000, 1000)).save(tmp_path / "a.png")
    boxes = np.concatenate((corners, sides), 1).tolist()
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box} for box in boxes],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    data = JoinedImages([COCO(tmp_path, tmp_path / "all.json")])
    before = time.process_time()
    found = lint(data, ())
    assert time.process_time() - before < 2
    target = torch.from_numpy(data.target(0)["boxes"])[:500]
    repeated = [row for row in found.repeated_boxes.get(0, []) if row < 500]
    kept: list[int] = []
    for row in range(500):
        if not (box_iou(target[row : row + 1], target[kept]) >= 0.9).any():
            kept.append(row)
    assert repeated == sorted(set(range(500)) - set(kept))


@pytest.mark.parametrize("axis", [0, 1])
def test_every_box_that_is_shifted_by_a_tenth_is_found(tmp_path, axis):
    """Pairs of boxes, the second moved along one axis, or only its first corner; an IoU just above and below .9."""
    rng, boxes, expected = np.random.default_rng(axis), [], []
    for change in np.linspace(-0.12, 0.12, 60):
        for is_moved in (True, False):
            low, side = rng.uniform(0, 50, 2), rng.uniform(20, 40, 2)
            row, column = divmod(len(boxes) // 2, 12)
            low += (100 * row, 100 * column)
            other_low, other_side = low.copy(), side.copy()
            other_low[axis] += change * side[axis]
            other_side[axis] -= 0 if is_moved else change * side[axis]
            boxes += [[*low, *side], [*other_low, *other_side]]
            corners = torch.tensor([[*low, *(low + side)], [*other_low, *(other_low + other_side)]])
            if box_iou(corners[:1], corners[1:]).item() >= 0.9:
                expected.append(len(boxes) - 1)
    Image.new("L", (1300, 1300)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box} for box in boxes],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    found = lint(JoinedImages([COCO(tmp_path, tmp_path / "all.json")]), ())
    assert found.repeated_boxes == {0: expected}
    assert 40 < len(expected) < 100


def test_images_of_one_name_are_named_by_their_paths(root, tmp_path):
    other = write_voc(tmp_path / "other", {"train": 1})
    data = JoinedImages([VOC(root, "train"), VOC(other, "train")])
    (text,) = kinds(lint(data, ()))[Kind.EQUAL_IMAGE]
    assert text.startswith(f"{other}/JPEGImages/train_0.jpg (")
    assert f") as {root}/JPEGImages/train_0.jpg (" in text


def test_classes_that_only_case_tells_apart(root):
    for name in ("Star", "star"):
        add_object(root, "train_0", name, (1, 1, 60, 20))
    _, found = check(root)
    assert kinds(found)[Kind.SIMILAR_CLASS] == ["star and Star"]


def test_a_data_set_without_a_box_is_an_error(root):
    for path in (root / "Annotations").glob("train_*.xml"):
        path.write_text(path.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>"))
    _, found = check(root)
    assert kinds(found)[Kind.WITHOUT_BOX] == ["6 images"]
    assert Kind.WITHOUT_BOX not in kinds(check(root, "test")[1])


def test_classes_that_only_the_form_of_an_accent_tells_apart(root):
    for stem, form in (("train_0", "NFC"), ("train_1", "NFD")):
        add_object(root, stem, unicodedata.normalize(form, "Käse"), (10, 10, 30, 30))
    assert len(kinds(check(root)[1])[Kind.SIMILAR_CLASS]) == 1
