"""Data sets in the folder layout of Pascal VOC."""

import io
import os
import re
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize
from xml.etree.ElementTree import Element, ParseError

from fastdet.data.findings import Finding, Kind
from fastdet.data.formats.file_names import base_name, find_images, stem_of
from fastdet.data.formats.text_files import is_true, read_bytes, read_lines, to_size
from fastdet.data.images import MAX_PIXELS, DataError, error_at
from fastdet.data.records import AnnotatedImages, Box, Orientation, Record, collect

# Beyond anything that people annotate.
_MAX_BYTES, _MAX_LINES, _MAX_TAGS, _MAX_OBJECTS, _MAX_DEPTH = 64 << 20, 1 << 20, 1 << 20, 1 << 16, 32
_XML = "*.[xX][mM][lL]"


class VOC(AnnotatedImages):
    """Images with an XML file each, in the VOC layout or another.

    In the VOC layout `root/Annotations` has the XML files, `root/JPEGImages` the images, and `{split}.txt` in
    `root/ImageSets/Main` (or else in `root/ImageSets`) lists the stems of a split, one a line. The list may be one of
    VOC's own for a class (a stem and 1 or -1), and have names with suffixes and folders, in UTF-8 or UTF-16. Otherwise
    `root` or one folder in it has the XML files, and one the images; hidden folders are left out. An image is the file
    with the annotation's own stem and the suffix of any format that is read; else, with a warning, the one that the XML
    names, of any folder. Sizes and `difficult` in the XML that are blank or of unknown words are as if absent.

    The file's corners are 1-based pixels, both ends inside the box; an item's boxes are continuous:
    (xmin - 1, ymin - 1, xmax, ymax). Boxes that reach over the image's border stay as they are; those with
    xmax <= xmin or ymax <= ymin in the file are empty. "ignore" is VOC's `difficult`. Items, the image's size and
    orientation, and which boxes are left out: as of `AnnotatedImages`.

    Args:
        root: the folder.
        split: name of a file in ImageSets/Main or ImageSets, without .txt; None takes all XML files.
        class_names: label k is `class_names[k - 1]`; when None, the sorted names of all XML files, of any split,
            so that the splits of a data set have the same labels.
        max_pixels: of an image, as of `read_image`.
        zero_based: the file's corners are continuous already, counted from 0, as some tools write them.
        orientation, problems: as of `AnnotatedImages`.

    Attributes: as of `AnnotatedImages`; `ids` are the stems, in the order of the split's file.

    Raises:
        DataError: a folder, split, annotation or image is missing, the split is empty, an annotation does not parse
            or lacks a name or a box, or a class is not among `class_names`; on access, an image that cannot be decoded.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None,
        class_names: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        *,
        zero_based: bool = False,
        orientation: Orientation = "auto",
        problems: list[DataError] | None = None,
    ) -> None:
        self.root, self.split = Path(root), split
        annotations, images = _find_folders(self.root)
        found = find_images(images)
        findings = list[Finding]()
        files = _find_annotations(annotations, findings)
        stems = list(files) if split is None else _read_split(self.root, split, files, findings)
        if not stems:
            raise error_at(annotations, "the folder has no XML file")
        records, others = [], files.keys() - set(stems)
        for stem in stems:
            with collect(problems):
                annotation = _read_annotation(annotations / files.get(stem, f"{stem}.xml"))
                image = _choose_image(images, stem, annotation, found, findings)
                if (owner := stem_of(image.name)) in others:
                    text = f"{image.name} in {files[owner]} and {annotation.path.name}"
                    findings.append(Finding(Kind.SEVERAL_ANNOTATIONS, text))
                boxes = [_to_box(item, zero_based) for item in annotation.objects]
                records.append(Record(stem, image, str(annotation.path), annotation.size, boxes))
        if split is None:
            findings += [Finding(Kind.INNER_FOLDER, path.name) for path in _folders_in(annotations) if _has_xml(path)]
            used = {record.image.name for record in records}
            unread = files.keys() - {record.name for record in records}
            unused = [
                name for stem, names in found.items() for name in names if name not in used and stem not in unread
            ]
            findings += [Finding(Kind.WITHOUT_ANNOTATION, name) for name in unused]
        if class_names is None:
            names, failed = {box.name for record in records for box in record.boxes}, list[DataError]()
            for stem in sorted(others):
                with collect(failed):
                    names |= {item.name for item in _read_annotation(annotations / files[stem]).objects}
            class_names = sorted(names)
            findings += [Finding(Kind.UNREAD_ANNOTATION, str(error)) for error in failed]
        super().__init__(
            str(self.root) if split is None else f"{self.root} ({split})",
            records,
            class_names,
            orientation=orientation,
            max_pixels=max_pixels,
            findings=findings,
            problems=problems,
        )


def find_lists(root: Path) -> dict[str, Path]:
    """The lists of splits that a folder in the VOC layout has, by name: those in ImageSets/Main, or in ImageSets."""
    for folder in (root / "ImageSets" / "Main", root / "ImageSets"):
        if lists := {path.stem: path for path in sorted(folder.glob("*.txt"))}:
            return lists
    return {}


def _find_folders(root: Path) -> tuple[Path, Path]:
    """The folders of the XML files and of the images."""
    if not root.is_dir():
        raise error_at(root, "no such folder")
    folders = [root, *_folders_in(root)]
    return (
        _find_folder(root, "Annotations", "XML files", [path for path in folders if _find_annotations(path, [])]),
        _find_folder(root, "JPEGImages", "images", [path for path in folders if find_images(path)]),
    )


def _folders_in(folder: Path) -> list[Path]:
    """Without hidden ones, in which Jupyter and file managers keep copies."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _has_xml(folder: Path) -> bool:
    """Whether there are XML files at any depth; behind a link, which may lead to all files there are, at the first."""
    found = folder.glob(_XML) if folder.is_symlink() else folder.rglob(_XML)
    return not all(path.name.startswith(".") for path in found)


