"""`fastdet lint`."""

import json
import shutil
from pathlib import Path

from PIL import Image

from fastdet.cli.main import main
from fastdet.data import COCO, VOC
from tests.helpers.cli import message
from tests.helpers.voc import write_voc


def found_in(folder: Path, part: str) -> dict[str, list[str]]:
    """What lint.json has of a part, by the words of the kind."""
    content = json.loads((folder / "lint.json").read_text())
    return {finding["kind"]: finding["items"] for finding in content["findings"][part]}


def test_lint_lists_classes_that_only_validation_has(tree, tmp_path, capsys):
    other = write_voc(tmp_path / "other", {"test": 2})
    for path in (other / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("<name>", "<name>un"))
    lint = ["lint", "--data", f"voc:{tree}", "--val-data", f"voc:{other}", "--out", tmp_path / "lint"]
    message(capsys, *lint, code=1)
    content = json.loads((tmp_path / "lint/lint.json").read_text())
    (unread,) = [finding["items"] for finding in content["findings"]["val"] if "cannot be read" in finding["kind"]]
    assert len(unread) == 2
    assert all("is not among the 4 class names" in text for text in unread)


def test_lint_of_a_right_data_set(tree, tmp_path, capsys):
    assert main(["lint", "--data", f"voc:{tree}", "--out", str(tmp_path / "lint")]) == 0
    printed = capsys.readouterr()
    assert printed.err == "", "no bar where stderr is no terminal"
    lines = printed.out.splitlines()
    assert lines[0].split() == ["class", "boxes", "side", "IoU", ".5", ".7", "found", ".5", ".7"]
    assert any(line.startswith("options for the found anchors: --anchor-sizes ") for line in lines)
    content = json.loads((tmp_path / "lint/lint.json").read_text())
    assert content["images"] == {"train": 6, "val": 3}
    train = VOC(tree, "trainval")
    counts = [label for index in range(6) for label in train.target(index)["labels"].tolist()]
    for label, name in enumerate(train.class_names, start=1):
        assert content["classes"][name]["boxes"] == counts.count(label)
    assert not [finding for part in content["findings"].values() for finding in part if finding["is_error"]]


def test_the_table_of_lint_has_the_classes_with_boxes(tree, tmp_path, capsys):
    lint = ["lint", "--data", f"voc:{tree}", "--classes", "star,moon", "--out", str(tmp_path / "lint")]
    assert main(lint) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["class", "star", "resizing:"]
    assert found_in(tmp_path / "lint", "train")["class(es) without a box"] == ["moon"]


