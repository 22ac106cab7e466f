"""COCO's format: what it gives, and what it reports of files that are wrong."""

import json
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastdet.data import COCO, VOC, DataError
from tests.helpers.voc import write_voc

Content = dict[str, Any]


def annotation(image: Any, category: int, bbox: list[Any], **more: Any) -> Content:
    return {"image_id": image, "category_id": category, "bbox": bbox, **more}


@pytest.fixture
def content(tmp_path: Path) -> Content:
    """Two images: `a` with a cat, a dog and a crowd of dogs, `b`, in a folder of its own, with nothing."""
    (tmp_path / "images/part").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "images/a.jpg")
    Image.new("RGB", (40, 30)).save(tmp_path / "images/part/b.png")
    return {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 3, "file_name": "part/b.png", "width": 40, "height": 30},
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "horse"}],
        "annotations": [
            annotation(7, 9, [10, 5, 10, 10]),
            annotation(7, 2, [0.5, 0, 39.5, 30], iscrowd=0),
            annotation(7, 2, [1, 2, 3, 4], iscrowd=1),
        ],
    }


def open_coco(root: Path, content: object, **options: Any) -> COCO:
    (root / "instances.json").write_text(json.dumps(content))
    return COCO(root / "images", root / "instances.json", **options)


def test_items(tmp_path: Path, content: Content) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_coco(tmp_path, content)
    assert data.class_names == ("dog", "horse", "cat")
    assert data.ids == ("a.jpg", "part/b.png")
    image, target = data[0]
    assert image.shape == (3, 30, 40)
    assert target["boxes"].tolist() == [[10, 5, 20, 15], [0.5, 0, 40, 30], [1, 2, 4, 6]]
    assert target["labels"].tolist() == [3, 1, 1]
    assert target["ignore"].tolist() == [False, False, True]
    assert data[1][1]["boxes"].shape == (0, 4)
    assert data.image_path(1) == tmp_path / "images/part/b.png"
    assert open_coco(tmp_path, content, class_names=["cat", "dog"])[0][1]["labels"].tolist() == [1, 2, 2]
    with pytest.raises(DataError, match=r"instances\.json images\[0\]: class 'dog' is not among"):
        open_coco(tmp_path, content, class_names=["cat"])


