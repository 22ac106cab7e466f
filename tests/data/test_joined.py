"""Data sets joined, cut down to some classes, split, and copied into COCO's format."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from fastdet.data import COCO, VOC, DataError, JoinedImages, Shapes
from fastdet.data.convert import write_coco
from tests.helpers.voc import write_voc


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("joined") / "voc", {"train": 6, "test": 3})


def assert_same_item(first, second) -> None:
    assert torch.equal(first[0], second[0])
    assert {name: value.tolist() for name, value in first[1].items()} == {
        name: value.tolist() for name, value in second[1].items()
    }


def test_items_of_several_data_sets_have_labels_of_one_list(root):
    shapes, voc = Shapes(2, size=64, seed=9), VOC(root, "train", ("star", "triangle", "square", "circle"))
    joined = JoinedImages([shapes, voc])
    assert joined.class_names == Shapes.class_names
    assert len(joined) == len(joined.ids) == len(joined.sizes) == 8
    assert joined.ids[:3] == ("shapes_9_0", "shapes_9_1", "train_0")
    assert joined.image_path(0) is None
    assert joined.image_path(2) == root / "JPEGImages/train_0.jpg"
    for index in range(8):
        source, names = (shapes[index], shapes.class_names) if index < 2 else (voc[index - 2], voc.class_names)
        image, target = joined[index]
        assert torch.equal(image, source[0])
        assert torch.equal(target["boxes"], source[1]["boxes"])
        expected = [names[label - 1] for label in source[1]["labels"].tolist()]
        assert [joined.class_names[label - 1] for label in target["labels"].tolist()] == expected
        assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
        assert target["boxes"].canvas_size == joined.sizes[index] == tuple(image.shape[1:])
        for name, values in joined.target(index).items():
            assert values.tolist() == target[name].tolist()


def test_new_classes_come_after_those_of_the_first(tmp_path):
    for name, classes in (("a", ["dog", "cat"]), ("b", ["cat", "eel", "dog"])):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
        categories = [{"id": k, "name": name} for k, name in enumerate(classes)]
        content = {"images": [{"id": 1, "file_name": f"{name}.png"}], "annotations": [], "categories": categories}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    sets = [COCO(tmp_path, tmp_path / f"{name}.json") for name in "ab"]
    assert JoinedImages(sets).class_names == ("dog", "cat", "eel")


def test_boxes_of_other_classes_are_left_out_and_counted(root):
    data = VOC(root, "train")
    counts = dict.fromkeys(data.class_names, 0)
    for index in range(len(data)):
        for label in data[index][1]["labels"].tolist():
            counts[data.class_names[label - 1]] += 1
    dropped = {name: times for name, times in counts.items() if name not in ("star", "square") and times}
    with pytest.warns(UserWarning, match="left out, with all their boxes") as caught:
        kept = JoinedImages([data], ("star", "square"), leave_out_others=True)
    for name, times in dropped.items():
        assert f"{name} ({times} boxes)" in str(caught[0].message)
    assert kept.class_names == ("star", "square")
    found = [name for index in range(6) for name in kept[index][1]["labels"].tolist()]
    assert (found.count(1), found.count(2)) == (counts["star"], counts["square"])
    for index in range(6):
        image, target = kept[index]
        assert torch.equal(image, data[index][0])
        assert len(target["boxes"]) == len(target["labels"]) == len(target["ignore"])
        assert kept.target(index)["boxes"].tolist() == target["boxes"].tolist()


def test_boxes_of_other_classes_are_an_error_that_names_the_image(root):
    with pytest.raises(DataError, match=r"train_\d\.jpg: class '.*' is not among the 1 class names"):
        JoinedImages([VOC(root, "train")], ("star",))


def test_a_share_of_the_images_is_kept_apart(root):
    data = JoinedImages([VOC(root, "train"), VOC(root, "test")])
    train, held_out = data.split(1 / 3, seed=5)
    assert (len(train), len(held_out)) == (6, 3)
    assert sorted(train.ids + held_out.ids) == sorted(data.ids)
    assert list(train.ids) == [name for name in data.ids if name in train.ids]
    assert data.split(1 / 3, seed=5)[1].ids == held_out.ids
    assert {data.split(1 / 3, seed=seed)[1].ids for seed in range(8)} != {held_out.ids}
    for part in (train, held_out):
        for index, name in enumerate(part.ids):
            assert_same_item(part[index], data[data.ids.index(name)])
            assert part.sizes[index] == data.sizes[data.ids.index(name)]
    assert [len(part) for part in data.split(0.001, 0)] == [8, 1]
    assert [len(part) for part in data.split(0.999, 0)] == [1, 8]
    with pytest.raises(DataError, match="1 image"):
        data.select([0]).split(0.5, 0)


def test_splits_of_a_voc_tree_have_the_same_labels(tmp_path):
    """The test images have no circle, which would shift the labels after it."""
    tree = write_voc(tmp_path / "voc", {"train": 8, "test": 2})
    used = set(VOC(tree, "train").class_names)
    for path in (tree / "Annotations").glob("test_*.xml"):
        path.write_text(path.read_text().replace("<name>circle</name>", "<name>star</name>"))
    assert set(VOC(tree, "test").class_names) == used == set(VOC(tree, None).class_names)
    (tree / "Annotations/train_3.xml").write_text("<annotation><object>")
    with pytest.warns(UserWarning, match=r"1 XML file\(s\) of other splits that cannot be read.*train_3\.xml"):
        VOC(tree, "test")


def test_folders_without_lists(tmp_path):
    tree = write_voc(tmp_path / "voc", {"train": 3})
    for stem in ("train_0", "train_1", "train_2"):
        for folder in ("beside/pictures", "beside/xml", "mixed"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            source = tree / (f"Annotations/{stem}.xml" if folder == "beside/xml" else f"JPEGImages/{stem}.jpg")
            (tmp_path / folder / source.name).write_bytes(source.read_bytes())
        (tmp_path / f"mixed/{stem}.xml").write_bytes((tree / f"Annotations/{stem}.xml").read_bytes())
    expected = VOC(tree, "train")
    for name in ("beside", "mixed"):
        data = VOC(tmp_path / name, None)
        assert (data.ids, data.class_names) == (expected.ids, expected.class_names)
        for index in range(3):
            assert_same_item(data[index], expected[index])
    Image.new("RGB", (5, 5)).save(tmp_path / "mixed/more.png")
    with pytest.warns(UserWarning, match=r"1 image\(s\) without an XML file, left out: more\.png"):
        VOC(tmp_path / "mixed", None)
    (tmp_path / "beside/other").mkdir()
    Image.new("RGB", (5, 5)).save(tmp_path / "beside/other/more.png")
    with pytest.raises(DataError, match=r"no folder JPEGImages, and several with images, .*: other, pictures"):
        VOC(tmp_path / "beside", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no folder Annotations, and no XML files in any other"):
        VOC(tmp_path / "empty", None)
    with pytest.raises(DataError, match="no list of a split train"):
        VOC(tmp_path / "mixed", "train")


def write_turned(root: Path) -> COCO:
    """Images with an EXIF orientation: annotated as stored, as shown, not at all."""
    root.mkdir()
    draw = np.random.default_rng(0)
    images, annotations = [], []
    for index, (orientation, size) in enumerate(((6, (40, 30)), (6, (30, 40)), (3, None), (1, None), (8, (30, 40)))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = draw.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.jpg", exif=exif)
        named = {} if size is None else {"width": size[0], "height": size[1]}
        images.append({"id": index, "file_name": f"{index}.jpg", **named})
        box = {"bbox": [1.25, 2.5, 10.1, 20.3], "category_id": 7, "iscrowd": index % 2}
        annotations.append({"image_id": index, "id": index, **box})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "cell"}]}
    (root / "all.json").write_text(json.dumps(content))
    return COCO(root, root / "all.json")


def test_a_copy_in_cocos_format_is_the_same_data_set(root, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        turned = write_turned(tmp_path / "turned")
        sources = [VOC(root, "train"), turned, Shapes(2, size=64)]
        for number, data in enumerate([*sources, JoinedImages(sources)]):
            write_coco(data, tmp_path / f"copy{number}")
            copy = COCO(tmp_path / f"copy{number}/images", tmp_path / f"copy{number}/instances.json")
            assert copy.class_names == data.class_names
            assert len(copy) == len(data)
            for index in range(len(data)):
                assert_same_item(copy[index], data[index])
            write_coco(copy, tmp_path / f"again{number}")
            texts = [(tmp_path / f"{kind}{number}/instances.json").read_text() for kind in ("copy", "again")]
            assert texts[0] == texts[1]


def test_files_of_one_name_are_kept_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 9), "red" if folder == "a" else "blue").save(tmp_path / folder / "same.png")
        content = {"images": [{"id": 1, "file_name": "same.png"}], "annotations": [], "categories": []}
        (tmp_path / folder / "all.json").write_text(json.dumps(content))
    joined = JoinedImages([COCO(tmp_path / folder, tmp_path / folder / "all.json") for folder in ("a", "b")])
    write_coco(joined, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["same.png", "same_2.png"]
    copy = COCO(tmp_path / "out/images", tmp_path / "out/instances.json")
    assert [copy[index][0][:, 0, 0].tolist() for index in range(2)] == [[255, 0, 0], [0, 0, 255]]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    write_coco(Shapes(1, size=64), tmp_path / "out")
    with pytest.raises(DataError, match="there is something already"):
        write_coco(Shapes(1, size=64), tmp_path / "out")
