"""Data sets in YOLO's layout, as Ultralytics reads it: a data.yaml, folders of images, and a text file an image."""

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from fastdet.data.findings import Finding, Kind
from fastdet.data.formats.file_names import join_within, spellings, with_slashes
from fastdet.data.formats.text_files import read_lines
from fastdet.data.formats.yolo_config import Config, read_config
from fastdet.data.images import MAX_PIXELS, SUFFIXES, DataError, error_at
from fastdet.data.records import AnnotatedImages, Box, Orientation, Record, collect, unite_classes
from fastdet.safe_files import printable

# Beyond anything that people annotate: bytes and lines of a list of images and of a file of labels, values of a line.
_MAX_LIST, _MAX_IMAGES, _MAX_LABELS, _MAX_OBJECTS, _MAX_VALUES = 256 << 20, 1 << 22, 16 << 20, 1 << 16, 1 << 16
_VAL = ("val", "valid", "validation")


class YOLO(AnnotatedImages):
    """Images with a text file of labels each, in the layout of Ultralytics' YOLO.

    The data.yaml has "names" (a list, or name by number; classes of one name are one class) or "nc" (how many), and for
    each split a folder of images, with all folders in it, or a list of images, or several of these. They lie in the
    folder "path", relative to that of the data.yaml; where there is no such folder, as on another machine, in that of
    the data.yaml itself. A path that
    leads out of the folder is an error, except that leading `..` are left out (Roboflow writes `../train/images`).
    Lines of a list are relative to the folder or to that of the list. Hidden files are left out, and links to folders
    in a folder not followed.

    The labels of an image are in the file with its stem and the suffix .txt, in its own folder, with `labels` for the
    last `images` in the path if there is such a folder; the suffix and the folders may be in upper case. A line
    has the number of a class, and center and size of a box (x, y, width, height) or a polygon of at least 3 points (x,
    y, x, y, ...), of which the box is the extent; all in shares of the width and height of the image as it is shown.
    Keypoints behind the box are not read, and need a "kpt_shape" in the data.yaml. An image without a file of labels
    has no objects, but one image at least has such a file. Items, the image's orientation, and which boxes are left
    out: as of `AnnotatedImages`.

    Args:
        path: the data.yaml, or a folder that has it.
        split: "train", "val" ("valid" and "validation" are the same), "test", or what else the data.yaml has.
        class_names: label k is `class_names[k - 1]`; when None, the names of the data.yaml, by their numbers.
        max_pixels: of an image, as of `read_image`.
        orientation, problems: as of `AnnotatedImages`.

    Attributes: as of `AnnotatedImages`; `ids` are the paths of the images within the folder, sorted, or in the order of
        the list.

    Raises:
        DataError: a file or folder is missing, unreadable, too large or outside of the data set's folder, the data.yaml
            is not as above or has anchors, a line of labels is not as above, or a class is not among `class_names`; on
            access, an image that cannot be decoded.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        class_names: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        *,
        orientation: Orientation = "auto",
        problems: list[DataError] | None = None,
    ) -> None:
        config = read_config(Path(path) / "data.yaml" if os.path.isdir(path) else Path(path))
        findings = [Finding(Kind.CLASS_WITHOUT_NAME, f"{name} in {config.path.name}") for name in config.unnamed]
        placed = [(f"class {number}", config.names[number]) for number in sorted(config.names)]
        classes = unite_classes(config.path.name, placed, findings)
        images, folders = _find_images(config, split, findings, problems)
        labels = _find_labels(images, config.root)
        records, labeled = [], dict[Path, list[str]]()
        for image, label in zip(images, labels, strict=True):
            name = image.relative_to(config.root).as_posix()
            with collect(problems):
                boxes = _read_boxes(label, config, problems)
                if boxes is None:
                    text = f"{name} has no {os.path.relpath(label, config.root)}"
                    findings.append(Finding(Kind.WITHOUT_LABELS, text))
                    if os.path.lexists(beside := image.with_suffix(".txt")):
                        findings.append(Finding(Kind.UNREAD_LABELS, os.path.relpath(beside, config.root)))
                else:
                    labeled.setdefault(label, []).append(image.name)
                records.append(Record(name, image, printable(label), None, boxes or [], relative=True))
        if not labeled and records:
            first = next(finding.text for finding in findings if finding.kind is Kind.WITHOUT_LABELS)
            with collect(problems):
                raise error_at(config.path, f"{split}: no image of {len(records)} has a file of labels: {first}")
        strangers = _find_strangers(folders, set(labels), config.root)
        findings += [Finding(Kind.WITHOUT_IMAGE, name) for name in strangers]
        findings += [
            Finding(Kind.SHARED_LABELS, f"{os.path.relpath(label, config.root)} of {', '.join(names)}")
            for label, names in labeled.items()
            if len(names) > 1
        ]
        super().__init__(
            printable(f"{config.path} ({split})"),
            records,
            classes if class_names is None else class_names,
            orientation=orientation,
            max_pixels=max_pixels,
            findings=findings,
            problems=problems,
        )


def _find_images(
    config: Config, split: str, findings: list[Finding], problems: list[DataError] | None
) -> tuple[list[Path], list[Path]]:
    """The images of a split, each once, and the folders that have been searched for them."""
    path, content, root = config.path, config.content, config.root
    keys = [key for key in (_VAL if split in _VAL else (split,)) if key in content]
    if not keys or split in ("path", "names", "nc", "kpt_shape"):
        listed = ", ".join(key for key in ("train", *_VAL, "test") if key in content)
        raise error_at(path, f"there is no split {split}; there are: {listed or 'none'}")
    sources = content[keys[0]] if isinstance(content[keys[0]], list) else [content[keys[0]]]
    if not all(isinstance(source, str) for source in sources):
        raise error_at(path, f"{keys[0]} is {sources!r:.100}, not a path or a list of paths")
    images, folders, linked = list[Path](), list[Path](), list[str]()
    for written in sources:
        source = _find_source(config, keys[0], written, findings)
        if os.path.isdir(source):
            folders.append(source)
            images += _walk(source, SUFFIXES, linked)
        else:
            images += _read_list(source, root, problems)
    if not images:
        # Where each line of a list is wrong, the error of the first one is of more use.
        raise problems[0] if problems else error_at(path, f"{keys[0]}: no images in {', '.join(sources)} of {root}")
    findings += [Finding(Kind.LINKED_FOLDER, name) for name in linked]
    repeated = [path.relative_to(root).as_posix() for path, times in Counter(images).items() if times > 1]
    findings += [Finding(Kind.LISTED_TWICE, name) for name in repeated]
    return list(dict.fromkeys(images)), folders


def _find_source(config: Config, key: str, written: str, findings: list[Finding]) -> Path:
    """A folder of images or a list of them; `findings` gets one in place of which there is another outside."""
    root = config.root
    within = join_within(root, root, written)
    source = within or join_within(root, root, re.sub(r"^(\.{1,2}/+)+", "", with_slashes(written)))
    is_outside = within is None and os.path.exists(root / with_slashes(written))
    is_there = source is not None and (os.path.isdir(source) or os.path.isfile(source))
    if source is None or (is_outside and not is_there):
        raise error_at(config.path, f"{key}: {written} leads out of the folder {root}, which 'path' can change")
    if not is_there:
        lost = f", and there is no folder {config.lost_path} ('path')" if config.lost_path else ""
        raise error_at(config.path, f"{key}: {source} is neither a folder nor a list of images{lost}")
    if is_outside:
        findings.append(Finding(Kind.OUTSIDE_PATH, f"{written} as {source}"))
    return source


def _walk(folder: Path, suffixes: Collection[str], linked: list[str]) -> list[Path]:
    """The files with a suffix in a folder and all folders in it; links to folders are appended to `linked`."""
    found, folders = list[str](), [str(folder)]
    while folders:
        current = folders.pop()
        try:
            with os.scandir(current) as entries:
                listed = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise error_at(current, f"the folder cannot be read: {error.strerror}") from error
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                linked.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                found.append(entry.path)
    return [Path(path) for path in sorted(found)]


def _read_list(path: Path, root: Path, problems: list[DataError] | None) -> list[Path]:
    images = []
    for number, line in read_lines(path, _MAX_LIST, _MAX_IMAGES):
        with collect(problems):
            bases = (path.parent, root) if line.startswith("./") else (root, path.parent)
            names = spellings(line[:4096])
            joined = [image for base in bases for name in names if (image := join_within(root, base, name))]
            image = next(filter(os.path.isfile, joined), None)
            if image is None:
                raise error_at(
                    f"{path}:{number}", f"no image {joined[0]}" if joined else f"{line[:1000]} leads out of {root}"
                )
            images.append(image)
    return images


def _find_labels(images: Sequence[Path], root: Path) -> list[Path]:
    """The file of labels of each image, which need not be there."""
    folders = {folder: _find_label_folder(folder, root) for folder in {image.parent for image in images}}
    return [_find_label(folders[image.parent], image.stem) for image in images]


def _find_label(folder: Path, stem: str) -> Path:
    paths = [os.path.join(folder, f"{name}{suffix}") for suffix in (".txt", ".TXT") for name in spellings(stem)]
    return Path(next(filter(os.path.lexists, paths), paths[0]))


def _find_label_folder(folder: Path, root: Path) -> Path:
    # The root itself can be the folder `images`, but what it lies in belongs to others.
    parts = folder.relative_to(root.parent).parts
    places = [place for place, part in enumerate(parts) if part.lower() == "images"]
    for name in ("labels", "Labels", "LABELS") if places else ():
        replaced = root.parent.joinpath(*parts[: places[-1]], name, *parts[places[-1] + 1 :])
        if os.path.isdir(replaced):
            return replaced
    return folder


def _find_strangers(folders: Sequence[Path], labels: set[Path], root: Path) -> list[str]:
    """The files of labels in and beside folders of images that are none of `labels`."""
    beside, found = {label.parent for label in labels}, set[str]()
    for folder in folders:
        label_folder = _find_label_folder(folder, root)
        for path in _walk(label_folder, (".txt",), []):
            # Other texts can lie in a folder with images; LabelImg and Label Studio write the names of classes.
            if path not in labels and path.name != "classes.txt" and (label_folder != folder or path.parent in beside):
                found.add(os.path.relpath(path, root))
    return sorted(found)


def _read_boxes(path: Path, config: Config, problems: list[DataError] | None) -> list[Box] | None:
    """The boxes of a file of labels; None if there is no such file."""
    if not os.path.lexists(path):
        return None
    boxes = []
    for number, line in read_lines(path, _MAX_LABELS, _MAX_OBJECTS):
        with collect(problems):
            boxes.append(_to_box(f"{path}:{number}", line, config))
    return boxes


def _to_box(place: str, line: str, config: Config) -> Box:
    texts = line.split(maxsplit=_MAX_VALUES)
    if len(texts) > _MAX_VALUES:
        raise error_at(place, f"the line has more than {_MAX_VALUES} values")
    try:
        # Python takes 1_0 for 10.
        number, *shares = map(float, texts if "_" not in line else ["_"])
    except ValueError:
        raise error_at(place, f"not all are numbers: {line:.200}") from None
    # A whole number is the same key as a float. Others, NaN included, are none.
    name = config.names.get(number)
    if name is None:
        raise error_at(place, f"class {texts[0]:.100} is not among the {len(config.names)} of {config.path}")
    if len(shares) == 4 + config.keypoint_values or len(shares) == 4:
        x, y, width, height = shares[:4]
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    elif len(shares) >= 6 and len(shares) % 2 == 0 and not config.keypoint_values:
        behind = shares[6::3]
        if len(shares) % 3 == 1 and 2 in behind and {0, 1, 2}.issuperset(behind):
            what = "a box with keypoints, seen (2) or not, rather than a polygon"
            raise error_at(place, f"the line is {what}: {config.path} has no kpt_shape")
        xs, ys = shares[::2], shares[1::2]
        is_finite = all(map(math.isfinite, shares))
        corners = (min(xs), min(ys), max(xs), max(ys)) if is_finite else (math.nan,) * 4
    else:
        expected = f"{5 + config.keypoint_values}" if config.keypoint_values else "7, 9, 11, ... (a polygon)"
        raise error_at(place, f"the line has {len(texts)} values, not 5 (a box) or {expected}")
    shown = " ".join(texts[1:5]) + (" ..." if len(texts) > 5 else "")
    return Box(name, corners, False, shown[:100])
