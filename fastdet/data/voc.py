"""Datasets in the folder layout of Pascal VOC."""

import difflib
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError

import numpy as np
import torch
from torch.utils.data import Dataset

from fastdet.data.images import MAX_PIXELS, DataError, read_image
from fastdet.data.transforms import Item
from fastdet.safe_files import open_regular

_SUFFIXES = (".jpg", ".jpeg", ".png")
_REPORTED = 5
# Beyond anything that people annotate.
_MAX_BYTES, _MAX_OBJECTS, _MAX_DEPTH = 64 << 20, 1 << 16, 32


class _Object(NamedTuple):
    name: str
    corners: tuple[float, ...]  # as in the file: 1-based, both ends inside the box
    difficult: bool


class _Annotation(NamedTuple):
    path: Path
    filename: str
    width: float  # infinite where the file does not give it
    height: float
    objects: list[_Object]


class VOC(Dataset[Item]):
    """A split of a dataset in the VOC layout.

    `root/ImageSets/Main/{split}.txt` lists the stems, one a line; `root/Annotations` holds their XML and
    `root/JPEGImages` the images: the file that the XML names if it is there, else the stem with .jpg, .jpeg or .png.

    The file's corners are 1-based pixels, both ends inside the box; an item's boxes are continuous:
    (xmin - 1, ymin - 1, xmax, ymax). Boxes that reach over the image's border stay as they are. Boxes with
    xmax <= xmin or ymax <= ymin in the file, that are not finite, or that lie wholly outside the image are left out;
    one warning gives their number and the first of them.

    An item is `(image, target)`: image float32 [3, H, W] in 0..1, decoded on access; target "boxes" float32 [N, 4]
    x1, y1, x2, y2 in pixels, "labels" int64 [N] from 1 (0 is background), "ignore" bool [N], VOC's `difficult`.

    Args:
        root: the folder with Annotations, ImageSets and JPEGImages.
        split: name of a file in ImageSets/Main, without .txt.
        class_names: label k is `class_names[k - 1]`; when None, the sorted names that the split's XML uses.
        max_pixels: of an image, as of `read_image`.

    Attributes:
        class_names: the names of labels 1, 2, ...
        ids: the stems, in the order of the split's file.

    Raises:
        DataError: a folder, split, annotation or image is missing, the split is empty, an annotation does not parse
            or lacks a field, or a class is not among `class_names`; on access, an image that cannot be decoded.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        class_names: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.root, self.split, self.max_pixels = Path(root), split, max_pixels
        self.ids = _read_split(self.root, split)
        annotations = [_read_annotation(self.root / "Annotations" / f"{stem}.xml") for stem in self.ids]
        if class_names is None:
            class_names = sorted({item.name for annotation in annotations for item in annotation.objects})
        self.class_names = tuple(class_names)
        if len(set(self.class_names)) < len(self.class_names):
            raise DataError(f"class_names repeats a name: {', '.join(self.class_names)}")
        labels = {name: k for k, name in enumerate(self.class_names, start=1)}

        dropped: list[str] = []
        # NumPy, not tensors: each tensor of a dataset costs a file descriptor when it is sent to a loader's worker.
        self._records = [
            (_find_image(self.root / "JPEGImages", stem, annotation), _make_target(annotation, labels, dropped))
            for stem, annotation in zip(self.ids, annotations, strict=True)
        ]
        if dropped:
            shown = ", ".join(dropped[:_REPORTED]) + (", ..." if len(dropped) > _REPORTED else "")
            message = f"{len(dropped)} box(es) left out, empty, not finite or outside the image: {shown}"
            warnings.warn(f"{self.root} ({split}): {message}", stacklevel=2)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Item:
        path, target = self._records[index]
        image = read_image(path, self.max_pixels)
        # What the size in the XML did not show to lie outside the image.
        height, width = image.shape[-2:]
        x1, y1, x2, y2 = target["boxes"].T
        outside = (x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0)
        if outside.any():
            corners = ", ".join(f"{x:g}" for x in target["boxes"][outside.argmax()])
            raise DataError(f"{path}: a box lies outside its {height} x {width} pixels: ({corners})")
        return image, {name: torch.from_numpy(values.copy()) for name, values in target.items()}

    def image_path(self, index: int) -> Path:
        """The image file of item `index`."""
        return self._records[index][0]


def _read_split(root: Path, split: str) -> tuple[str, ...]:
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
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    stems = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not stems:
        raise DataError(f"{path}: the split is empty")
    return stems


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
    size = root.find("size")
    width, height = (0.0, 0.0) if size is None else (_read_number(size, field, path) for field in ("width", "height"))
    if not (width > 0 and height > 0):
        width = height = math.inf
    elements = root.findall("object")
    if len(elements) > _MAX_OBJECTS:
        raise DataError(f"{path}: the annotation has {len(elements)} objects, more than {_MAX_OBJECTS}")
    objects = [_read_object(element, path) for element in elements]
    return _Annotation(path, (root.findtext("filename") or "").strip(), width, height, objects)


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
    difficult = element.find("difficult") is not None and _read_number(element, "difficult", path) != 0
    return _Object(name, corners, difficult)


def _read_number(parent: Element, field: str, path: Path) -> float:
    text = parent.findtext(field)
    if text is None:
        raise DataError(f"{path}: <{parent.tag}> has no <{field}>")
    try:
        return float(text)
    except ValueError:
        raise DataError(f"{path}: <{field}> is not a number: {text.strip()!r:.100}") from None


def _find_image(folder: Path, stem: str, annotation: _Annotation) -> Path:
    name = annotation.filename
    # Only a bare name: a path written on another machine means nothing here, and must not lead out of the folder.
    names = [name] if Path(name).name == name else []
    for path in (folder / name for name in (*names, *(stem + suffix for suffix in _SUFFIXES))):
        if path.is_file():
            return path
    raise DataError(f"{folder / stem}: no image with {', '.join(_SUFFIXES)}, for {annotation.path}")


def _make_target(annotation: _Annotation, labels: dict[str, int], dropped: list[str]) -> dict[str, np.ndarray]:
    """The target of an item, as NumPy arrays; descriptions of the boxes left out are appended to `dropped`."""
    kept: list[_Object] = []
    for item in annotation.objects:
        if item.name not in labels:
            raise DataError(_describe_unknown(item.name, labels, annotation.path))
        xmin, ymin, xmax, ymax = item.corners
        valid = all(map(math.isfinite, item.corners)) and 0 < xmax > xmin and 0 < ymax > ymin
        if valid and xmin - 1 < annotation.width and ymin - 1 < annotation.height:
            kept.append(item)
        else:
            dropped.append(f"{annotation.path.name} {item.name} ({', '.join(f'{x:g}' for x in item.corners)})")
    boxes = np.array([item.corners for item in kept], dtype=np.float32).reshape(-1, 4)
    return {
        "boxes": boxes - np.array([1, 1, 0, 0], dtype=np.float32),
        "labels": np.array([labels[item.name] for item in kept], dtype=np.int64),
        "ignore": np.array([item.difficult for item in kept], dtype=np.bool_),
    }


def _describe_unknown(name: str, labels: dict[str, int], path: Path) -> str:
    name = name[:100]
    similar = (
        difflib.get_close_matches(name, labels) or [known for known in labels if known.lower() == name.lower()][-1:]
    )
    hint = f"similar: {', '.join(similar)}" if similar else f"known: {', '.join(labels)}"
    return f"{path}: class '{name}' is not among the {len(labels)} class names ({hint})"
