"""Where the images of YOLO's layout are looked for, and where not."""

import os
import unicodedata
from pathlib import Path

import pytest

from fastdet.data import DataError
from tests.helpers.yolo import NAMES, boxes_of, configure, fails, label, open_quietly, picture, warnings_of, write_pair


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_pair(tmp_path / "set")


@pytest.mark.parametrize(
    "text",
    [
        "path: .\ntrain: images/train\n",
        "path: /home/me/set\ntrain: images/train\n",
        "path: C:\\sets\\set\ntrain: images\\train\n",
        "path: ../set\ntrain: images/train/\n",
        "path: ~\ntrain: ./images/train\n",
        "train: ../images/train\n",
        "train: ..\\..\\images\\train\n",
        "train: [images/train/part, images/train]\n",
        "train:\n- ../images/train\n",
        "path: images\ntrain: train\n",
    ],
)
def test_paths(root: Path, text: str) -> None:
    data, messages = warnings_of(configure(root, text + NAMES))
    assert {data.image_path(k) for k in range(len(data))} == {
        root / "images/train/a.jpg",
        root / "images/train/part/b.jpg",
    }
    assert sorted(data[k][1]["labels"].item() for k in range(2)) == [1, 2]
    if "part" in text:
        assert len(messages) == 1
        assert "1 image(s) more than once in the list, taken once: images/train/part/b.jpg" in messages[0]
    else:
        assert not messages


def test_absolute_paths_within_the_folder(root: Path) -> None:
    assert len(open_quietly(configure(root, f"train: {root}/images/train\n{NAMES}"))) == 2
    elsewhere = root.parent / "configs"
    elsewhere.mkdir()
    for path in (root, "../set", "..\\set"):
        assert len(open_quietly(configure(elsewhere, f"path: {path}\ntrain: images/train\n{NAMES}"))) == 2


def test_a_relative_path_of_the_yaml(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert len(open_quietly(Path("data.yaml"))) == 2
    monkeypatch.chdir(root / "images")
    assert len(open_quietly(Path(".."))) == 2


@pytest.mark.parametrize(
    ("layout", "path"),
    [("valid", "../valid/images"), ("valid", "valid"), ("valid", "valid/images")],
)
@pytest.mark.parametrize(("key", "split"), [("val", "val"), ("val", "valid"), ("validation", "val"), ("valid", "val")])
def test_roboflow(root: Path, layout: str, path: str, key: str, split: str) -> None:
    picture(root / layout / "images/c.jpg")
    label(root / layout / "labels/c.txt", "0 0.5 0.5 1 1\n")
    label(root / layout / "README.txt", "of Roboflow")
    data = open_quietly(configure(root, f"train: images/train\n{key}: {path}\n{NAMES}"), split)
    assert data.ids == ("valid/images/c.jpg",)
    assert boxes_of(data) == [[0, 0, 40, 20]]


def test_a_folder_that_is_outside_as_well_is_taken_within(root: Path) -> None:
    picture(root.parent / "images/train/stranger.jpg")
    data, messages = warnings_of(configure(root, f"train: ../images/train\n{NAMES}"))
    assert data.image_path(0) == root / "images/train/a.jpg"
    assert len(messages) == 1
    assert "1 path(s) that lead out of the data set's folder, taken within it: ../images/train as" in messages[0]


@pytest.mark.parametrize("path", ["/etc", "images/../../other", "..", "../../..", "C:/x", "images/nowhere", "a\\x00b"])
def test_paths_that_lead_out_or_nowhere_are_named(root: Path, path: str) -> None:
    picture(root.parent / "other/x.jpg")
    error = fails(configure(root, f'train: "{path}"\n{NAMES}'))
    assert error.startswith(f"{root / 'data.yaml'}: train: ")
    outside = path in ("/etc", "images/../../other", "..", "../../..")
    assert ("leads out of the folder" if outside else "is neither a folder nor a list of images") in error


def test_splits_that_are_not_there(root: Path) -> None:
    assert "there is no split val; there are: train" in fails(root, "val")
    configure(root, f"path: .\ntrain: images/train\nval:\nvalid: null\nvalidation: ~\ntest: {{a: b}}\n{NAMES}")
    assert "there is no split path; there are: train, test" in fails(root, "path")
    assert "there is no split val; there are: train, test" in fails(root, "val")
    assert "test is [{'a': 'b'}], not a path or a list" in fails(root, "test")
    (root / "empty").mkdir()
    assert "train: no images in empty of" in fails(configure(root, f"train: empty\n{NAMES}"))
    assert "train: no images in [] of" not in fails(configure(root, f"train: []\n{NAMES}"))
    (root / "list.txt").write_text("\n\n")
    assert "train: no images in list.txt of" in fails(configure(root, f"train: list.txt\n{NAMES}"))


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("list.txt", "images/train/a.jpg"),
        ("list.txt", "./images/train/a.jpg"),
        ("list.txt", ".\\images\\train\\a.jpg"),
        ("lists/train.txt", "images/train/a.jpg"),
        ("lists/train.txt", "./images/train/a.jpg"),
        ("lists/train.txt", "../images/train/a.jpg"),
        ("images/train/list.txt", "a.jpg"),
        ("images/train/list.txt", "./a.jpg"),
        ("list.txt", "ROOT/images/train/a.jpg"),
    ],
)
def test_lists(root: Path, place: str, line: str) -> None:
    label(root / place, line.replace("ROOT", str(root)))
    data = open_quietly(configure(root, f"train: {place}\n{NAMES}"))
    assert data.ids == ("images/train/a.jpg",)
    assert boxes_of(data) == [[10, 5, 30, 15]]


