"""Data sets in COCO's format: a folder of images, and one JSON file of instances."""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdet.data.findings import Finding, Kind
from fastdet.data.formats.file_names import base_name, find_images, join_within, stem_of
from fastdet.data.formats.text_files import is_true, read_text, to_size
from fastdet.data.images import MAX_PIXELS, DataError, error_at
from fastdet.data.records import AnnotatedImages, Box, Orientation, Record, collect, unite_classes
from fastdet.safe_files import printable

# COCO's own of 118,000 images has 450 MB.
_MAX_BYTES = 1 << 30
_WORDS = {int: "a number", float: "a number", str: "a text", list: "a list"}


class COCO(AnnotatedImages):
    """Images with the instances of a JSON file in COCO's format.

    The file has "images" (id, file_name; width and height where they are known), "annotations" (image_id, category_id,
    bbox as x, y, width, height in continuous pixels; iscrowd) and "categories" (id, name). Categories of one name are
    one class. An image is the file of its file_name in the folder, which no path leads out of; else the one with the
    name or the stem of file_name in the folder itself, with any suffix.
    Crowds are to be ignored. Items, the image's size and orientation, and which boxes are left out: as of
    `AnnotatedImages`.

    Args:
        images: the folder.
        annotations: the JSON file.
        class_names: label k is `class_names[k - 1]`; when None, the names of the categories in the order of their ids.
        max_pixels: of an image, as of `read_image`.
        orientation, problems: as of `AnnotatedImages`.

    Attributes: as of `AnnotatedImages`; `ids` are the names of the image files, in the order of the JSON file.

    Raises:
        DataError: the file or an image is missing, an entry lacks what it needs, ids are repeated, or a class
            is not among `class_names`; on access, an image that cannot be decoded.
    """

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        class_names: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        *,
        orientation: Orientation = "auto",
        problems: list[DataError] | None = None,
    ) -> None:
        folder, path = Path(images), Path(annotations)
        if not folder.is_dir():
            raise error_at(folder, "no such folder")
        content = _read(path)
        findings = list[Finding]()
        names, classes = _read_categories(path, content, findings)
        listed = _index(path, content, "images")
        boxes: dict[Any, list[Box]] = {key: [] for key in listed}
        for place, entry in _entries(path, content, "annotations"):
            with collect(problems):
                image, category = (_get_id(path, place, entry, key) for key in ("image_id", "category_id"))
                if category not in names:
                    raise error_at(path, f"{place}: category_id {category!r:.100} is not among the categories")
                box = _to_box(path, place, entry, names[category])
                if image in boxes:
                    boxes[image].append(box)
                else:
                    findings.append(Finding(Kind.UNLISTED_IMAGE, f"{path.name} {place} of {image!r:.100}"))
        found, records = find_images(folder), list[Record]()
        for key, (place, entry) in listed.items():
            with collect(problems):
                records.append(_to_record(path, place, entry, folder, found, boxes[key], findings))
        super().__init__(
            f"{path}",
            records,
            classes if class_names is None else class_names,
            orientation=orientation,
            max_pixels=max_pixels,
            findings=findings,
            problems=problems,
        )


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path, _MAX_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise error_at(path, f"the JSON does not parse: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, dict):
        raise error_at(path, f"not in COCO's format: it is a {type(content).__name__}, not an object")
    return content


def _entries(path: Path, content: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its place in the file."""
    entries = content.get(name)
    if not isinstance(entries, list):
        raise error_at(path, f"not in COCO's format: it has no list {name!r}")
    placed = [(f"{name}[{k}]", entry) for k, entry in enumerate(entries)]
    for place, entry in placed:
        if not isinstance(entry, dict):
            raise error_at(path, f"{place} is a {type(entry).__name__}, not an object")
    return placed


def _get(path: Path, place: str, entry: dict[str, Any], key: str, kinds: tuple[type, ...]) -> Any:
    if key not in entry:
        raise error_at(path, f"{place} has no {key!r}")
    value = entry[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(dict.fromkeys(_WORDS[kind] for kind in kinds))
        raise error_at(path, f"{place}: {key} is {value!r:.100}, not {expected}")
    return value


def _get_id(path: Path, place: str, entry: dict[str, Any], key: str) -> Any:
    """A number or a text; a text of a number is that number, since tools write both in one file."""
    value = _get(path, place, entry, key, (int, float, str))
    # A float that is no whole number, NaN above all, is not equal to itself once it is written and read.
    if isinstance(value, float) and not value.is_integer():
        raise error_at(path, f"{place}: {key} is {value!r}, not a whole number or a text")
    return int(value) if isinstance(value, str) and re.fullmatch("0|[1-9][0-9]{0,17}", value) else value


def _index(path: Path, content: dict[str, Any], name: str) -> dict[Any, tuple[str, dict[str, Any]]]:
    """The objects of a list by their ids, which are all different."""
    indexed: dict[Any, tuple[str, dict[str, Any]]] = {}
    for place, entry in _entries(path, content, name):
        value = _get_id(path, place, entry, "id")
        if value in indexed:
            raise error_at(path, f"{place} has the id of {indexed[value][0]}, {value!r:.100}")
        indexed[value] = (place, entry)
    return indexed


def _read_categories(path: Path, content: dict[str, Any], findings: list[Finding]) -> tuple[dict[Any, str], list[str]]:
    """The names of the categories by their ids, and the classes, in the order of the ids."""
    indexed, names, placed = _index(path, content, "categories"), dict[Any, str](), list[tuple[str, str]]()
    for key in sorted(indexed, key=lambda key: (isinstance(key, str), key)):
        place, entry = indexed[key]
        names[key] = name = _get(path, place, entry, "name", (str,)).strip()
        if not name:
            raise error_at(path, f"{place}: name is blank")
        placed.append((place, name))
    return names, unite_classes(path.name, placed, findings)


def _to_box(path: Path, place: str, entry: dict[str, Any], name: str) -> Box:
    bbox = _get(path, place, entry, "bbox", (list,))
    if len(bbox) != 4 or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in bbox):
        raise error_at(path, f"{place}: bbox is {bbox!r:.100}, not four numbers")
    # A whole number can be larger than a float.
    x, y, width, height = (float(value) if abs(value) < 1e300 else math.nan for value in bbox)
    shown = ", ".join(f"{value:g}" for value in (x, y, width, height))
    return Box(name, (x, y, x + width, y + height), is_true(str(entry.get("iscrowd", 0))), shown)


def _to_record(
    path: Path,
    place: str,
    entry: dict[str, Any],
    folder: Path,
    found: dict[str, list[str]],
    boxes: list[Box],
    findings: list[Finding],
) -> Record:
    """`findings` gets one where the image is of another path or suffix than the entry names."""
    name = _get(path, place, entry, "file_name", (str,))
    root = Path(os.path.abspath(folder))
    within = join_within(root, root, name)
    image = folder / within.relative_to(root) if within else folder
    if not os.path.isfile(image):
        # Of another machine, or with another suffix.
        names = found.get(stem_of(name), [])
        named = [each for each in names if base_name(each) == base_name(name)] or names
        if len(named) != 1:
            problem = f"several of {', '.join(named)} fit" if named else "no image fits"
            raise error_at(path, f"{place}: {problem} '{printable(name, 200)}' in {folder}")
        image = folder / named[0]
        findings.append(Finding(Kind.OTHER_FILE, f"{image.name} for {printable(name, 100)}"))
    return Record(name, image, f"{path} {place}", to_size(entry.get("width"), entry.get("height")), boxes)