def test_lint_of_a_wrong_data_set(tree, tmp_path, capsys):
    path = tree / "Annotations/trainval_2.xml"
    bad = "<object><name>star</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>9</xmax><ymax>30</ymax></bndbox></object>"
    path.write_text(path.read_text().replace("</annotation>", f"{bad}</annotation>"))
    image = tree / "JPEGImages/trainval_4.jpg"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    lint = ["lint", "--data", f"voc:{tree}", "--out", tmp_path / "lint", "--fix", tmp_path / "fixed"]
    assert "lint.json" in message(capsys, *lint, code=1)
    assert before == {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    content = json.loads((tmp_path / "lint/lint.json").read_text())
    errors = {finding["kind"]: finding["items"] for finding in content["findings"]["train"] if finding["is_error"]}
    assert [list(map(str, items)) for kind, items in errors.items() if "left out" in kind] == [
        ["trainval_2 star (9, 9, 9, 30)"]
    ]
    assert [len(items) for kind, items in errors.items() if "decoded" in kind] == [1]
    with Image.open(tmp_path / "lint/train.png") as picture:
        assert picture.width > 64
    assert "there already" in message(capsys, *lint)
    for part, count in (("train", 5), ("val", 3)):
        folder = tmp_path / "fixed" / part
        assert len(COCO(folder / "images", folder / "instances.json")) == count
    fixed = [f"coco:{tmp_path}/fixed/{part}/images,{tmp_path}/fixed/{part}/instances.json" for part in ("train", "val")]
    again = ["lint", "--data", fixed[0], "--val-data", fixed[1], "--out", str(tmp_path / "again")]
    assert main(again) == 0


def test_lint_names_every_file_that_is_missing(tree, tmp_path, capsys):
    for stem in ("trainval_1", "trainval_3"):
        (tree / f"JPEGImages/{stem}.jpg").unlink()
    (tree / "Annotations/trainval_0.xml").unlink()
    message(capsys, "lint", "--data", f"voc:{tree}", "--out", tmp_path / "lint", code=1)
    content = json.loads((tmp_path / "lint/lint.json").read_text())
    (missing,) = [f["items"] for f in content["findings"]["train"] if "cannot be read" in f["kind"]]
    assert len(missing) == 3
    assert content["images"]["train"] == 3


def test_pictures_of_lint_are_not_larger_than_needed(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    Image.new("L", (4000, 3000)).save(tmp_path / "set/a.png")
    box = {"image_id": 1, "category_id": 1, "bbox": [3900, 10, 300, 50]}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [box],
        "categories": [{"id": 1, "name": "b"}],
    }
    (tmp_path / "set/all.json").write_text(json.dumps(content))
    data = f"coco:{tmp_path}/set,{tmp_path}/set/all.json"
    assert main(["lint", "--data", data, "--out", str(tmp_path / "lint")]) == 0
    with Image.open(tmp_path / "lint/train.png") as picture:
        assert max(picture.size) < 900


def test_lint_of_a_data_set_with_nothing_to_evaluate_on(tree, tmp_path, capsys):
    (tree / "ImageSets/Main/test.txt").unlink()
    message(capsys, "lint", "--data", f"voc:{tree}", "--out", tmp_path / "lint", code=1)
    content = json.loads((tmp_path / "lint/lint.json").read_text())
    assert content["images"] == {"train": 6}
    (missing,) = [finding["items"] for finding in content["findings"]["train"] if finding["is_error"]]
    assert "no list of a split test" in missing[0]


def test_lint_lists_what_is_found_once(tree, tmp_path, capsys):
    """Of the parts of one data set, what is about an image belongs to its part, and the rest to the first."""
    (tree / "Annotations/more").mkdir()
    shutil.copyfile(tree / "Annotations/test_0.xml", tree / "Annotations/more/x.xml")
    shutil.rmtree(tree / "ImageSets")
    bad = "<object><name>star</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>9</xmax><ymax>30</ymax></bndbox></object>"
    stems = sorted(path.stem for path in (tree / "Annotations").glob("*.xml"))
    for stem in stems:
        path = tree / f"Annotations/{stem}.xml"
        path.write_text(path.read_text().replace("</annotation>", f"{bad}</annotation>"))
    lint = ["lint", "--data", f"voc:{tree}", "--val-share", "0.5", "--out", tmp_path / "lint"]
    message(capsys, *lint, code=1)
    train, val = (found_in(tmp_path / "lint", part) for part in ("train", "val"))
    inner = "folder(s) with XML files inside that of the XML files, not read"
    assert train[inner] == ["more"]
    assert inner not in val
    (kind,) = [kind for kind in train if "left out" in kind]
    assert sorted(train[kind] + val[kind]) == [f"{stem} star (9, 9, 9, 30)" for stem in stems]
    message(capsys, *lint[:3], "--limit", "2", "--out", tmp_path / "lint", code=1)
    assert len(found_in(tmp_path / "lint", "train")[kind]) == 2


def test_lint_uses_the_anchors_that_are_asked_for(tree, tmp_path, capsys):
    lint = ["lint", "--data", f"voc:{tree}", "--out", str(tmp_path / "lint")]
    shown = {}
    for anchors in ("auto", "default"):
        main([*lint, "--anchors", anchors])
        lines = capsys.readouterr().out.splitlines()
        shown[anchors] = [next(line for line in lines if line.startswith(part)) for part in ("used: ", "found: ")]
    (used, found), (default, _) = shown["auto"], shown["default"]
    assert used.removeprefix("used: ") == found.removeprefix("found: ")
    assert "(the backbone's)" in default
    assert "does not go with" in message(capsys, *lint, "--anchors", "auto", "--anchor-sizes", "8,16,32,64")
