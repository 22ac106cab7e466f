"""What is found in data sets: readers warn of it, and `fastdet lint` lists it."""

import warnings
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from fastdet.safe_files import printable

_REPORTED = 5


class Kind(Enum):
    """What can be found.

    Attributes:
        words: what follows a number.
        is_error: ground truth is lost or false by it; the others are to be known.
    """

    UNREADABLE = "image(s) or annotation(s) that cannot be read", True
    UNDECODABLE = "image(s) that cannot be decoded", True
    LISTED_TWICE = "image(s) more than once in the list, taken once", False
    OUTSIDE_PATH = "path(s) that lead out of the data set's folder, taken within it", True
    LINKED_FOLDER = "link(s) to folders in a folder of images, not followed", True
    INNER_FOLDER = "folder(s) with XML files inside that of the XML files, not read", True
    UNREAD_ANNOTATION = "XML file(s) of other splits that cannot be read", True
    UNLISTED_IMAGE = "annotation(s) of images that are not listed, left out", True
    WITHOUT_ANNOTATION = "image(s) without an XML file, left out", True
    WITHOUT_LABELS = "image(s) without a file of labels, taken as background", False
    UNREAD_LABELS = "file(s) of labels beside images whose labels are in another folder, not read", True
    WITHOUT_IMAGE = "file(s) of labels without an image", True
    SHARED_LABELS = "file(s) of labels that several images have in common", True
    SEVERAL_IMAGES = "image(s) taken of several with one stem", True
    NAMED_IMAGE = "image(s) with another name than their annotation, found by its <filename>", False
    OTHER_FILE = "image(s) found in another place or with another suffix than is listed", False
    SEVERAL_ANNOTATIONS = "image(s) with several annotations", True
    OTHER_SIZE = "annotation(s) of another size than the image, which is right", True
    TURNED = "image(s) whose EXIF orientation is applied", False
    NOT_TURNED = "image(s) whose EXIF orientation is not applied", False
    BOX_LEFT_OUT = "box(es) left out, empty, not finite or outside the image", True
    CLASS_LEFT_OUT = "class(es) left out, with all their boxes", False
    CLASS_WITHOUT_NAME = "class(es) without a name, named by their numbers", False
    CLASS_TWICE = "class(es) with the name of another, taken as one", False
    SIMILAR_CLASS = "class(es) with the name of another but for upper and lower case or the spelling of accents", False
    CLASS_WITHOUT_BOX = "class(es) without a box", False
    WITHOUT_BOX = "data set(s) without a single box that is to be found", True
    EQUAL_IMAGE = "image(s) with the pixels and boxes of another", True
    EQUAL_PIXELS = "image(s) with the pixels of another, and other boxes", True
    IN_TRAINING = "image(s) to evaluate on that are trained on too", True
    BOX_TWICE = "box(es) that are there twice", True
    OVER_BORDER = "box(es) that reach over the border by more than a pixel", False
    UNREACHED = "box(es) that no anchor reaches at IoU .5", False

    def __init__(self, words: str, is_error: bool) -> None:
        self.words, self.is_error = words, is_error


class Mark(NamedTuple):
    """Where to draw a finding about a box: x1, y1, x2, y2 in pixels, and a few words."""

    corners: tuple[float, ...]
    text: str


class Finding(NamedTuple):
    """One thing that was found.

    Attributes:
        kind: what it is.
        text: the name of the file, and what was found in it.
        item: the index of the image that it is about; None of what belongs to the data set as a whole.
        mark: of the box that it is about.
    """

    kind: Kind
    text: str
    item: int | None = None
    mark: Mark | None = None


def group(findings: Iterable[Finding]) -> dict[Kind, list[Finding]]:
    """The findings of each kind of which there is one."""
    grouped: dict[Kind, list[Finding]] = {kind: [] for kind in Kind}
    for finding in findings:
        grouped[finding.kind].append(finding)
    return {kind: found for kind, found in grouped.items() if found}


def summarize(kind: Kind, found: list[Finding], most: int = _REPORTED) -> str:
    """The number of findings of a kind and the first few, on one line."""
    shown = "; ".join(printable(finding.text, 300) for finding in found[:most])
    return f"{len(found)} {kind.words}: {shown}{'; ...' if len(found) > most else ''}"


def warn_of(title: str, findings: Iterable[Finding]) -> None:
    """A warning of each kind."""
    for kind, found in group(findings).items():
        warnings.warn(f"{title}: {summarize(kind, found)}", stacklevel=3)