def test_one_data_set_in_two_formats_is_the_same(tmp_path: Path) -> None:
    voc = VOC(write_voc(tmp_path / "voc", {"train": 5}), "train")
    images, annotations = [], []
    for index in range(len(voc)):
        images.append({"id": index, "file_name": voc.image_path(index).name})
        for box, label in zip(*(voc[index][1][name].tolist() for name in ("boxes", "labels")), strict=True):
            annotations.append(annotation(index, label, [*box[:2], box[2] - box[0], box[3] - box[1]]))
    categories = [{"id": label, "name": name} for label, name in enumerate(voc.class_names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "voc.json").write_text(json.dumps(content))
    coco = COCO(tmp_path / "voc/JPEGImages", tmp_path / "voc.json")
    assert coco.class_names == voc.class_names
    for index in range(len(voc)):
        torch.testing.assert_close(coco[index], voc[index], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("file", "written"),
    [("a.JPG", "a.jpg"), ("a.png", "C:\\pictures\\a.jpg"), ("a.jpg", "/home/me/a.jpg"), ("a.jpg", "../../a.jpg")],
)
def test_images_are_found_in_the_folder_alone(tmp_path: Path, content: Content, file: str, written: str) -> None:
    (tmp_path / "images/a.jpg").rename(tmp_path / "images" / file)
    content["images"][0]["file_name"] = written
    assert open_coco(tmp_path, content).image_path(0) == tmp_path / "images" / file


def test_images_that_are_not_there_or_not_one(tmp_path: Path, content: Content) -> None:
    content["images"][0]["file_name"] = "c\x1b.jpg"
    with pytest.raises(DataError, match=r"images\[0\]: no image fits 'c\\x1b\.jpg' in") as caught:
        open_coco(tmp_path, content)
    assert str(caught.value).isprintable()
    content["images"][0]["file_name"] = "a.bmp"
    Image.new("RGB", (40, 30)).save(tmp_path / "images/a.png")
    with pytest.raises(DataError, match=r"several of a\.jpg, a\.png fit 'a\.bmp'"):
        open_coco(tmp_path, content)
    content["images"][0]["file_name"] = "x" * 100_000
    with pytest.raises(DataError, match="no image fits 'x"):
        open_coco(tmp_path, content)
    with pytest.raises(DataError, match="no such folder"):
        COCO(tmp_path / "nowhere", tmp_path / "instances.json")
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        COCO(tmp_path, tmp_path / "nowhere.json")


def test_what_does_not_fit_is_counted(tmp_path: Path, content: Content) -> None:
    content["images"][0].update(width=30, height=40)
    content["images"][1].pop("width")
    bad = [[50, 0, 3, 3], [0, 0, 0, 9], [0, 0, 5, -5], [float("nan"), 0, 5, 5], [0, 0, 10**400, 5], [-9, 0, 9, 5]]
    content["annotations"] += [annotation(7, 2, box) for box in bad] + [annotation(99, 2, [0, 0, 5, 5])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = open_coco(tmp_path, content)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 3
    assert "1 annotation(s) of images that are not listed, left out: instances.json annotations[9] of 99" in messages[0]
    assert "1 annotation(s) of another size than the image" in messages[1]
    assert "instances.json images[0] 30 x 40, a.jpg 40 x 30" in messages[1]
    assert "6 box(es) left out" in messages[2]
    assert len(data[0][1]["boxes"]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [], "it is a list, not an object"),
        (lambda c: {**c, "images": {}}, "it has no list 'images'"),
        (lambda c: {k: v for k, v in c.items() if k != "categories"}, "it has no list 'categories'"),
        (lambda c: {**c, "annotations": [5]}, r"annotations\[0\] is a int, not an object"),
        (lambda c: {**c, "annotations": [{"image_id": 7, "category_id": 9}]}, r"annotations\[0\] has no 'bbox'"),
        (lambda c: {**c, "annotations": [annotation(7, 9, [1, 2, 3])]}, "bbox is .*, not four numbers"),
        (lambda c: {**c, "annotations": [annotation(7, 9, [1, 2, 3, "x"])]}, "bbox is .*, not four numbers"),
        (lambda c: {**c, "annotations": [annotation(7, 1, [1, 2, 3, 4])]}, "category_id 1 is not among"),
        (lambda c: {**c, "annotations": [annotation([], 1, [1, 2, 3, 4])]}, r"image_id is \[\]"),
        (lambda c: {**c, "images": [{"id": 7}]}, r"images\[0\] has no 'file_name'"),
        (lambda c: {**c, "images": [{"id": 7, "file_name": 5}]}, r"images\[0\]: file_name is 5"),
        (lambda c: {**c, "images": c["images"] * 2}, r"images\[2\] has the id of images\[0\], 7"),
        (lambda c: {**c, "categories": [{"id": 9, "name": " "}]}, r"categories\[0\]: name is blank"),
        (lambda c: {**c, "images": [{**c["images"][0], "id": 0.5}]}, r"images\[0\]: id is 0\.5"),
        (lambda c: {**c, "images": [{**c["images"][0], "id": float("nan")}]}, r"images\[0\]: id is nan"),
    ],
)
def test_entries_that_are_wrong_are_named(tmp_path: Path, content: Content, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_coco(tmp_path, change(content))
    assert str(caught.value).startswith(str(tmp_path / "instances.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00", '{"images": [1e999999]', '"' + "x" * 10_000])
def test_files_that_are_no_json_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(DataError, match=r"instances\.json: the JSON does not parse") as caught:
        COCO(tmp_path, tmp_path / "instances.json")
    assert len(str(caught.value)) < 600


def test_files_too_large_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "instances.json").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(DataError, match=r"instances\.json: the file has more than 1024 MB"):
        COCO(tmp_path, tmp_path / "instances.json")


