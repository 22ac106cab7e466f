"""Images and annotations of strangers: no more memory, time or programs than a picture needs."""

import io
import os
import random
import socket
import subprocess
import sys
import textwrap
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from fastdet import weights
from fastdet.data import VOC, YOLO, DataError, read_image
from fastdet.data.images import FORMATS, MAX_PIXELS
from fastdet.visualize import draw_detections

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"
AVAILABLE = [name for name in FORMATS if name != "AVIF" or features.check("avif")]


def encoded(kind, size=(20, 30)):
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def png_of(width, height):
    """A picture of one color, in some kilobytes."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", AVAILABLE)
def test_the_content_decides_the_format(tmp_path, kind):
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(kind))
    assert read_image(path).shape == (3, 30, 20)


@pytest.mark.parametrize("content", [POSTSCRIPT, b"P6 2 2 255\n" + bytes(12), b"II*\0", b"", b"GIF89a"], ids=str)
def test_other_formats_are_refused(tmp_path, content):
    for name in ("picture.jpg", "picture.eps", "picture.ppm"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"^{path}: the image cannot be decoded: "):
            read_image(path)


def test_pixels_are_counted_before_they_are_decoded(tmp_path):
    """8 kB that would become two gigabytes."""
    path = tmp_path / "huge.png"
    path.write_bytes(png_of(30_000, 3_000))
    assert path.stat().st_size < 50_000
    program = textwrap.dedent("""
        import re, resource, sys
        from fastdet.data import DataError, read_image
        used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (200 << 20),) * 2)
        try:
            read_image(sys.argv[1])
        except DataError as error:
            print(error)
    """)
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    wanted = f"{path}: the image has 30000 x 3000 = 90000000 pixels, above max_pixels = {MAX_PIXELS}"
    assert done.stdout.strip() == wanted, done.stderr[-1000:]
    small = tmp_path / "small.png"
    small.write_bytes(png_of(100, 50))
    assert read_image(small, max_pixels=5000).shape == (3, 50, 100)
    with pytest.raises(DataError, match="100 x 50 = 5000 pixels, above max_pixels = 4999"):
        read_image(small, max_pixels=4999)


@pytest.mark.parametrize("kind", AVAILABLE)
def test_damaged_images_are_named(tmp_path, kind):
    content, draw, path = encoded(kind), random.Random(0), tmp_path / "x"
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        path.write_bytes(changed[: draw.choice([len(changed), draw.randrange(len(changed))])])
        message = None
        try:
            image = read_image(path)
        except DataError as error:
            message = str(error)
        assert message is None or (message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500)
        assert message or (image.ndim == 3 and image.shape[0] == 3)


@pytest.fixture
def places(tmp_path):
    """What is no file, by kind."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    paths = {"pipe": tmp_path / "pipe", "pipe by a link": tmp_path / "link", "socket": tmp_path / "socket"}
    yield {**paths, "device": "/dev/zero", "folder": tmp_path}
    server.close()


@pytest.mark.parametrize("kind", ["pipe", "pipe by a link", "socket", "device", "folder"])
def test_what_is_no_file_is_not_opened(places, kind):
    with pytest.raises(DataError, match=f"a {kind.split()[0]}, not a file"):
        read_image(places[kind])
    with pytest.raises(weights.TensorFileError, match=f"a {kind.split()[0]}, not a file"):
        weights.read_state_dict(places[kind])


def annotation(objects):
    return f"<annotation><size><width>500</width><height>400</height></size>{objects}</annotation>"


def object_of(name="cat", corner=1):
    box = f"<xmin>{corner}</xmin><ymin>1</ymin><xmax>{corner + 9}</xmax><ymax>9</ymax>"
    return f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"


def tree(root, text, **options):
    """A data set of one image."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/Main/train.txt").write_text("one\n")
    (root / "JPEGImages/one.png").write_bytes(png_of(500, 400))
    (root / "Annotations/one.xml").write_text(text)
    return VOC(root, "train", **options)


NAME = "x" * 5_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (annotation(object_of() * 70_000), "the annotation has 70000 objects, more than 65536"),
        ("<a>" * 40 + "</a>" * 40, "nested deeper than 32"),
        ("<a>" * 1_000_000, "nested deeper than 32"),
        (annotation("<a/>" * (16 << 20))[: 64 << 20], "more than 1048576 tags"),
        (annotation(f"<!--{'x' * (65 << 20)}-->"), "more than 64 MB"),
        ('<!DOCTYPE a [<!ENTITY b "x">]><a>&b;</a>', "the XML does not parse"),
        (annotation("<object/>"), "no <name>"),
        (annotation(object_of()).replace("<xmin>1", f"<xmin>{NAME}"), "<xmin> is not a number"),
        (annotation(object_of(NAME)), "class 'x*' is not among"),
    ],
    ids=["objects", "depth", "depth of megabytes", "tags", "size", "entity", "no name", "number", "name"],
)
def test_annotations_out_of_proportion_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        tree(tmp_path, text, class_names=["cat"])
    assert str(caught.value).startswith(f"{tmp_path}/Annotations/one.xml: ")
    assert len(str(caught.value)) < 1000


def test_a_name_that_leads_out_of_the_folder_is_not_followed(tmp_path):
    text = annotation(object_of()).replace("<size>", f"<filename>../../{NAME}</filename><size>")
    assert tree(tmp_path, text).image_path(0).name == "one.png"


def test_many_objects_and_long_names_take_moments(tmp_path):
    data = tree(tmp_path, annotation(object_of() * 60_000 + object_of("y" * 2000)))
    image, target = data[0]
    assert len(target["boxes"]) == 60_001
    picture = draw_detections(image, target["boxes"][-2:], target["labels"][-2:], class_names=data.class_names)
    assert picture.size == (500, 400)


def test_lists_of_millions_of_lines_are_refused_unread(tmp_path):
    tree(tmp_path, annotation(object_of()))
    (tmp_path / "ImageSets/Main/train.txt").write_bytes(b"x\n" * (32 << 20))
    start = time.process_time()
    with pytest.raises(DataError, match=r"train\.txt: the file has more than 1048576 lines"):
        VOC(tmp_path, "train")
    (tmp_path / "labels.txt").write_bytes(b"x\r\n" * 5_000_000)
    (tmp_path / "data.yaml").write_text("train: labels.txt\nnames: [a]\n")
    with pytest.raises(DataError, match=r"labels\.txt: the file has more than 4194304 lines"):
        YOLO(tmp_path)
    assert time.process_time() - start < 5


def test_lists_and_annotations_that_are_no_files_are_not_opened(tmp_path):
    tree(tmp_path, annotation(object_of()))
    (tmp_path / "Annotations/one.xml").unlink()
    os.mkfifo(tmp_path / "Annotations/one.xml")
    with pytest.raises(DataError, match="a pipe, not a file"):
        VOC(tmp_path, "train")


def test_images_larger_than_the_data_set_allows(tmp_path):
    """They are refused when the data set is opened, by their headers."""
    with pytest.raises(DataError, match=r"one\.png: the image has 500 x 400"):
        tree(tmp_path, annotation(object_of()), max_pixels=1000)
    expected = torch.zeros(3, 400, 500, dtype=torch.uint8)
    assert torch.equal(tree(tmp_path, annotation(object_of()))[0][0], expected)
