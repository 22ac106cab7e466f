"""Names of files in folders, lists and annotations: of any system, and of either form that Unicode has of an accent."""

import os
import re
from pathlib import Path
from unicodedata import normalize

from fastdet.data.images import SUFFIXES


def find_images(folder: Path) -> dict[str, list[str]]:
    """The names of the image files in a folder, but hidden ones, by their stems, with accents composed."""
    found: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SUFFIXES and not name.startswith("."):
            found.setdefault(normalize("NFC", stem), []).append(name)
    return found


def base_name(path: str) -> str:
    """The name of a file without folders, with accents composed: macOS writes a letter and its accent apart."""
    return normalize("NFC", re.split(r"[\\/]", path)[-1])


def stem_of(name: str) -> str:
    """The name as of `base_name`, without the suffix of an image or an annotation."""
    name = base_name(name)
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES | {".xml"} else name


def spellings(name: str) -> list[str]:
    """A name as it is, and with its accents composed and apart, each once."""
    return list(dict.fromkeys((name, normalize("NFC", name), normalize("NFD", name))))


def with_slashes(path: str) -> str:
    """A path of any system with the slashes of this one."""
    return path.replace("\\", "/")


def join_within(root: Path, folder: Path, written: str) -> Path | None:
    """A path that is relative to a folder; None if it leads out of the root. Both are absolute."""
    path = Path(os.path.normpath(folder / with_slashes(written)))
    return path if path.is_relative_to(root) else None
