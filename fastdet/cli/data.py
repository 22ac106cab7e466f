"""The options that name data sets, and the data sets that they name."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import Literal, NamedTuple

from fastdet.cli.values import UserError, names, not_negative, positive, share
from fastdet.data import COCO, VOC, YOLO, DataError, DetectionDataset, JoinedImages, Shapes
from fastdet.data.formats.voc import find_lists
from fastdet.data.images import MAX_PIXELS
from fastdet.data.records import describe_unknown

FORMS = (
    "voc:PATH, a folder in the VOC layout, or of images and XML files; coco:IMAGES,FILE, a folder and a JSON file in "
    "COCO's format; yolo:FILE, a data.yaml; or shapes:COUNT,SEED, drawn; several are joined"
)
Role = Literal["train", "val"]


class DataPlace(NamedTuple):
    """Where a data set is.

    Attributes:
        kind: the format.
        path: a folder, YOLO's file, or the number of drawn pictures and their seed.
        annotations: COCO's JSON file.
    """

    kind: str
    path: str
    annotations: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}"

    @property
    def has_splits(self) -> bool:
        return self.kind == "yolo" or (self.kind == "voc" and bool(find_lists(Path(self.path))))


def parse_place(text: str) -> DataPlace:
    """The type of `--data`; shells leave a ~ behind a colon or comma as it is."""
    kind, _, path = text.partition(":")
    if kind in ("voc", "yolo") and path:
        return DataPlace(kind, expanduser(path))
    folder, _, annotations = path.rpartition(",")
    if kind == "coco" and folder and annotations:
        return DataPlace(kind, expanduser(folder), expanduser(annotations))
    if kind == "shapes" and all(number.isdecimal() and len(number) < 10 for number in path.split(",", 1)):
        return DataPlace(kind, path)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not of the form voc:PATH, coco:IMAGES,FILE, yolo:FILE or shapes:COUNT,SEED"
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What all commands take that read annotated images."""
    add = parser.add_argument_group("data").add_argument
    add("--data", type=parse_place, action="append", required=True, metavar="FORMAT:PATH", help=FORMS)
    add("--zero-based", action="store_true", help="VOC's corners are counted from 0, not from 1")
    turned = "turn images as EXIF tells: as the annotated sizes fit (auto), all (applied), or none (stored)"
    add("--orientation", choices=("auto", "applied", "stored"), default="auto", help=turned)
    wanted = "by commas, one with a comma in double quotes ('\"a, b\",c'); boxes of other classes are left out"
    add("--classes", type=names, help=wanted)
    add("--limit", type=positive, metavar="N", help="only the first N images of each split")
    add_max_pixels(parser)


def add_split_options(parser: argparse.ArgumentParser) -> None:
    """How images to evaluate on are kept apart."""
    add = parser.add_argument_group("validation").add_argument
    add("--train-split", help="VOC's list, or YOLO's key, to train on (trainval, train)")
    add("--val-split", help="likewise, to evaluate on (test, val)")
    add(
        "--val-data",
        type=parse_place,
        action="append",
        metavar="FORMAT:PATH",
        help="to evaluate on, in place of a split",
    )
    add("--val-share", type=share, metavar="0.2", help="this share of the images, in place of a split")
    add("--split-seed", type=not_negative, help="which images --val-share takes (0)")


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    text = f"larger images are refused before they are decoded ({MAX_PIXELS})"
    parser.add_argument("--max-pixels", type=positive, default=MAX_PIXELS, metavar="N", help=text)


def open_place(
    options: argparse.Namespace, place: DataPlace, split: str | None, problems: list[DataError] | None = None
) -> DetectionDataset:
    """One data set; `split` only of places that have splits."""
    how = {"max_pixels": options.max_pixels, "orientation": options.orientation, "problems": problems}
    if place.kind == "voc":
        return VOC(place.path, split, zero_based=options.zero_based, **how)
    if place.kind == "coco":
        return COCO(place.path, place.annotations, **how)
    if place.kind == "yolo":
        return YOLO(place.path, split or "train", **how)
    count, _, seed = place.path.partition(",")
    return Shapes(int(count), seed=int(seed or 0))


