"""Image files as tensors."""

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# Pillow's decoders let these through on damaged files, besides the OSError of its documentation.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


class DataError(ValueError):
    """A file of data is missing, unreadable or holds something impossible; the message is one line naming it."""


def read_image(path: str | Path) -> torch.Tensor:
    """Decode an image file to RGB.

    The pixels come as they are stored: an EXIF orientation is not applied, since annotations count stored pixels.

    Args:
        path: a file in any format that Pillow reads.

    Returns:
        float32 [3, H, W] in 0..1.

    Raises:
        DataError: the file is missing, is not an image, or is damaged or cut short.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I;16"):
                # Pillow's own conversion would cut off at 255 what reaches to 65535.
                gray = np.array(picture).astype(np.float32) / 65535
                return torch.from_numpy(gray).expand(3, -1, -1).contiguous()
            if picture.mode in ("I", "F"):
                raise DataError(f"{path}: the image's pixels (Pillow's mode {picture.mode!r}) have no known range")
            pixels = np.array(picture.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file") from None
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: the image cannot be decoded: {reason}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
