"""Datasets: what they return, and what they report of files that are wrong."""

import shutil
import unicodedata
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdet.data import VOC, DataError, Shapes, collate, read_image
from tests.helpers.voc import write_voc

Boxed = tuple[str, tuple[object, ...], int]


def annotate(root: Path, stem: str, objects: Sequence[Boxed], *, size: tuple[int, int] | None = (40, 30)) -> Path:
    """Write an annotation as VOC does: parts of an object carry names and boxes of their own."""
    parts = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
        "<xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
        for name, (x1, y1, x2, y2), difficult in objects
    )
    extent = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    path = root / "Annotations" / f"{stem}.xml"
    path.write_text(f"<annotation><filename>{stem}.jpg</filename>{extent}{parts}</annotation>")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images: `a` with a cat and a difficult dog, `b` with nothing, as a PNG."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\n\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("b\n")
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[:, :20, 0], pixels[20:, :, 2] = 255, 51
    Image.fromarray(pixels).save(tmp_path / "JPEGImages/a.jpg", quality=95, subsampling=0)
    Image.fromarray(pixels).save(tmp_path / "JPEGImages/b.png")
    annotate(tmp_path, "a", [("dog", (1, 1, 40, 30), 1), ("cat", (11, 6, 20, 15), 0)])
    annotate(tmp_path, "b", [])
    return tmp_path


def one_line(error: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_voc_item(root: Path) -> None:
    data = VOC(root, "train")
    assert len(data) == 2
    assert data.ids == ("a", "b")
    assert data.class_names == ("cat", "dog")
    assert data.image_path(0) == root / "JPEGImages/a.jpg"
    image, target = data[0]
    assert image.shape == (3, 30, 40)
    assert image.dtype == torch.uint8
    assert image[0, 5, 5] > 240
    assert image[0, 5, 35] < 15
    assert set(target) == {"boxes", "labels", "ignore"}
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[0, 0, 40, 30], [10, 5, 20, 15]]
    assert target["labels"].dtype == torch.int64
    assert target["labels"].tolist() == [2, 1]
    assert target["ignore"].dtype == torch.bool
    assert target["ignore"].tolist() == [True, False]


def test_voc_image_without_objects_found_by_its_stem(root: Path) -> None:
    image, target = VOC(root, "val", ["cat"])[0]
    assert image[2, 25, 0].item() == 51
    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64
    assert target["ignore"].dtype == torch.bool


@pytest.mark.parametrize(
    ("file", "written"),
    [
        ("b.JPG", "b.JPG"),
        ("b.JPG", "b"),
        ("b.JPG", "b.jpg"),
        ("b.PNG", ""),
        ("b.bmp", "b"),
        ("b.tif", "a.jpg"),
        ("b.webp", "/home/me/b.webp"),
        ("b.bmp", "C:\\pictures\\b.bmp"),
        ("other.png", "other.png"),
        ("other.PNG", "C:\\pictures\\other.png"),
        ("other.gif", "../../other.jpg"),
    ],
)
def test_voc_finds_the_image_of_an_annotation(root: Path, file: str, written: str) -> None:
    """By its own stem, else by the name in the XML without folders; one that exists for another is not taken."""
    (root / "JPEGImages/b.png").unlink()
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / file)
    path = root / "Annotations/b.xml"
    path.write_text(path.read_text().replace("b.jpg", written))
    assert VOC(root, "val").image_path(0).name == file


def test_voc_images_with_one_stem(root: Path) -> None:
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/b.bmp")
    with pytest.warns(UserWarning, match=r"1 image\(s\) taken of several with one stem: b\.bmp of b\.bmp, b\.png"):
        VOC(root, "val")
    path = root / "Annotations/b.xml"
    path.write_text(path.read_text().replace("b.jpg", "b.png"))
    assert VOC(root, "val").image_path(0).name == "b.png"