def _find_folder(root: Path, usual: str, what: str, found: list[Path]) -> Path:
    if (root / usual).is_dir():
        return root / usual
    if len(found) != 1:
        names = ", ".join("." if path == root else path.name for path in found[:20])
        listed = f"several with {what}, of which one can be given: {names}" if found else f"no {what} in any other"
        raise error_at(root, f"not in the VOC layout: no folder {usual}, and {listed}")
    return found[0]


def _find_annotations(folder: Path, findings: list[Finding]) -> dict[str, str]:
    """The names of the XML files by their stems, sorted; of several with one stem the last, .xml, and a finding."""
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".xml" and not name.startswith("."):
            stem = normalize("NFC", stem)
            if stem in found:
                text = f"{name}, and {found[stem]}, which is not read"
                findings.append(Finding(Kind.SEVERAL_ANNOTATIONS, text))
            found[stem] = name
    return found


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


def _read_split(root: Path, split: str, known: Container[str], findings: list[Finding]) -> list[str]:
    """The stems of a list, each once; `findings` gets those that are there several times.

    `known` are the stems of the XML files: a name of them may end in a number, as lines of VOC's lists of a class do.
    """
    lists = find_lists(root)
    if split not in lists:
        # VOC's own lists of a class, such as dog_train, come last.
        known = sorted(lists, key=lambda name: ("_" in name, name))
        listed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "") if known else "none"
        raise error_at(root, f"no list of a split {split} in ImageSets; there are: {listed}")
    path = lists[split]
    lines = [line for _, line in read_lines(path, _MAX_BYTES, _MAX_LINES)]
    if not lines:
        raise error_at(path, "the split is empty")
    # VOC's lists of a class: whether an image has it. Its images are those of the split all the same.
    if all(re.search(r"\s(1|-1|0)$", line) and stem_of(line) not in known for line in lines):
        lines = [line.rsplit(maxsplit=1)[0] for line in lines]
    stems = [stem_of(line) for line in lines]
    repeated = sorted(stem for stem, times in Counter(stems).items() if times > 1)
    findings += [Finding(Kind.LISTED_TWICE, f"{stem} in {path.name}") for stem in repeated]
    return list(dict.fromkeys(stems))


