"""Image files as tensors."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from fastdet.safe_files import open_regular

# What is decoded, by content. Others of Pillow's formats run programs, such as Ghostscript, or are rarely looked at.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# 8192 x 8192: some kilobytes can be a picture of billions of pixels.
MAX_PIXELS = 1 << 26


class DataError(ValueError):
    """A file of data is missing, unreadable or holds something impossible; the message is one line naming it."""


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode an image file to RGB.

    The pixels come as they are stored: an EXIF orientation is not applied, since annotations count stored pixels.

    Args:
        path: a file in one of `FORMATS`, of an animation the first picture.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        float32 [3, H, W] in 0..1.

    Raises:
        DataError: the file is missing, is not an image, has too many pixels, or is damaged or cut short.
    """
    try:
        with open_regular(path) as file, _open(file) as picture:
            if (pixels := picture.width * picture.height) > max_pixels:
                size = f"{picture.width} x {picture.height}"
                raise DataError(f"{path}: the image has {size} = {pixels} pixels, above max_pixels = {max_pixels}")
            if picture.mode.startswith("I;16"):
                # Pillow's own conversion would cut off at 255 what reaches to 65535.
                gray = np.array(picture).astype(np.float32) / 65535
                return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
            if picture.mode in ("I", "F"):
                raise DataError(f"{path}: the image's pixels (Pillow's mode {picture.mode!r}) have no known range")
            decoded = np.array(picture.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file") from None
    except DataError:
        raise
    # A damaged file can lead a decoder into any exception.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{path}: the image cannot be decoded: {reason}") from error
    return torch.from_numpy(decoded).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _open(file: BinaryIO) -> Image.Image:
    Image.init()
    with warnings.catch_warnings():
        # Pillow has a limit of its own, and warns from half of it on.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