def test_voc_two_annotations_of_one_image(root: Path) -> None:
    (root / "JPEGImages/b.png").unlink()
    path = root / "Annotations/b.xml"
    path.write_text(path.read_text().replace("b.jpg", "a.jpg"))
    with pytest.warns(UserWarning, match=r"1 image\(s\) with several annotations: a\.jpg in a\.xml and b\.xml"):
        VOC(root, "train")


@pytest.mark.parametrize(
    ("content", "stems"),
    [
        ("\ufeffa\r\nb\r\n".encode(), ("a", "b")),
        ("a\r\nb\r\n".encode("utf-16"), ("a", "b")),
        (b"a  1\nb -1\n", ("a", "b")),
        (b"a.jpg\nb.PNG\n", ("a", "b")),
        (b"JPEGImages/a.jpg\nAnnotations\\b.xml\n", ("a", "b")),
    ],
)
def test_voc_lists_as_they_are_found(root: Path, content: bytes, stems: tuple[str, ...]) -> None:
    (root / "ImageSets/Main/train.txt").write_bytes(content)
    assert VOC(root, "train").ids == stems


def test_voc_names_that_look_like_a_list_of_a_class(root: Path) -> None:
    """A number at the end belongs to the name where not all lines have one."""
    for stem in ("photo 1", "c.v2"):
        Image.new("RGB", (40, 30)).save(root / f"JPEGImages/{stem}.jpg")
        annotate(root, stem, [])
    (root / "ImageSets/Main/train.txt").write_text("photo 1\nc.v2\nb\nb\n")
    with pytest.warns(UserWarning, match=r"1 image\(s\) more than once in the list, taken once: b in train\.txt"):
        assert VOC(root, "train").ids == ("photo 1", "c.v2", "b")