def _read_annotation(path: Path) -> _Annotation:
    # Here and not above, so that the detector can be had where there is no such package.
    from defusedxml import ElementTree

    content = read_bytes(path, _MAX_BYTES)
    # Each element takes many times the memory of its tag.
    if content.count(b"<") > _MAX_TAGS:
        raise error_at(path, f"the annotation has more than {_MAX_TAGS} tags")
    try:
        root = _parse(ElementTree.iterparse(io.BytesIO(content), events=("start", "end")), path)
    except DataError:
        raise
    # ValueError covers forbidden entities (defusedxml) and encodings that expat does not support.
    except (ParseError, ValueError, LookupError) as error:
        raise error_at(path, f"the XML does not parse: {error}") from error
    elements = root.findall("object")
    if root.tag != "annotation" and not elements:
        raise error_at(path, f"it is <{root.tag[:100]}>, not an <annotation>, and has no object")
    # With the name of a namespace before it in braces.
    found = [element.tag for element in root.iter() if element.tag.rpartition("}")[2].lower() == "object"]
    if len(found) > len(elements):
        other = next((tag for tag in found if tag != "object"), "object")[:100]
        raise error_at(path, f"{len(found)} <{other}>, but {len(elements)} <object> right inside of <annotation>")
    if len(elements) > _MAX_OBJECTS:
        raise error_at(path, f"the annotation has {len(elements)} objects, more than {_MAX_OBJECTS}")
    objects = [_read_object(element, f"{path}: object {k}") for k, element in enumerate(elements, start=1)]
    size = to_size(root.findtext("size/width"), root.findtext("size/height"))
    return _Annotation(path, (root.findtext("filename") or "").strip(), size, objects)


def _parse(events: Any, path: Path) -> Element:
    """The root of a document that is not nested deep: its elements would be freed one within another."""
    depth = 0
    for event, element in events:
        depth += 1 if event == "start" else -1
        if depth > _MAX_DEPTH:
            raise error_at(path, f"the annotation is nested deeper than {_MAX_DEPTH} elements")
        if depth == 0:
            root: Element = element
    return root


def _read_object(element: Element, place: str) -> _Object:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise error_at(place, "it has no <name>")
    boxes = element.findall("bndbox")
    if len(boxes) != 1:
        raise error_at(place, f"'{name[:100]}' has {len(boxes) or 'no'} <bndbox>")
    (box,) = boxes
    corners = tuple(_read_number(box, field, place) for field in ("xmin", "ymin", "xmax", "ymax"))
    return _Object(name, corners, is_true(element.findtext("difficult") or ""))


def _read_number(box: Element, field: str, place: str) -> float:
    text = box.findtext(field)
    if text is None:
        raise error_at(place, f"its <bndbox> has no <{field}>")
    try:
        if "_" in text:
            raise ValueError
        return float(text)
    except ValueError:
        raise error_at(place, f"<{field}> is not a number: {text.strip()!r:.100}") from None


def _choose_image(
    folder: Path, stem: str, annotation: _Annotation, images: dict[str, list[str]], findings: list[Finding]
) -> Path:
    """The image of an annotation; where several have its stem and none is named, the first.

    `findings` gets one then, and where no image has the stem.
    """
    # A path was written on another machine: it means nothing here, and must not lead out of the folder.
    named = base_name(annotation.filename)
    own = images.get(stem)
    names = own or images.get(stem_of(named), [])
    if not names:
        other = f", nor {named[:100]}" if named and stem_of(named) != stem else ""
        raise error_at(annotation.path, f"no image {folder / stem}, with any suffix{other}")
    fitting = [name for name in names if base_name(name) == named] or names
    if len(fitting) > 1:
        findings.append(Finding(Kind.SEVERAL_IMAGES, f"{names[0]} of {', '.join(names)}"))
    if not own:
        findings.append(Finding(Kind.NAMED_IMAGE, f"{fitting[0]} for {annotation.path.name}"))
    return folder / fitting[0]