def test_lists_of_images_that_are_in_two_places(root: Path) -> None:
    picture(root / "a.jpg")
    label(root / "a.txt", "")
    label(root / "images/train/list.txt", "./a.jpg\na.jpg\n")
    data = open_quietly(configure(root, f"train: images/train/list.txt\n{NAMES}"))
    assert data.ids == ("images/train/a.jpg", "a.jpg")


def test_lists_keep_their_order_and_take_images_once(root: Path) -> None:
    (root / "list.txt").write_text("images/train/part/b.jpg\nimages/train/a.jpg\nimages//train/./a.jpg\n")
    data, messages = warnings_of(configure(root, f"train: list.txt\n{NAMES}"))
    assert data.ids == ("images/train/part/b.jpg", "images/train/a.jpg")
    assert len(messages) == 1
    assert "1 image(s) more than once in the list, taken once: images/train/a.jpg" in messages[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/train/c.jpg", "no image ROOT/images/train/c.jpg"),
        ("../../outside.jpg", "../../outside.jpg leads out of ROOT"),
        ("/etc/passwd", "/etc/passwd leads out of ROOT"),
        ("images/train", "no image ROOT/images/train"),
        ("images/train/pipe.jpg", "no image ROOT/images/train/pipe.jpg"),
        ("a\x00\x1b.jpg", r"no image ROOT/a\x00\x1b.jpg"),
        ("x" * 1_000_000, "no image ROOT/xxx"),
    ],
)
def test_lines_of_a_list_that_are_wrong_are_named(root: Path, line: str, message: str) -> None:
    picture(root.parent / "outside.jpg")
    os.mkfifo(root / "images/train/pipe.jpg")
    (root / "list.txt").write_text(f"images/train/a.jpg\n{line}\nimages/train/part/b.jpg\n")
    error = fails(configure(root, f"train: list.txt\n{NAMES}"))
    assert error.startswith(f"{root / 'list.txt'}:2: {message.replace('ROOT', str(root))}")
    problems: list[DataError] = []
    assert len(open_quietly(root, problems=problems)) == 2
    assert [str(problem) for problem in problems] == [error]


def test_lists_too_large_are_not_read(root: Path) -> None:
    with (root / "list.txt").open("wb") as file:
        file.truncate(4 << 30)
    assert "list.txt: the file has more than 256 MB" in fails(configure(root, f"train: list.txt\n{NAMES}"))


def test_suffixes_of_any_case(root: Path) -> None:
    (root / "images/train/a.jpg").rename(root / "images/train/a.JPG")
    assert open_quietly(root).ids == ("images/train/a.JPG", "images/train/part/b.jpg")