@pytest.mark.parametrize(
    ("size", "count"),
    [((40, 30), 0), (None, 0), ((30, 40), 1), ((9, 9), 1), ((900, 900), 1)],
)
def test_the_size_of_the_image_is_right(root: Path, size: tuple[int, int] | None, count: int) -> None:
    annotate(root, "a", [("cat", (35, 2, 40, 9), 0), ("cat", (500, 500, 600, 600), 0)], size=size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = VOC(root, "train")
    messages = [str(warning.message) for warning in caught]
    assert data[0][1]["boxes"].tolist() == [[34, 1, 40, 9]]
    assert len([message for message in messages if "1 box(es) left out" in message]) == 1
    found = [message for message in messages if "of another size than the image, which is right: a.xml" in message]
    assert len(found) == count
    assert len(messages) == 1 + count


@pytest.mark.parametrize(
    "extent",
    ["", "<size/>", "<size><width></width><height></height></size>", "<size><width>0</width><height>0</height></size>"]
    + ["<size><width>40</width></size>", "<size><width>wide</width><height>nan</height></size>"],
)
@pytest.mark.parametrize(
    ("difficult", "ignore"),
    [("", False), ("Unspecified", False), ("false", False), ("no", False), ("0", False), ("true", True), ("1", True)],
)
def test_blank_fields_are_as_if_absent(root: Path, extent: str, difficult: str, ignore: bool) -> None:
    path = annotate(root, "a", [("cat", (5, 5, 30, 30), 0)], size=None)
    text = path.read_text().replace("<difficult>0<", f"<difficult>{difficult}<")
    path.write_text(text.replace("<filename>", f"{extent}<filename>"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = VOC(root, "train")[0][1]
    assert target["boxes"].tolist() == [[4, 4, 30, 30]]
    assert target["ignore"].tolist() == [ignore]


def photo(root: Path, stem: str, orientation: int) -> None:
    """A picture shown 40 wide and 60 high with a red block, stored as a camera with this orientation stores it."""
    upright = Image.new("RGB", (40, 60), (90, 90, 90))
    upright.paste((230, 40, 40), (5, 30, 25, 50))
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn, exif = turns[orientation], Image.Exif()
    exif[0x0112] = orientation
    (upright if turn is None else upright.transpose(turn)).save(root / f"JPEGImages/{stem}.png", exif=exif)


def red_share(data: VOC, index: int) -> float:
    image, target = data[index]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    return float((image[0, y1:y2, x1:x2] > 0.8).float().mean())


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("size", [(40, 60), None])
def test_exif_orientation_is_applied_where_the_annotation_counts_so(
    root: Path, orientation: int, size: tuple[int, int] | None
) -> None:
    (root / "JPEGImages/b.png").unlink()
    photo(root, "b", orientation)
    annotate(root, "b", [("block", (6, 31, 25, 50), 0)], size=size)
    with pytest.warns(UserWarning, match=r"1 image\(s\) whose EXIF orientation is applied: b"):
        data = VOC(root, "val")
    assert data[0][0].shape == (3, 60, 40)
    assert red_share(data, 0) == 1


def test_exif_orientation_is_not_applied_where_the_annotation_counts_stored_pixels(root: Path) -> None:
    (root / "JPEGImages/b.png").unlink()
    photo(root, "b", 6)
    # The block where it lies in the stored pixels, which are turned to the left.
    annotate(root, "b", [("block", (31, 16, 50, 35), 0)], size=(60, 40))
    with pytest.warns(UserWarning, match=r"1 image\(s\) whose EXIF orientation is not applied"):
        data = VOC(root, "val")
    assert data[0][0].shape == (3, 40, 60)
    assert red_share(data, 0) == 1
    with pytest.warns(UserWarning, match=r"1 image\(s\) whose EXIF orientation is applied: b"):
        assert VOC(root, "val", orientation="applied")[0][0].shape == (3, 60, 40)
    with pytest.raises(ValueError, match=r"orientation must be .*, got 'none'"):
        VOC(root, "val", orientation="none")  # type: ignore[arg-type]


def test_exif_orientation_that_no_size_decides_follows_the_others(root: Path) -> None:
    for stem, orientation, size in (("c", 6, (60, 40)), ("d", 8, (60, 40)), ("e", 3, (40, 60)), ("f", 6, None)):
        photo(root, stem, orientation)
        annotate(root, stem, [], size=size)
    (root / "ImageSets/Main/val.txt").write_text("c\nd\ne\nf\n")
    with pytest.warns(UserWarning, match=r"4 image\(s\) whose EXIF orientation is not applied"):
        data = VOC(root, "val")
    assert [tuple(data[k][0].shape[1:]) for k in range(4)] == [(40, 60), (40, 60), (60, 40), (40, 60)]


def test_voc_corners_counted_from_zero(root: Path) -> None:
    assert VOC(root, "train", zero_based=True)[0][1]["boxes"].tolist() == [[1, 1, 40, 30], [11, 6, 20, 15]]


def test_voc_class_names_give_the_labels(root: Path) -> None:
    data = VOC(root, "train", ["dog", "horse", "cat"])
    assert data.class_names == ("dog", "horse", "cat")
    assert data[0][1]["labels"].tolist() == [1, 3]


def test_voc_items_are_copies(root: Path) -> None:
    data = VOC(root, "train")
    data[0][1]["boxes"].zero_()
    assert data[0][1]["boxes"].any()


def test_voc_leaves_out_bad_boxes_with_one_warning(root: Path) -> None:
    bad = [
        (5, 5, 5, 9),
        (5, 9, 8, 9),
        (9, 5, 5, 9),
        ("nan", 1, 5, 5),
        (1, 1, "inf", 5),
        (41, 1, 60, 9),
        (1, 31, 9, 50),
        (-9, 1, 0, 9),
    ]
    good = [(-5, -5, 60, 60), (40, 30, 41, 31), (1, 1, 2, 2)]
    annotate(root, "a", [("cat", box, 0) for box in [*bad, *good]])
    with pytest.warns(UserWarning, match="left out") as caught:
        data = VOC(root, "train")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "8 box(es)" in message
    assert "a cat (5, 5, 5, 9)" in message
    assert data[0][1]["boxes"].tolist() == [[-6, -6, 60, 60], [39, 29, 41, 31], [0, 0, 2, 2]]
    assert len(data[0][1]["labels"]) == len(data[0][1]["ignore"]) == 3


def test_read_image_keeps_the_range_of_16_bits(tmp_path: Path) -> None:
    gray = np.array([[0, 257], [32768, 65535]], dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    image = read_image(tmp_path / "gray.png")
    assert image.shape == (3, 2, 2)
    assert image.dtype == torch.uint8
    assert image[1].tolist() == [[0, 1], [128, 255]]
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float.tiff.*mode 'F'"):
        read_image(tmp_path / "float.tiff")


def test_voc_missing_root_folder_and_split(root: Path) -> None:
    with pytest.raises(DataError) as error:
        VOC(root / "nowhere", "train")
    one_line(error, str(root / "nowhere"))
    with pytest.raises(DataError) as error:
        VOC(root / "JPEGImages", "train")
    one_line(error, "Annotations", "VOC layout")
    with pytest.raises(DataError) as error:
        VOC(root, "test")
    one_line(error, str(root), "no list of a split test", "train, val")


def test_voc_empty_split(root: Path) -> None:
    (root / "ImageSets/Main/train.txt").write_text("\n \n")
    with pytest.raises(DataError) as error:
        VOC(root, "train")
    one_line(error, "train.txt", "empty")


def test_voc_missing_files(root: Path) -> None:
    (root / "JPEGImages/b.png").unlink()
    with pytest.raises(DataError) as error:
        VOC(root, "train")
    one_line(error, str(root / "JPEGImages" / "b"), "b.xml")
    (root / "Annotations/a.xml").unlink()
    with pytest.raises(DataError) as error:
        VOC(root, "train")
    one_line(error, "a.xml", "no such file")


BOMB = '<!DOCTYPE a [<!ENTITY b "boom">]><annotation><filename>&b;</filename></annotation>'


@pytest.mark.parametrize("text", ["", "<annotation><object></annotation>", "not xml", BOMB])
def test_voc_broken_xml(root: Path, text: str) -> None:
    (root / "Annotations/a.xml").write_text(text)
    with pytest.raises(DataError) as error:
        VOC(root, "train")
    one_line(error, "a.xml", "does not parse")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<xmin>11</xmin>", "", "object 2: its <bndbox> has no <xmin>"),
        ("<xmin>11</xmin>", "<xmin>eleven\n</xmin>", "'eleven'"),
        ("<xmin>11</xmin>", "<xmin/>", "xmin"),
        ("<name>cat</name>", "", "object 2: it has no <name>"),
        ("<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>20</xmax><ymax>15</ymax></bndbox>", "", "'cat' has no <bndbox>"),
    ],
)
def test_voc_broken_field(root: Path, old: str, new: str, message: str) -> None:
    path = root / "Annotations/a.xml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError) as error:
        VOC(root, "train")
    one_line(error, "a.xml", message)


def test_voc_difficult_may_be_absent(root: Path) -> None:
    path = root / "Annotations/a.xml"
    path.write_text(path.read_text().replace("<difficult>1</difficult>", ""))
    assert VOC(root, "train")[0][1]["ignore"].tolist() == [False, False]


def test_voc_unknown_class(root: Path) -> None:
    with pytest.raises(DataError) as error:
        VOC(root, "train", ["dog", "cats", "horse"])
    one_line(error, "a.xml", "'cat'", "similar: cats")
    with pytest.raises(DataError) as error:
        VOC(root, "train", ["DOG", "cat"])
    one_line(error, "a.xml", "'dog'", "similar: DOG")
    with pytest.raises(DataError) as error:
        VOC(root, "train", ["dog", "horse"])
    one_line(error, "'cat'", "known: dog, horse")
    with pytest.raises(DataError, match="repeats"):
        VOC(root, "train", ["dog", "cat", "dog"])


@pytest.mark.parametrize("keep", [0, 100, -40])
def test_damaged_image(root: Path, keep: int) -> None:
    path = root / "JPEGImages/a.jpg"
    path.write_bytes(path.read_bytes()[:keep])
    if keep >= 0:  # not even a header
        with pytest.raises(DataError) as error:
            VOC(root, "train")
    else:
        data = VOC(root, "train")
        with pytest.raises(DataError) as error:
            data[0]
        data[1]
    one_line(error, str(path), "cannot be decoded")


def test_read_image_makes_rgb_of_other_modes(tmp_path: Path) -> None:
    Image.new("LA", (5, 4), (102, 0)).save(tmp_path / "gray.png")
    assert torch.equal(read_image(tmp_path / "gray.png"), torch.full((3, 4, 5), 102, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"none\.png: no such image"):
        read_image(tmp_path / "none.png")


def test_collate_in_a_loader() -> None:
    data = Shapes(3, size=32)
    images, targets = next(iter(torch.utils.data.DataLoader(data, batch_size=3, collate_fn=collate)))
    assert isinstance(images, list)
    assert isinstance(targets, list)
    for k in range(3):
        assert torch.equal(images[k], data[k][0])
        assert torch.equal(targets[k]["boxes"], data[k][1]["boxes"])


def write_list(root: Path, text: str) -> None:
    (root / "ImageSets/Main/train.txt").write_text(text)


def test_names_that_end_in_a_number_are_no_list_of_a_class(tmp_path: Path) -> None:
    tree = write_voc(tmp_path / "voc", {"train": 3})
    for number, stem in enumerate(("scan 1", "scan 0", "scan")):
        for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
            (tree / folder / f"train_{number}.{suffix}").rename(tree / folder / f"{stem}.{suffix}")
    write_list(tree, "scan 1\nscan 0\n")
    assert VOC(tree, "train").ids == ("scan 1", "scan 0")
    write_list(tree, "scan  1\n")
    assert VOC(tree, "train").ids == ("scan",)


def test_xml_of_another_kind_is_not_taken_as_background(tmp_path: Path) -> None:
    tree = write_voc(tmp_path / "voc", {"train": 1})
    path = tree / "Annotations/train_0.xml"
    text = path.read_text()
    for changed, part in (
        (text.replace("<annotation>", '<annotation xmlns="http://a.b">'), "not an <annotation>"),
        (f"<annotations>{text}</annotations>", "it is <annotations>"),
        (text.replace("<bndbox>", "<bndbox></bndbox><bndbox>", 1), "has 2 <bndbox>"),
        (text.replace("object>", "Object>"), "but 0 <object> right inside of <annotation>"),
        (
            text.replace("<annotation>", "<annotation><objects>").replace("</annot", "</objects></annot"),
            "but 0 <object>",
        ),
        (text.replace("<xmin>", "<xmin>1_", 1), "<xmin> is not a number"),
    ):
        path.write_text(changed)
        with pytest.raises(DataError) as error:
            VOC(tree, "train")
        one_line(error, "train_0.xml", part)
    (tree / "Annotations/sub").mkdir()
    (tree / "Annotations/sub/more.xml").write_text(text)
    path.write_text(text)
    (tree / "Annotations/._train_0.xml").write_bytes(b"of a file manager")
    with pytest.warns(UserWarning, match=r"1 folder\(s\) with XML files inside that of the XML files, not read: sub"):
        assert VOC(tree, None).ids == ("train_0",)


def test_boxes_that_vanish_or_overflow_in_float32_are_left_out(tmp_path: Path) -> None:
    tree = write_voc(tmp_path / "voc", {"train": 1})
    path, objects = tree / "Annotations/train_0.xml", ""
    for corners in ("0,0,1e40,1e40", "50,10,50.0000001,20", "2,2,9,9"):
        names = ("xmin", "ymin", "xmax", "ymax")
        box = "".join(f"<{n}>{x}</{n}>" for n, x in zip(names, corners.split(","), strict=True))
        objects += f"<object><name>a</name><bndbox>{box}</bndbox></object>"
    path.write_text(f"<annotation>{objects}</annotation>")
    with pytest.warns(UserWarning, match=r"2 box\(es\) left out"):
        data = VOC(tree, "train", zero_based=True)
    assert data[0][1]["boxes"].tolist() == [[2, 2, 9, 9]]


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg"])
def test_the_size_and_the_pixels_of_turned_images_agree(tmp_path: Path, suffix: str) -> None:
    tree = write_voc(tmp_path / "voc", {"train": 1})
    (tree / "JPEGImages/train_0.jpg").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(tree / f"JPEGImages/train_0.{suffix}", exif=exif)
    for orientation in ("auto", "applied", "stored"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = VOC(tree, "train", orientation=orientation)
        assert tuple(data[0][0].shape[1:]) == data.sizes[0]


def test_png_files_are_not_decoded_when_they_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_voc(tmp_path / "voc", {"train": 1})
    (tree / "JPEGImages/train_0.jpg").unlink()
    Image.new("RGB", (48, 64)).save(tree / "JPEGImages/train_0.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    assert VOC(tree, "train").sizes == [(64, 48)]


def test_xml_files_in_upper_case(root: Path) -> None:
    (root / "Annotations/a.xml").rename(root / "Annotations/a.XML")
    assert VOC(root, "train").ids == VOC(root, None).ids == ("a", "b")
    folder = root / "beside"
    folder.mkdir()
    shutil.copyfile(root / "JPEGImages/a.jpg", folder / "a.JPG")
    shutil.copyfile(root / "Annotations/a.XML", folder / "a.XML")
    assert VOC(folder, None)[0][1]["labels"].tolist() == [2, 1]
    annotate(root, "a", [("dog", (1, 1, 40, 30), 0)])
    with pytest.warns(UserWarning, match=r"several annotations: a\.xml, and a\.XML, which is not read"):
        assert VOC(root, "train").class_names == ("dog",)


def test_hidden_files_are_no_images(root: Path) -> None:
    for name in ("JPEGImages/._a.jpg", "Annotations/._a.xml"):
        (root / name).write_bytes(b"of another system")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert VOC(root, None).ids == ("a", "b")


def test_lists_beside_main(root: Path) -> None:
    (root / "ImageSets/Main").rename(root / "ImageSets/Old")
    for name in ("train", "val"):
        (root / f"ImageSets/Old/{name}.txt").rename(root / f"ImageSets/{name}.txt")
    assert VOC(root, "train").ids == ("a", "b")
    assert VOC(root, "val").ids == ("b",)


def test_images_of_xml_files_that_cannot_be_read_are_not_without_one(root: Path) -> None:
    (root / "Annotations/a.xml").write_text("<annotation>")
    problems: list[DataError] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert VOC(root, None, problems=problems).ids == ("b",)
    assert len(problems) == 1


COMPOSED, APART = (unicodedata.normalize(form, "käse") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("image", "annotation", "listed"), list(product((COMPOSED, APART), repeat=3)))
def test_accents_in_either_form(tmp_path: Path, image: str, annotation: str, listed: str) -> None:
    """macOS writes the letter and its accent apart, in names of files and in archives of them."""
    tree = write_voc(tmp_path / "voc", {"train": 1})
    (tree / "JPEGImages/train_0.jpg").rename(tree / f"JPEGImages/{image}.jpg")
    (tree / "Annotations/train_0.xml").rename(tree / f"Annotations/{annotation}.xml")
    write_list(tree, f"{listed}.jpg\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = VOC(tree, "train")
        assert VOC(tree, None).ids == data.ids == (COMPOSED,)
    assert data.image_path(0).name == f"{image}.jpg"


def test_an_image_with_another_name_is_a_warning(root: Path) -> None:
    """The name in the file may be stale: then the boxes are of another image."""
    (root / "JPEGImages/b.png").rename(root / "JPEGImages/c.png")
    path = root / "Annotations/b.xml"
    path.write_text(path.read_text().replace("b.jpg", "c.png"))
    with pytest.warns(UserWarning, match=r"found by its <filename>: c\.png for b\.xml") as caught:
        VOC(root, "val")
    assert len(caught) == 1
    path.write_text(path.read_text().replace("c.png", "a.jpg"))
    with pytest.warns(UserWarning, match=r"with several annotations: a\.jpg in a\.xml and b\.xml") as caught:
        VOC(root, "val")
    assert len(caught) == 2
    path.write_text(path.read_text().replace("a.jpg", "d.jpg"))
    with pytest.raises(DataError, match=r"b\.xml: no image .*/JPEGImages/b, with any suffix, nor d\.jpg"):
        VOC(root, "val")


@pytest.mark.parametrize("exif", [b"Exif\x00\x00no TIFF", b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x09", b"Exif\x00\x00"])
def test_exif_that_does_not_parse_is_as_if_absent(root: Path, exif: bytes) -> None:
    Image.new("RGB", (40, 30)).save(root / "JPEGImages/a.jpg", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert VOC(root, "train")[0][0].shape == (3, 30, 40)


def test_hidden_folders_are_left_out(root: Path) -> None:
    """Those in which Jupyter keeps copies, and with the files that macOS puts beside others."""
    flat = root / "flat"
    for name in (".ipynb_checkpoints/a-checkpoint", "a"):
        for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
            (flat / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / folder / f"a.{suffix}", flat / f"{name}.{suffix}")
    (flat / "other").mkdir()
    (flat / "other/._a.xml").write_bytes(b"of another system")
    (root / "Annotations/.ipynb_checkpoints").mkdir()
    shutil.copyfile(root / "Annotations/a.xml", root / "Annotations/.ipynb_checkpoints/a-checkpoint.xml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert VOC(flat, None).ids == ("a",)
        assert VOC(root, None).ids == ("a", "b")


def test_links_to_folders_are_not_walked(root: Path) -> None:
    """They may lead to all files of the machine."""
    elsewhere = root / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    shutil.copyfile(root / "Annotations/a.xml", elsewhere / "deep/a.xml")
    (root / "Annotations/link").symlink_to(elsewhere)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VOC(root, None)
    shutil.copyfile(root / "Annotations/a.xml", elsewhere / "a.xml")
    with pytest.warns(UserWarning, match=r"inside that of the XML files, not read: link"):
        VOC(root, None)


def test_lists_beside_an_empty_main(root: Path) -> None:
    for name in ("train", "val"):
        (root / f"ImageSets/Main/{name}.txt").rename(root / f"ImageSets/{name}.txt")
    assert VOC(root, "val").ids == ("b",)


@pytest.mark.parametrize("xmlns", ['xmlns="http://a.b"', 'xmlns:q="http://a.b"'])
def test_objects_of_a_namespace_are_not_taken_as_background(root: Path, xmlns: str) -> None:
    path, name = root / "Annotations/a.xml", "q:object" if ":q" in xmlns else "object"
    text = path.read_text().replace("<object>", f"<{name} {xmlns}>").replace("</object>", f"</{name}>")
    path.write_text(text)
    with pytest.raises(DataError, match=r"a\.xml: 2 <\{http://a\.b\}object>, but 0 <object> right inside"):
        VOC(root, "train")


def test_messages_are_of_one_line_also_with_odd_names(root: Path) -> None:
    tree = root / "new\nline\x1b[31m"
    shutil.copytree(root / "Annotations", tree / "Annotations")
    with pytest.raises(DataError, match="no folder JPEGImages") as caught:
        VOC(tree, None)
    assert str(caught.value).isprintable()
    shutil.copytree(root / "JPEGImages", tree / "JPEGImages")
    (tree / "JPEGImages/a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        VOC(tree, None)
    assert str(caught.value).isprintable()


def test_lists_of_a_class_are_named_last(root: Path) -> None:
    for k in range(60):
        (root / f"ImageSets/Main/class{k}_train.txt").write_text("a 1\n")
    with pytest.raises(DataError, match=r"no list of a split test in ImageSets; there are: train, val, class0_tr.*"):
        VOC(root, "test")
