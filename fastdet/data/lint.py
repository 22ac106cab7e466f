"""What is wrong in a data set: every image is decoded, every box compared with the others of its image."""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from fastdet.data.findings import Finding, Kind, Mark
from fastdet.data.images import DataError
from fastdet.data.joined import JoinedImages

# Boxes of an image with at least this IoU are of one object; then their corners are apart by less than this share of
# either's side.
_SAME_OBJECT, _SHIFT = 0.9, 0.12
# Pixels that a box may reach over its image's border, and that corners of two copies of a box may be apart.
_OVER_BORDER, _ROUNDING = 1.0, 1.0


class Lint(NamedTuple):
    """What was found in a data set.

    Attributes:
        findings: all of them.
        digests: of the pixels of each image; empty where it cannot be decoded.
        repeated_images: the indices of the items with the pixels and boxes of one before them.
        repeated_boxes: by the index of an item, the boxes that are there already.
    """

    findings: list[Finding]
    digests: list[bytes]
    repeated_images: set[int]
    repeated_boxes: dict[int, list[int]]


def lint(
    dataset: JoinedImages,
    problems: Sequence[DataError],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Lint:
    """Look at every image and box of a data set.

    Args:
        dataset: what could be opened.
        problems: what could not, as the readers' `problems` collect it.
        progress: wraps the indices of the items, to show a bar.
    """
    digests, findings = list[bytes](), [Finding(Kind.UNREADABLE, str(error)) for error in problems]
    for index in progress(range(len(dataset))):
        try:
            pixels = dataset[index][0].contiguous().numpy()
            digests.append(hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest())
        except DataError as error:
            digests.append(b"")
            findings.append(Finding(Kind.UNDECODABLE, str(error), index))
    findings += dataset.findings
    repeated_images = set[int]()
    for finding in _find_equal_images(dataset, digests):
        findings.append(finding)
        if finding.kind is Kind.EQUAL_IMAGE and finding.item is not None:
            repeated_images.add(finding.item)
    repeated_boxes: dict[int, list[int]] = {}
    for index in range(len(dataset)):
        found, repeated = _find_repeated_boxes(dataset, index)
        findings += found
        if repeated:
            repeated_boxes[index] = repeated
    findings += _find_over_border(dataset)
    findings += _check_classes(dataset)
    return Lint(findings, digests, repeated_images, repeated_boxes)


def find_shared_images(train: JoinedImages, val: JoinedImages, of_train: Lint, of_val: Lint) -> list[Finding]:
    """The images of `val` that are in `train` too, by their pixels."""
    places = {digest: index for index, digest in enumerate(of_train.digests) if digest}
    return [
        Finding(Kind.IN_TRAINING, _describe_pair(val, index, train, places[digest]), index)
        for index, digest in enumerate(of_val.digests)
        if digest in places
    ]


def clean(
    dataset: JoinedImages, found: Lint, without: Iterable[bytes] = ()
) -> tuple[JoinedImages, dict[int, list[int]]]:
    """What can be mended: the images that can be decoded and of none of the digests `without`, and what is repeated.

    Returns:
        The data set without repeated images, and by the index of an item the boxes that are there already. Images of
        equal pixels with other boxes, and equal boxes of other classes, all stay: which is right only a person can say.
    """
    unusable = {b"", *without}
    kept = [
        index
        for index, digest in enumerate(found.digests)
        if digest not in unusable and index not in found.repeated_images
    ]
    repeated = {row: found.repeated_boxes[index] for row, index in enumerate(kept) if index in found.repeated_boxes}
    return dataset.select(kept), repeated


def _describe_pair(dataset: JoinedImages, index: int, other: JoinedImages, before: int) -> str:
    """Two items with their numbers of boxes: by their ids, or where these are equal by their paths."""
    names = dataset.ids[index], other.ids[before]
    if names[0] == names[1]:
        names = f"{dataset.image_path(index)}", f"{other.image_path(before)}"
    counts = len(dataset.target(index)["labels"]), len(other.target(before)["labels"])
    return f"{names[0]} ({counts[0]} boxes) as {names[1]} ({counts[1]} boxes)"


def _find_equal_images(dataset: JoinedImages, digests: Sequence[bytes]) -> Iterator[Finding]:
    first: dict[bytes, int] = {}
    for index, digest in enumerate(digests):
        if digest and (before := first.setdefault(digest, index)) != index:
            is_equal = _has_equal_boxes(dataset.target(before), dataset.target(index))
            text = _describe_pair(dataset, index, dataset, before)
            yield Finding(Kind.EQUAL_IMAGE if is_equal else Kind.EQUAL_PIXELS, text, index)


def _has_equal_boxes(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether two targets have the same boxes, in any order."""
    if len(first["labels"]) != len(second["labels"]):
        return False
    orders = [np.lexsort((*target["boxes"].T, target["ignore"], target["labels"])) for target in (first, second)]
    pairs = {key: (first[key][orders[0]], second[key][orders[1]]) for key in first}
    return np.allclose(*pairs["boxes"], rtol=0, atol=_ROUNDING) and all(
        np.array_equal(*pairs[key]) for key in ("labels", "ignore")
    )


def _find_repeated_boxes(dataset: JoinedImages, index: int) -> tuple[list[Finding], list[int]]:
    """The boxes of an item that repeat one before them, and the rows of those of the same class.

    Those of another class are findings alone: which one is right cannot be known.
    """
    target = dataset.target(index)
    rows = np.flatnonzero(~target["ignore"])
    boxes, labels = target["boxes"][rows], target["labels"][rows]
    findings, repeated = list[Finding](), list[int]()
    for first, second in _match_boxes(boxes, labels):
        classes = [dataset.class_names[labels[k] - 1] for k in (first, second)]
        corners = tuple(boxes[second].tolist())
        names = " and ".join(dict.fromkeys(classes))
        text = f"{dataset.ids[index]} {names} ({', '.join(f'{x:g}' for x in corners)})"
        findings.append(Finding(Kind.BOX_TWICE, text, index, Mark(corners, f"{classes[1]}: there twice")))
        if labels[first] == labels[second]:
            repeated.append(int(rows[second]))
    return findings, repeated


def _match_boxes(boxes: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of a box and the one after it that has the same object.

    A box is compared with those before it, but for the ones that repeat one of their class, and those of its class come
    first.
    """
    if len(boxes) < 2:
        return
    # Only boxes that begin at about the same place are compared, along the axis on which more places differ.
    axis = int(len(np.unique(boxes[:, 1])) > len(np.unique(boxes[:, 0])))
    starts, shifts = boxes[:, axis].tolist(), (_SHIFT * (boxes[:, axis + 2] - boxes[:, axis])).tolist()
    compared, places = list[int](), list[float]()
    for second, (start, shift) in enumerate(zip(starts, shifts, strict=True)):
        candidates = compared[bisect_left(places, start - shift) : bisect_right(places, start + shift)]
        equal = (
            sorted(np.array(candidates)[_overlaps(boxes[second], boxes[candidates]) >= _SAME_OBJECT].tolist())
            if candidates
            else []
        )
        of_class = [first for first in equal if labels[first] == labels[second]]
        if equal:
            yield (of_class or equal)[0], second
        if not of_class:
            place = bisect_right(places, start)
            places.insert(place, start)
            compared.insert(place, second)


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of a box [4] with others [N, 4]."""
    x1, y1, x2, y2 = boxes.T
    width = np.minimum(box[2], x2) - np.maximum(box[0], x1)
    height = np.minimum(box[3], y2) - np.maximum(box[1], y1)
    both = width.clip(min=0) * height.clip(min=0)
    return both / ((box[2] - box[0]) * (box[3] - box[1]) + (x2 - x1) * (y2 - y1) - both)


def _find_over_border(dataset: JoinedImages) -> Iterator[Finding]:
    for index, (height, width) in enumerate(dataset.sizes):
        target = dataset.target(index)
        for corners, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = corners
            if max(-x1, -y1, x2 - width, y2 - height) > _OVER_BORDER:
                mark = Mark(tuple(corners), f"{dataset.class_names[label - 1]}: over the border")
                text = f"{dataset.ids[index]} ({', '.join(f'{x:g}' for x in corners)})"
                yield Finding(Kind.OVER_BORDER, text, index, mark)


def _check_classes(dataset: JoinedImages) -> Iterator[Finding]:
    targets = map(dataset.target, range(len(dataset)))
    used = {label for target in targets for label in target["labels"][~target["ignore"]].tolist()}
    if not used:
        yield Finding(Kind.WITHOUT_BOX, f"{len(dataset)} images")
    first: dict[str, str] = {}
    for label, name in enumerate(dataset.class_names, start=1):
        if label not in used:
            yield Finding(Kind.CLASS_WITHOUT_BOX, name)
        if (before := first.setdefault(normalize("NFKC", name).casefold(), name)) != name:
            yield Finding(Kind.SIMILAR_CLASS, f"{name} and {before}")
