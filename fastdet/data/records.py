"""Images with annotations of any format as one kind of data set: what the image's own header has decides.

Each format has a reader that gives `Record`s. What follows from an image (its size, its orientation, which boxes lie in
it) is decided here, for all formats alike.
"""

import contextlib
import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from fastdet.data.findings import Finding, Kind, Mark, warn_of
from fastdet.data.images import MAX_PIXELS, DataError, Header, check_pixels, error_at, read_header, read_image
from fastdet.data.transforms import Item, make_item

Orientation = Literal["auto", "applied", "stored"]


class Box(NamedTuple):
    """An annotated object.

    Attributes:
        name: of its class.
        corners: x1, y1, x2, y2 in continuous pixels.
        ignore: it is neither to be found nor background.
        shown: the box as its file has it, for messages.
    """

    name: str
    corners: tuple[float, float, float, float]
    ignore: bool
    shown: str


class Record(NamedTuple):
    """An image and its annotation.

    Attributes:
        name: the item's id.
        image: the image file.
        source: the annotation's path in messages, and what of it.
        size: (width, height) as annotated; None if it is not.
        boxes: the objects.
        relative: the corners are shares of the image's width and height, as it is shown.
    """

    name: str
    image: Path
    source: str
    size: tuple[float, float] | None
    boxes: list[Box]
    relative: bool = False


class AnnotatedImages(Dataset[Item]):
    """A data set of records.

    An item is `(image, target)`, with `torchvision.tv_tensors`: an Image uint8 [3, H, W], decoded on access; target
    "boxes" BoundingBoxes float32 [N, 4] x1, y1, x2, y2 in pixels, "labels" int64 [N] from 1 (0 is background), "ignore"
    bool [N].

    The image's header is read at once, and is right where the annotation has another size. An EXIF orientation is
    applied where the annotated size fits the turned image, and not where it fits the stored pixels. Where it fits both
    or neither, it is done as for most of the images for which it decides, and applied if there are none. Boxes that are
    empty, not finite or wholly outside the image are left out. What is found is a warning for each kind, with the
    number and the first few.

    Args:
        title: what warnings call the data set.
        records: in the order of the items.
        class_names: label k is `class_names[k - 1]`; when None, the sorted names of all boxes.
        orientation: "applied" or "stored" decides it for all images.
        max_pixels: of an image, as of `fastdet.data.read_image`.
        findings: what the reader of the format found.
        problems: where a list is given, errors of single records are appended to it and the records left out.

    Attributes:
        title: what messages call the data set.
        class_names: the names of labels 1, 2, ...
        ids: the names of the records.
        sizes: (height, width) of the images, with their orientation applied or not, as they are given.
        findings: what was warned of.

    Raises:
        DataError: an image is missing, has no readable header or too many pixels, or a class is not among
            `class_names`; on access, an image that cannot be decoded.
    """

    def __init__(
        self,
        title: str,
        records: Sequence[Record],
        class_names: Sequence[str] | None = None,
        *,
        orientation: Orientation = "auto",
        max_pixels: int = MAX_PIXELS,
        findings: Iterable[Finding] = (),
        problems: list[DataError] | None = None,
    ) -> None:
        if orientation not in ("auto", "applied", "stored"):
            raise ValueError(f"orientation must be 'auto', 'applied' or 'stored', got {orientation!r:.100}")
        if class_names is None:
            class_names = sorted({box.name for record in records for box in record.boxes})
        self.title, self.class_names, self.max_pixels = title, tuple(class_names), max_pixels
        if repeated := [name for name, times in Counter(self.class_names).items() if times > 1]:
            raise error_at(title, f"class_names repeats {repeated[0]!r:.100}")
        labels = {name: k for k, name in enumerate(self.class_names, start=1)}
        readable, headers = [], []
        for record in records:
            with collect(problems):
                header = read_header(record.image)
                check_pixels(record.image, header.width, header.height, max_pixels)
                _check_names(record, labels)
                readable.append(record)
                headers.append(header)
        turned = _decide_orientation(readable, headers, orientation)

        self.ids = tuple(record.name for record in readable)
        self.findings = list(findings)
        self.sizes: list[tuple[int, int]] = []
        # NumPy, not tensors: each tensor of a data set costs a file descriptor when it is sent to a loader's worker.
        self._items: list[tuple[Path, bool, dict[str, np.ndarray]]] = []
        sources: dict[Path, str] = {}
        for index, (record, header, is_turned) in enumerate(zip(readable, headers, turned, strict=True)):
            width, height = header.turned_size if is_turned else header.size
            kept, found = _check_boxes(record, width, height)
            if record.size not in (None, (width, height)):
                written = " x ".join(f"{side:g}" for side in record.size or ())
                text = f"{Path(record.source).name} {written}, {record.image.name} {width} x {height}"
                found.append(Finding(Kind.OTHER_SIZE, text))
            if record.image in sources:
                text = f"{record.image.name} in {sources[record.image]} and {Path(record.source).name}"
                found.append(Finding(Kind.SEVERAL_ANNOTATIONS, text))
            sources[record.image] = Path(record.source).name
            if header.orientation != 1:
                found.append(Finding(Kind.TURNED if is_turned else Kind.NOT_TURNED, record.image.name))
            self.findings += [finding._replace(item=index) for finding in found]
            self.sizes.append((height, width))
            self._items.append((record.image, is_turned, _make_target(kept, labels)))
        warn_of(title, self.findings)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        path, is_turned, target = self._items[index]
        image = read_image(path, self.max_pixels, apply_exif_orientation=is_turned)
        return make_item(image, {name: torch.from_numpy(values.copy()) for name, values in target.items()})

    def image_path(self, index: int) -> Path:
        """The image file of item `index`."""
        return self._items[index][0]

    def target(self, index: int) -> dict[str, np.ndarray]:
        """The target of item `index` as arrays, without decoding its image."""
        return self._items[index][2]