def _default_split(options: argparse.Namespace, place: DataPlace, role: Role) -> str:
    """The split of a role; of VOC's lists trainval and test, or train and val where there is no trainval or test."""
    if place.kind == "yolo":
        return role
    lists, given = find_lists(Path(place.path)), vars(options)
    val = given.get("val_split") or ("val" if "test" not in lists and {"train", "val"} <= lists.keys() else "test")
    if role == "val":
        return val
    has_val = "val_split" in given and not given["val_data"] and given["val_share"] is None
    # Of trainval, val is a part.
    return "train" if "train" in lists and ("trainval" not in lists or (has_val and val == "val")) else "trainval"


def open_data(
    options: argparse.Namespace,
    places: Sequence[DataPlace],
    role: Role,
    split: str | None,
    class_names: Sequence[str] | None = None,
    problems: list[DataError] | None = None,
) -> JoinedImages:
    """The data sets of all places as one.

    Args:
        options: of the command.
        places: at least one.
        role: decides the split where `split` names none.
        split: of the places that have splits.
        class_names: of labels 1, 2, ...; None takes `--classes`, or else those of the data.
        problems: as of the data sets.

    Raises:
        DataError: as the data sets, or a box is of another class, and there is no `--classes`.
    """
    kinds = {place.kind for place in (*options.data, *(getattr(options, "val_data", None) or ()))}
    if options.zero_based and "voc" not in kinds:
        raise UserError(f"--zero-based: it is of VOC's files, and the data sets are of {', '.join(sorted(kinds))}")
    if options.orientation != "auto" and kinds == {"shapes"}:
        raise UserError(f"--orientation {options.orientation}: drawn shapes have none")
    if split is not None and not any(place.has_splits for place in places):
        raise UserError(f"{places[0]} has no splits, but {split!r} is asked for")
    splits = [(split or _default_split(options, place, role)) if place.has_splits else None for place in places]
    opened = [open_place(options, *place_and_split, problems) for place_and_split in zip(places, splits, strict=True)]
    known = [name for dataset in opened for name in dataset.class_names]
    for name in (options.classes or ()) if class_names is None else ():
        if name not in known:
            warnings.warn(f"--classes: {describe_unknown(name, dict.fromkeys(known))}", stacklevel=2)
    joined = JoinedImages(opened, options.classes, leave_out_others=options.classes is not None, problems=problems)
    if class_names is not None:
        joined = JoinedImages([joined], class_names, problems=problems)
    if not len(joined) and not problems:
        raise UserError(f"{', '.join(map(str, places))}: there are no images")
    return joined if options.limit is None else joined.select(range(min(options.limit, len(joined))))


def open_training_data(
    options: argparse.Namespace,
    problems: list[DataError] | None = None,
    val_problems: list[DataError] | None = None,
) -> tuple[JoinedImages, JoinedImages | None]:
    """The images to train on, and those to evaluate on with the same classes, None where the options name none.

    Args:
        options: of the command.
        problems, val_problems: as of the data sets; that there is nothing to evaluate on is among the first.

    Raises:
        UserError: there is more than one way to what is evaluated on, or an option has no effect.
    """
    ways = [name for name in ("val_data", "val_share", "val_split") if getattr(options, name) is not None]
    if len(ways) > 1 and ways != ["val_data", "val_split"]:
        raise UserError(f"{' and '.join('--' + way.replace('_', '-') for way in ways)}: only one goes with --data")
    if options.split_seed is not None and options.val_share is None:
        raise UserError(f"--split-seed {options.split_seed}: it goes with --val-share")
    train = open_data(options, options.data, "train", options.train_split, problems=problems)
    if options.val_share is not None:
        if len(train) < 2:
            raise UserError(f"--val-share: {len(train)} image(s) cannot be split")
        return train.split(options.val_share, options.split_seed or 0)
    if not options.val_data and not all(place.has_splits for place in options.data):
        return train, None
    places = options.val_data or options.data
    try:
        return train, open_data(options, places, "val", options.val_split, train.class_names, val_problems)
    except DataError as error:
        if problems is None:
            raise
        problems.append(error)
        return train, None
