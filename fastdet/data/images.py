"""Image files as tensors."""

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fastdet.safe_files import open_regular, printable

# What is decoded, by content. Others of Pillow's formats run programs, such as Ghostscript, or are rarely looked at.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# The endings of names of such files.
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif")
    + (".avif", ".avifs")
)
# 8192 x 8192: some kilobytes can be a picture of billions of pixels.
MAX_PIXELS = 1 << 26


class DataError(ValueError):
    """A file of data is missing, unreadable or holds something impossible; the message is one line naming it."""


def error_at(place: object, message: str) -> DataError:
    """An error about a file, or a place in it, of one line that a terminal can show."""
    return DataError(printable(f"{place}: {message}", 2000))


class Header(NamedTuple):
    """What an image file has before its pixels: width and height as they are stored, and how EXIF turns them (1..8)."""

    width: int
    height: int
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored."""
        return self.width, self.height

    @property
    def turned_size(self) -> tuple[int, int]:
        """(width, height) with the orientation applied: from 5 on the sides change places."""
        return (self.height, self.width) if self.orientation >= 5 else self.size


def read_header(path: str | Path) -> Header:
    """The size and orientation of an image file, without decoding it.

    Raises:
        DataError: the file is missing, or is not an image.
    """
    with _open_image(path) as (_, picture):
        return Header(picture.width, picture.height, _read_orientation(picture))


def _read_orientation(picture: Image.Image) -> int:
    """How EXIF turns an image, 1..8, without decoding it; 1 where it has none that parses, as viewers take it."""
    # Pillow turns a TIFF as it loads it, and loads a PNG to look for EXIF behind its pixels.
    if picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info):
        return 1
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    # What is no EXIF can lead its parser into any exception.
    except Exception:
        return 1
    return orientation if type(orientation) is int and 1 <= orientation <= 8 else 1


def check_pixels(path: str | Path, width: int, height: int, max_pixels: int) -> None:
    """Raises DataError if an image is larger than `max_pixels`."""
    if (pixels := width * height) > max_pixels:
        raise error_at(path, f"the image has {width} x {height} = {pixels} pixels, above max_pixels = {max_pixels}")


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS, *, apply_exif_orientation: bool = False) -> torch.Tensor:
    """Decode an image file to RGB.

    torchvision decodes JPEG, to the same bits as Pillow in half of the time, and Pillow the rest.

    Args:
        path: a file in one of `FORMATS`, of an animation the first picture.
        max_pixels: larger images are refused before they are decoded. Of TIFF and WebP, Pillow's own limit of 179
            million pixels (twice `PIL.Image.MAX_IMAGE_PIXELS`) stays.
        apply_exif_orientation: turn the pixels as viewers show them; by default they come as they are stored.

    Returns:
        uint8 [3, H, W]; of 16 bits a pixel, the upper 8.

    Raises:
        DataError: the file is missing, is not an image, has too many pixels, or is damaged or cut short.
    """
    with _open_image(path) as (file, picture):
        check_pixels(path, picture.width, picture.height, max_pixels)
        is_turned = apply_exif_orientation and _read_orientation(picture) != 1
        if picture.format == "JPEG" and picture.mode in ("L", "RGB") and not is_turned:
            decoded = _decode_jpeg(file, 4 * picture.width * picture.height)
            if decoded is not None and decoded.shape == (3, picture.height, picture.width):
                return decoded
        if is_turned:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            # Pillow's own conversion would cut off at 255 what reaches to 65535.
            gray = (np.array(picture).astype(np.uint16) >> 8).astype(np.uint8)
            return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
        if picture.mode in ("I", "F"):
            mode = f"32 bits a pixel (Pillow's mode {picture.mode!r})"
            raise error_at(path, f"the image has {mode}, of no known range; 8 and 16 bits are read")
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _decode_jpeg(file: BinaryIO, most: int) -> torch.Tensor | None:
    """A JPEG file as uint8 [3, H, W], by torchvision, whose reader of PNG, unlike this, crashes on damaged files.

    None for a file of more than `most` bytes beside its metadata, and where it cannot be decoded: then Pillow decodes
    it, or finds what is wrong.
    """
    if os.fstat(file.fileno()).st_size > most + (1 << 20):
        return None
    file.seek(0)
    content = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    try:
        # Deprecated in favor of torchcodec, which few have; without it Pillow decodes all.
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(content, ImageReadMode.RGB)
    except (ImportError, RuntimeError):
        return None
    finally:
        file.seek(0)


def _identify(file: BinaryIO) -> Image.Image:
    """Pillow's `Image.open`, but for its limit of pixels, which is one for all of a process and no limit of ours."""
    Image.init()
    start = file.read(16)
    for factory, accept in (Image.OPEN[name] for name in FORMATS if name in Image.OPEN):
        # What it accepts for another plugin, which is not installed, is a text.
        if accept is None or accept(start) is True:
            file.seek(0)
            with suppress(SyntaxError, IndexError, TypeError, struct.error):
                return factory(file, "")
    raise UnidentifiedImageError


@contextmanager
def _open_image(path: str | Path) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """An image file, and the same with its header read; any error is one line, and warnings are dropped."""
    try:
        # They do not name the file: of odd metadata, which is not needed, and of many pixels, which are counted here.
        with warnings.catch_warnings(), open_regular(path) as file:
            warnings.filterwarnings("ignore", module=r"(PIL|torchvision|fastdet\.data\.images)\b")
            with _identify(file) as picture:
                yield file, picture
    except FileNotFoundError:
        raise error_at(path, "no such image file") from None
    except DataError:
        raise
    except UnidentifiedImageError:
        raise error_at(path, f"the image cannot be decoded: it is not in a format of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        # Plugins of some formats count the pixels themselves.
        raise error_at(path, f"the image cannot be decoded: {error} (twice PIL.Image.MAX_IMAGE_PIXELS)") from error
    # A damaged file can lead a decoder into any exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise error_at(path, f"the image cannot be decoded: {reason}") from error
