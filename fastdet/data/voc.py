"""Data sets in the folder layout of Pascal VOC."""

import math
import os
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError

from fastdet.data.images import MAX_PIXELS, SUFFIXES, DataError
from fastdet.data.records import (
    AnnotatedImages,
    Box,
    Orientation,
    Record,
    base_name,
    find_images,
    stem_of,
    warn_of,
)
from fastdet.safe_files import open_regular

# Beyond anything that people annotate.
_MAX_BYTES, _MAX_OBJECTS, _MAX_DEPTH = 64 << 20, 1 << 16, 32


class VOC(AnnotatedImages):
    """A split of a data set in the VOC layout.

    `root/ImageSets/Main/{split}.txt` lists the stems, one a line; `root/Annotations` holds their XML and
    `root/JPEGImages` the images. The list may be one of VOC's own for a class (a stem and 1 or -1), and have names with
    suffixes and folders, in UTF-8 or UTF-16. An image is the file with the annotation's own stem and the suffix of any
    format that is read; else the one that the XML names, of any folder. Sizes and `difficult` in the XML that are
    blank or nothing that is known are as if absent.

    The file's corners are 1-based pixels, both ends inside the box; an item's boxes are continuous:
    (xmin - 1, ymin - 1, xmax, ymax). Boxes that reach over the image's border stay as they are; those with
    xmax <= xmin or ymax <= ymin in the file are empty. "ignore" is VOC's `difficult`. Items, the image's size and
    orientation, and which boxes are left out: as of `AnnotatedImages`.

    Args:
        root: the folder with Annotations, ImageSets and JPEGImages.
        split: name of a file in ImageSets/Main, without .txt.
        class_names: label k is `class_names[k - 1]`; when None, the sorted names that the split's XML uses.
        max_pixels: of an image, as of `read_image`.
        zero_based: the file's corners are continuous already, counted from 0, as some tools write them.
        orientation: as of `AnnotatedImages`.

    Attributes:
        class_names: the names of labels 1, 2, ...
        ids: the stems, in the order of the split's file.

    Raises:
        DataError: a folder, split, annotation or image is missing, the split is empty, an annotation does not parse
            or lacks a name or a box, or a class is not among `class_names`; on access, an image that cannot be decoded.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        class_names: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        *,
        zero_based: bool = False,
        orientation: Orientation = "auto",
    ) -> None:
        self.root, self.split = Path(root), split
        title, images = f"{self.root} ({split})", find_images(self.root / "JPEGImages")
        chosen: list[str] = []
        records = []
        for stem in _read_split(self.root, split):
            annotation = _read_annotation(self.root / "Annotations" / f"{stem}.xml")
            image = _choose_image(self.root / "JPEGImages", stem, annotation, images, chosen)
            boxes = [_to_box(item, zero_based) for item in annotation.objects]
            records.append(Record(stem, image, str(annotation.path), annotation.size, boxes))
        warn_of(title, "image(s) taken of several with one stem", chosen)
        super().__init__(title, records, class_names, orientation=orientation, max_pixels=max_pixels)


class _Object(NamedTuple):
    name: str
    corners: tuple[float, ...]  # as in the file
    difficult: bool


class _Annotation(NamedTuple):
    path: Path
    filename: str
    size: tuple[float, float] | None
    objects: list[_Object]


def _to_box(item: _Object, zero_based: bool) -> Box:
    xmin, ymin, xmax, ymax = item.corners
    is_empty = not (xmin < xmax and ymin < ymax)
    first = 0 if zero_based or is_empty else 1
    shown = ", ".join(f"{x:g}" for x in item.corners)
    return Box(item.name, (xmin - first, ymin - first, xmax, ymax), item.difficult, shown)


def _read_split(root: Path, split: str) -> list[str]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    folder = root / "ImageSets" / "Main"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, so {root} is not in the VOC layout")
    path = folder / f"{split}.txt"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in folder.glob("*.txt"))) or "none"
        raise DataError(f"{path}: no such split; the folder has: {found}")
    try:
        with open_regular(path) as file:
            content = file.read()
        # PowerShell writes UTF-16.
        is_utf16 = content.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path}: the split is empty")
    # VOC's lists of a class: whether an image has it. Its images are those of the split all the same.
    if all(re.search(r"\s(1|-1|0)$", line) for line in lines):
        lines = [line.rsplit(maxsplit=1)[0] for line in lines]
    stems = [stem_of(line) for line in lines]
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1}) if len(set(stems)) < len(stems) else []
    warn_of(str(path), "name(s) more than once, taken once", repeated)
    return list(dict.fromkeys(stems))


def _read_annotation(path: Path) -> _Annotation:
    # Here and not above, so that the detector can be had where there is no such package.
    from defusedxml import ElementTree

    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > _MAX_BYTES:
                raise DataError(f"{path}: the annotation has more than {_MAX_BYTES >> 20} MB")
            root = _parse(ElementTree.iterparse(file, events=("start", "end")), path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation") from None
    except DataError:
        raise
    # ValueError covers forbidden entities (defusedxml) and encodings that expat does not support.
    except (ParseError, ValueError, LookupError, OSError) as error:
        raise DataError(f"{path}: the XML does not parse: {error}") from error
    elements = root.findall("object")
    if len(elements) > _MAX_OBJECTS:
        raise DataError(f"{path}: the annotation has {len(elements)} objects, more than {_MAX_OBJECTS}")
    objects = [_read_object(element, path) for element in elements]
    return _Annotation(path, (root.findtext("filename") or "").strip(), _read_size(root), objects)


def _read_size(root: Element) -> tuple[float, float] | None:
    try:
        width, height = (float(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
    except ValueError:
        return None
    return (width, height) if 0 < width < math.inf and 0 < height < math.inf else None


def _parse(events: Any, path: Path) -> Element:
    """The root of a document that is not nested deep: its elements would be freed one within another."""
    depth = 0
    for event, element in events:
        depth += 1 if event == "start" else -1
        if depth > _MAX_DEPTH:
            raise DataError(f"{path}: the annotation is nested deeper than {_MAX_DEPTH} elements")
        if depth == 0:
            root: Element = element
    return root


def _read_object(element: Element, path: Path) -> _Object:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise DataError(f"{path}: an object has no <name>")
    box = element.find("bndbox")
    if box is None:
        raise DataError(f"{path}: an object '{name}' has no <bndbox>")
    corners = tuple(_read_number(box, field, path) for field in ("xmin", "ymin", "xmax", "ymax"))
    return _Object(name, corners, _is_true(element.findtext("difficult") or ""))


def _is_true(text: str) -> bool:
    """A number other than 0, or a word for it; what is nothing that is known is as if absent."""
    try:
        return float(text) != 0
    except ValueError:
        return text.strip().lower() in ("true", "yes")


def _read_number(parent: Element, field: str, path: Path) -> float:
    text = parent.findtext(field)
    if text is None:
        raise DataError(f"{path}: <{parent.tag}> has no <{field}>")
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{path}: <{field}> is not a number: {text.strip()!r:.100}") from None


def _choose_image(
    folder: Path, stem: str, annotation: _Annotation, images: dict[str, list[str]], chosen: list[str]
) -> Path:
    """The image of an annotation; where several have its stem and none is named, the first, appended to `chosen`."""
    # A path was written on another machine: it means nothing here, and must not lead out of the folder.
    named = base_name(annotation.filename)
    names = images.get(stem) or images.get(stem_of(named), [])
    if not names:
        raise DataError(f"{folder / stem}: no image with {', '.join(sorted(SUFFIXES))}, for {annotation.path}")
    if named in names:
        return folder / named
    if len(names) > 1:
        chosen.append(f"{names[0]} of {', '.join(names)}")
    return folder / names[0]