@contextlib.contextmanager
def collect(problems: list[DataError] | None) -> Iterator[None]:
    """Append a DataError to a list in place of raising it; None raises it."""
    try:
        yield
    except DataError as error:
        if problems is None:
            raise
        problems.append(error)


def _decide_orientation(records: Sequence[Record], headers: Sequence[Header], orientation: Orientation) -> list[bool]:
    """Whether each image's EXIF orientation is applied."""
    if orientation != "auto":
        return [header.orientation != 1 and orientation == "applied" for header in headers]
    fits: list[bool | None] = []
    for record, header in zip(records, headers, strict=True):
        stored, applied = record.size == header.size, record.size == header.turned_size
        fits.append(None if stored == applied else applied)
    decided = [fit for fit in fits if fit is not None]
    usual = 2 * sum(decided) >= len(decided)
    return [
        header.orientation != 1 and (usual if fit is None else fit) for header, fit in zip(headers, fits, strict=True)
    ]


def _to_pixels(box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = box.corners
    return box._replace(corners=(x1 * width, y1 * height, x2 * width, y2 * height))


def _round(box: Box) -> Box:
    """With the corners as float32, which an item has."""
    with np.errstate(over="ignore"):
        x1, y1, x2, y2 = np.array(box.corners).astype(np.float32).tolist()
    return box._replace(corners=(x1, y1, x2, y2))


def _is_inside(box: Box, width: int, height: int) -> bool:
    """Whether it has an area, and at least a part of it is in the image."""
    x1, y1, x2, y2 = box.corners
    return all(map(math.isfinite, box.corners)) and max(x1, 0) < x2 and max(y1, 0) < y2 and x1 < width and y1 < height


def _check_boxes(record: Record, width: int, height: int) -> tuple[list[Box], list[Finding]]:
    """The boxes of a record in pixels, and those that are left out."""
    kept, left_out = list[Box](), list[Finding]()
    in_pixels = (_to_pixels(box, width, height) for box in record.boxes) if record.relative else record.boxes
    for box in map(_round, in_pixels):
        if _is_inside(box, width, height):
            kept.append(box)
        else:
            text = f"{record.name} {box.name} ({box.shown})"
            left_out.append(Finding(Kind.BOX_LEFT_OUT, text, mark=Mark(box.corners, f"{box.name}: left out")))
    return kept, left_out


def _check_names(record: Record, labels: dict[str, int]) -> None:
    for box in record.boxes:
        if box.name not in labels:
            raise error_at(record.source, describe_unknown(box.name, labels))


def _make_target(boxes: Sequence[Box], labels: dict[str, int]) -> dict[str, np.ndarray]:
    return {
        "boxes": np.array([box.corners for box in boxes], dtype=np.float32).reshape(-1, 4),
        "labels": np.array([labels[box.name] for box in boxes], dtype=np.int64),
        "ignore": np.array([box.ignore for box in boxes], dtype=np.bool_),
    }


def describe_unknown(name: str, labels: Iterable[str]) -> str:
    """That a class is not among the known ones, and which are similar."""
    name, labels = name[:100], list(labels)
    # Among very many names the search would take seconds.
    similar = difflib.get_close_matches(name, labels) if len(labels) <= 300 else []
    similar = similar or [known for known in labels if known.lower() == name.lower()][-1:]
    known = ", ".join(labels[:20]) + (", ..." if len(labels) > 20 else "")
    hint = f"similar: {', '.join(similar)}" if similar else f"known: {known}"
    return f"class '{name}' is not among the {len(labels)} class names ({hint})"


def unite_classes(file: str, placed: Iterable[tuple[str, str]], findings: list[Finding]) -> list[str]:
    """The different names of classes, each given with its place in a file; `findings` gets those that are repeated."""
    first: dict[str, str] = {}
    for place, name in placed:
        if first.setdefault(name, place) != place:
            findings.append(Finding(Kind.CLASS_TWICE, f"{file} {place} and {first[name]}, '{name}'"))
    return list(first)