def test_hidden_files_are_left_out(root: Path) -> None:
    label(root / "images/train/._a.jpg", "of a Mac")
    label(root / "images/train/.thumbnails/x.jpg", "no image")
    assert len(open_quietly(root)) == 2


def test_links(root: Path) -> None:
    train = root / "images/train"
    (train / "loop").symlink_to(train)
    (train / "deep").symlink_to("/")
    (train / "c.jpg").symlink_to(train / "a.jpg")
    (root / "labels/train/c.txt").symlink_to(root / "labels/train/a.txt")
    data, messages = warnings_of(root)
    assert data.ids == ("images/train/a.jpg", "images/train/c.jpg", "images/train/part/b.jpg")
    assert boxes_of(data, 1) == boxes_of(data, 0)
    assert len(messages) == 1
    assert "2 link(s) to folders in a folder of images, not followed" in messages[0]
    (root / "linked").symlink_to(root / "images")
    (root / "linked/train/part/b.txt").write_text("")
    assert open_quietly(configure(root, f"train: linked/train/part\n{NAMES}")).ids == ("linked/train/part/b.jpg",)


def test_folders_and_files_of_labels_in_upper_case(root: Path) -> None:
    (root / "labels/train/a.txt").rename(root / "labels/train/a.TXT")
    assert open_quietly(root)[0][1]["labels"].tolist() == [2]
    (root / "images").rename(root / "Images")
    configure(root, f"train: Images/train\n{NAMES}")
    assert open_quietly(root)[0][1]["labels"].tolist() == [2]
    (root / "labels").rename(root / "Labels")
    assert open_quietly(root)[0][1]["labels"].tolist() == [2]


def test_labels_of_no_image_are_found(root: Path) -> None:
    """A data set in which all is background is one whose labels are in another place."""
    (root / "labels").rename(root / "annotations")
    message = "data.yaml: train: no image of 2 has a file of labels: images/train/a.jpg has no images/train/a.txt"
    assert message in fails(root)
    problems: list[DataError] = []
    assert len(warnings_of(root, problems=problems)[0]) == 2
    assert [message in str(problem) for problem in problems] == [True]


def test_labels_beside_an_image_whose_labels_belong_elsewhere(root: Path) -> None:
    (root / "labels/train/a.txt").rename(root / "images/train/a.txt")
    _, messages = warnings_of(root)
    assert len(messages) == 2
    assert "labels beside images whose labels are in another folder, not read: images/train/a.txt" in messages[1]


def test_of_a_list_without_a_right_line_the_first_is_named(root: Path) -> None:
    (root / "list.txt").write_text("C:\\me\\a.jpg\nb.jpg\n")
    configure(root, f"train: list.txt\n{NAMES}")
    assert "list.txt:1: no image" in fails(root, problems=[])


def test_a_folder_outside_is_named_as_such(root: Path) -> None:
    picture(root.parent / "other/images/x.jpg")
    error = fails(configure(root, f"train: ../other/images\n{NAMES}"))
    assert f"train: ../other/images leads out of the folder {root}, which 'path' can change" in error


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_in_either_form(root: Path, forms: tuple[str, str]) -> None:
    image, other = (unicodedata.normalize(form, "käse") for form in forms)
    picture(root / f"images/own/{image}.jpg")
    label(root / f"labels/own/{other}.txt", "1 0.5 0.5 0.5 0.5")
    assert boxes_of(open_quietly(configure(root, f"train: images/own\n{NAMES}"))) == [[10, 5, 30, 15]]
    (root / "list.txt").write_text(f"images/own/{other}.jpg\n")
    assert boxes_of(open_quietly(configure(root, f"train: list.txt\n{NAMES}"))) == [[10, 5, 30, 15]]


def test_boxes_that_are_left_out_name_the_folder_too(root: Path) -> None:
    label(root / "labels/train/part/b.txt", "0 5 5 1 1")
    _, messages = warnings_of(root)
    assert "images/train/part/b.jpg cat (5 5 1 1)" in messages[0]


def test_a_path_that_is_not_there_is_named(root: Path) -> None:
    error = fails(configure(root, f"path: datasets/pets\ntrain: images\\lost\n{NAMES}"))
    assert f"{root}/images/lost is neither a folder nor a list of images, and there is no folder datasets/pets" in error
