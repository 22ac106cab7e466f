"""Decoding: torchvision's and Pillow's pixels are the same bits."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastdet.data import DataError, read_image
from fastdet.data import images as images_module
from fastdet.data.formats.file_names import find_images


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": (), "RGB": (3,), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def by_pillow(path: Path, turned: bool = False) -> torch.Tensor:
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture) if turned else picture
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 3), (16, 16), (33, 65), (120, 161)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 100, "subsampling": 0}, {"quality": 5}])
def test_jpeg_is_what_pillow_decodes(tmp_path, mode, height, width, options):
    path = tmp_path / "a.jpg"
    noise(height, width, mode).save(path, **options)
    image = read_image(path)
    assert (image.dtype, image.shape) == (torch.uint8, (3, height, width))
    assert torch.equal(image, by_pillow(path))


def test_jpeg_is_decoded_by_torchvision(tmp_path, monkeypatch):
    noise(20, 30).save(tmp_path / "a.jpg")
    expected = read_image(tmp_path / "a.jpg")
    calls = []
    plain = images_module._decode_jpeg
    monkeypatch.setattr(images_module, "_decode_jpeg", lambda *arguments: calls.append(plain(*arguments)) or calls[-1])
    assert read_image(tmp_path / "a.jpg") is calls[0]
    monkeypatch.setattr("torchvision.io.decode_jpeg", None)
    monkeypatch.setattr(images_module, "_decode_jpeg", lambda *_: None)
    assert torch.equal(read_image(tmp_path / "a.jpg"), expected)


def test_decoding_does_not_warn(tmp_path):
    noise(20, 30).save(tmp_path / "a.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    noise(20, 31).save(path, exif=exif)
    for turned in (False, True):
        assert torch.equal(read_image(path, apply_exif_orientation=turned), by_pillow(path, turned))
    assert read_image(path, apply_exif_orientation=True).shape[1:] == ((31, 20) if orientation >= 5 else (20, 31))


def test_jpeg_with_much_behind_the_image(tmp_path):
    """Videos of phones hang behind their pictures: they are not read into memory."""
    noise(20, 30).save(tmp_path / "a.jpg")
    expected = by_pillow(tmp_path / "a.jpg")
    for size in (100_000, 3 << 20):
        with (tmp_path / "a.jpg").open("ab") as file:
            file.truncate(size)
        assert torch.equal(read_image(tmp_path / "a.jpg"), expected)


def test_a_cut_jpeg_is_an_error(tmp_path):
    content = io.BytesIO()
    noise(60, 80).save(content, "JPEG")
    for share in (0.4, 0.7, 0.95):
        (tmp_path / "a.jpg").write_bytes(content.getvalue()[: int(share * len(content.getvalue()))])
        with pytest.raises(DataError, match=r"a\.jpg: the image cannot be decoded"):
            read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("content", [b"", b"<html>"])
def test_files_that_are_no_images(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jpg: the image cannot be decoded: it is not in a format of JPEG, PNG"):
        read_image(tmp_path / "a.jpg")


def test_warnings_of_decoders_are_dropped(tmp_path):
    """They name no file."""
    picture = Image.new("P", (8, 6), 1)
    picture.putpalette([10, 20, 30] * 4)
    picture.save(tmp_path / "a.png", transparency=bytes([0, 128, 255, 255]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png")[:, 0, 0].tolist() == [10, 20, 30]


def test_jpeg_of_several_pictures(tmp_path):
    """The files of two-lens cameras: the first picture."""
    pictures = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    pictures[0].save(tmp_path / "a.mpo", save_all=True, append_images=pictures[1:])
    assert find_images(tmp_path) == {"a": ["a.mpo"]}
    assert read_image(tmp_path / "a.mpo")[:, 0, 0].tolist() == [254, 0, 0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "avif"])
def test_the_limit_of_pixels_is_the_argument_and_not_pillows(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "avif":
        pytest.importorskip("PIL._avif")
    noise(20, 31).save(path)
    expected = by_pillow(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert torch.equal(read_image(path, 620), expected)
    with pytest.raises(DataError, match="31 x 20 = 620 pixels, above max_pixels = 619"):
        read_image(path, 619)
    assert Image.MAX_IMAGE_PIXELS == 200


def test_a_limit_of_pillow_is_named(tmp_path, monkeypatch):
    """Some formats have one in some versions."""

    def refuse(*_):
        raise Image.DecompressionBombError("exceeds limit of 400 pixels")

    noise(20, 31).save(tmp_path / "a.png")
    Image.init()
    monkeypatch.setitem(Image.OPEN, "PNG", (refuse, Image.OPEN["PNG"][1]))
    with pytest.raises(DataError, match=r"a\.png: .*exceeds limit of 400 pixels \(twice PIL\.Image\.MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "a.png")
