"""What is wrong in a data set: every image is decoded, every box compared with the others of its image."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fastdet.data.images import DataError
from fastdet.data.joined import JoinedImages

# Boxes of an image with at least this IoU are of one object.
_SAME_OBJECT = 0.9
# Ends of the kinds of what readers find that loses no ground truth.
_HARMLESS = ("taken as background", "with another suffix")
# Pixels that a box may reach over its image's border.
_OVER_BORDER = 1.0


class Mark(NamedTuple):
    """A box that a finding is about.

    Attributes:
        item: its index.
        corners: x1, y1, x2, y2 in pixels.
        text: of the class, and what is wrong.
    """

    item: int
    corners: tuple[float, float, float, float]
    text: str


class Finding(NamedTuple):
    """What was found of one kind.

    Attributes:
        kind: in words that follow a number.
        is_error: ground truth is lost or false by it; the others are to be known.
        items: a description of each.
        marks: the boxes that can be drawn.
    """

    kind: str
    is_error: bool
    items: list[str]
    marks: Sequence[Mark] = ()


class Lint(NamedTuple):
    """What was found in a data set.

    Attributes:
        findings: those of which there is one at least.
        digests: of the pixels of each image; empty where it cannot be decoded.
        repeated_boxes: by the index of an item, the boxes that are there already.
    """

    findings: list[Finding]
    digests: list[bytes]
    repeated_boxes: dict[int, list[int]]

    @property
    def unreadable(self) -> list[int]:
        """The indices of the images that cannot be decoded."""
        return [index for index, digest in enumerate(self.digests) if not digest]


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
    digests, undecodable = list[bytes](), list[str]()
    for index in progress(range(len(dataset))):
        try:
            pixels = dataset[index][0].contiguous().numpy()
            digests.append(hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest())
        except DataError as error:
            digests.append(b"")
            undecodable.append(str(error))
    repeated, repeats, marks = _find_repeated_boxes(dataset)
    findings = [
        Finding("image(s) or annotation(s) that cannot be read", True, [str(error) for error in problems]),
        Finding("image(s) that cannot be decoded", True, undecodable),
        *(
            Finding(kind, not kind.endswith(_HARMLESS), items, _mark_left_out(dataset, kind))
            for kind, items in dataset.findings.items()
        ),
        Finding("image(s) whose pixels another has too", True, _describe_equal(dataset, digests)),
        Finding("box(es) that are there twice", True, repeats, marks),
        Finding("box(es) that reach over the border by more than a pixel", False, *_find_over_border(dataset)),
        Finding("class(es) without a box", False, _find_unused(dataset)),
    ]
    return Lint([finding for finding in findings if finding.items], digests, repeated)


def find_shared_images(train: JoinedImages, val: JoinedImages, of_train: Lint, of_val: Lint) -> Finding:
    """The images that are in both of two data sets, by their pixels."""
    names = {digest: train.ids[index] for index, digest in enumerate(of_train.digests) if digest}
    return Finding(
        "image(s) to evaluate on that are trained on too",
        True,
        [
            f"{val.ids[index]} as {names[digest]}"
            for index, digest in enumerate(of_val.digests)
            if digest and digest in names
        ],
    )


def clean(
    dataset: JoinedImages, found: Lint, without: Iterable[bytes] = ()
) -> tuple[JoinedImages, dict[int, list[int]]]:
    """The images that can be decoded, each once and of none of the digests `without`, and their repeated boxes."""
    found_before, kept = set(without), list[int]()
    for index, digest in enumerate(found.digests):
        if digest and digest not in found_before:
            found_before.add(digest)
            kept.append(index)
    repeated = {row: found.repeated_boxes[index] for row, index in enumerate(kept) if index in found.repeated_boxes}
    return dataset.select(kept), repeated


def _mark_left_out(dataset: JoinedImages, kind: str) -> list[Mark]:
    if not kind.startswith("box(es) left out"):
        return []
    return [Mark(index, box.corners, f"{box.name}: left out") for index, box in dataset.left_out]


def _describe_equal(dataset: JoinedImages, digests: Sequence[bytes]) -> list[str]:
    names = defaultdict(list)
    for index, digest in enumerate(digests):
        if digest:
            names[digest].append(dataset.ids[index])
    return [", ".join(equal) for equal in names.values() if len(equal) > 1]


def _find_repeated_boxes(dataset: JoinedImages) -> tuple[dict[int, list[int]], list[str], list[Mark]]:
    """By item the boxes that repeat one before them, a description of each, and where it is.

    Those of another class are described alone: which one is right cannot be known.
    """
    repeated, described, marks = dict[int, list[int]](), list[str](), list[Mark]()
    for index, name in enumerate(dataset.ids):
        target = dataset.target(index)
        rows = np.flatnonzero(~target["ignore"])
        boxes, labels = target["boxes"][rows], target["labels"][rows]
        kept = np.ones(len(rows), dtype=np.bool_)
        for second in range(1, len(rows)):
            equal = np.flatnonzero(kept[:second] & (_overlaps(boxes[second], boxes[:second]) >= _SAME_OBJECT))
            if not len(equal):
                continue
            of_class = equal[labels[equal] == labels[second]]
            kept[second] = not len(of_class)
            first = int((of_class if len(of_class) else equal)[0])
            classes = [dataset.class_names[labels[k] - 1] for k in (first, second)]
            corners = boxes[second].tolist()
            shown = ", ".join(f"{x:g}" for x in corners)
            described.append(f"{name} {' and '.join(dict.fromkeys(classes))} ({shown})")
            marks.append(Mark(index, tuple(corners), f"{classes[1]}: there twice"))
            if classes[0] == classes[1]:
                repeated.setdefault(index, []).append(int(rows[second]))
    return repeated, described, marks


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of a box [4] with others [N, 4]."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    both = np.maximum(high - low, 0).prod(-1)
    return both / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(-1) - both)


def _find_over_border(dataset: JoinedImages) -> tuple[list[str], list[Mark]]:
    marks = []
    for index, (height, width) in enumerate(dataset.sizes):
        target = dataset.target(index)
        for corners, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = corners
            if max(-x1, -y1, x2 - width, y2 - height) > _OVER_BORDER:
                marks.append(Mark(index, tuple(corners), f"{dataset.class_names[label - 1]}: over the border"))
    described = [f"{dataset.ids[mark.item]} ({', '.join(f'{x:g}' for x in mark.corners)})" for mark in marks]
    return described, marks


def _find_unused(dataset: JoinedImages) -> list[str]:
    targets = map(dataset.target, range(len(dataset)))
    used = {label for target in targets for label in target["labels"][~target["ignore"]].tolist()}
    return [name for label, name in enumerate(dataset.class_names, start=1) if label not in used]