@pytest.mark.shared
def test_images_of_coco(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "coco_micro"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = COCO(folder / "images", folder / "instances.json")
    targets = [data[index][1] for index in range(len(data))]
    assert (len(data), len(data.class_names)) == (11, 80)
    assert sum(len(target["boxes"]) for target in targets) == 115
    assert sum(bool(target["ignore"].any()) for target in targets) == 3
    assert sum(len(target["boxes"]) == 0 for target in targets) == 1


def test_paths_with_backslashes_and_images_in_another_place(tmp_path):
    for folder in ("im", "im/train"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 9), "red" if folder == "im" else "blue").save(tmp_path / folder / "a.png")
    content = {"images": [{"id": 1, "file_name": "train\\a.png"}], "annotations": [], "categories": []}
    (tmp_path / "all.json").write_text(json.dumps(content))
    assert COCO(tmp_path / "im", tmp_path / "all.json")[0][0][:, 0, 0].tolist() == [0, 0, 255]
    content["images"][0]["file_name"] = "val/a.png"
    (tmp_path / "all.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"or with another suffix than is listed: a\.png for val/a\.png"):
        COCO(tmp_path / "im", tmp_path / "all.json")


@pytest.mark.parametrize(("value", "crowd"), [("0", False), ("false", False), ("1", True), (1, True), (False, False)])
def test_crowds_by_words(tmp_path, value, crowd):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "iscrowd": value}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [box],
        "categories": [{"id": 1, "name": "b"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    assert COCO(tmp_path, tmp_path / "all.json")[0][1]["ignore"].tolist() == [crowd]


def test_categories_of_one_name_are_one_class(tmp_path: Path, content: Content) -> None:
    content["categories"] = [{"id": 9, "name": "dog "}, {"id": 2, "name": "dog"}, {"id": 5, "name": "\tcat"}]
    with pytest.warns(UserWarning, match=r"taken as one: instances\.json categories\[0\] and categories\[1\], 'dog'"):
        data = open_coco(tmp_path, content)
    assert data.class_names == ("dog", "cat")
    assert data[0][1]["labels"].tolist() == [1, 1, 1]


def test_ids_as_texts_and_as_numbers(tmp_path: Path, content: Content) -> None:
    expected = open_coco(tmp_path, content)
    for entry in content["annotations"]:
        entry.update(image_id=f"{entry['image_id']}", category_id=float(entry["category_id"]))
    content["categories"] = [{**entry, "id": str(entry["id"])} for entry in content["categories"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = open_coco(tmp_path, content)
    assert data.class_names == expected.class_names
    torch.testing.assert_close(data[0], expected[0], rtol=0, atol=0)
    # What is no usual way to write a number is a name.
    content["images"] = [{"id": id, "file_name": "a.jpg"} for id in ("01", 1, "x", "-1")]
    content["annotations"] = [annotation("01", 9, [1, 1, 5, 5])]
    with pytest.warns(UserWarning, match="several annotations"):
        assert [len(target["boxes"]) for _, target in open_coco(tmp_path, content)] == [1, 0, 0, 0]


@pytest.mark.parametrize("written", ["ROOT/images/part/b.png", "x/../part/b.png", "./part//b.png"])
def test_paths_that_stay_in_the_folder(tmp_path: Path, content: Content, written: str) -> None:
    content["images"][1]["file_name"] = written.replace("ROOT", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_coco(tmp_path, content).image_path(1) == tmp_path / "images/part/b.png"


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_in_either_form(tmp_path: Path, content: Content, forms: tuple[str, str]) -> None:
    written, file = (unicodedata.normalize(form, "käse.jpg") for form in forms)
    (tmp_path / "images/a.jpg").rename(tmp_path / "images" / file)
    content["images"][0]["file_name"] = written
    assert open_coco(tmp_path, content).image_path(0) == tmp_path / "images" / file


def test_sizes_as_texts(tmp_path: Path, content: Content) -> None:
    """They decide whether the image is turned as numbers do; what is no size decides nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "images/a.jpg", exif=exif)
    content["images"][0].update(width="40", height="30")
    with pytest.warns(UserWarning, match="orientation is not applied"):
        assert open_coco(tmp_path, content).sizes[0] == (30, 40)
    for side in (True, None, "wide", -40, 10**400, float("nan")):
        content["images"][0].update(width=side, height=side)
        with pytest.warns(UserWarning, match="orientation is applied") as caught:
            assert open_coco(tmp_path, content).sizes[0] == (40, 30)
        assert len(caught) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": 7, "category_id": None, "bbox": [1, 1, 2, 2]}, "category_id is None, not a number or a text"),
        ({"image_id": 7, "category_id": 9, "bbox": "1 1 2 2"}, "bbox is '1 1 2 2', not a list"),
        ({"image_id": 7.5, "category_id": 9, "bbox": [1, 1, 2, 2]}, "image_id is 7.5, not a whole number or a text"),
    ],
)
def test_messages_say_what_is_expected(tmp_path: Path, content: Content, entry: Content, message: str) -> None:
    with pytest.raises(DataError, match=rf"annotations\[0\]: {message}"):
        open_coco(tmp_path, {**content, "annotations": [entry]})
