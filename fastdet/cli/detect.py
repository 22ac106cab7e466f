"""The boxes that a detector finds in image files, drawn and as JSON: `fastdet detect`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastdet.cli.values import UserError
from fastdet.data import DataError
from fastdet.data.formats.file_names import find_images
from fastdet.engine import detect, load_model
from fastdet.engine.predict import ImageDetections
from fastdet.safe_files import printable, write_json
from fastdet.visualize import draw_detections


def run(options: argparse.Namespace, device: torch.device) -> None:
    """Detect in one file after another. One that cannot be read is named, and the others go on.

    Raises:
        UserError: neither pictures nor JSON are asked for, the JSON file is there already, a folder has no images, or
            some images could not be read.
        DataError: the only image could not be read.
    """
    if options.out is None and options.json is None:
        raise UserError("--out, a folder for pictures, or --json, a file, is needed")
    if options.json is not None and options.json.exists():
        raise UserError(f"--json: {options.json} is there already")
    paths = _list_images(options.images)
    model, class_names = load_model(options.weights)
    model.to(device)
    for folder in (options.out, options.json and options.json.parent):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    unread = 0
    try:
        for path in paths:
            try:
                (found,) = detect(model, [path], max_pixels=options.max_pixels)
            except DataError as error:
                if len(paths) == 1:
                    raise
                print(printable(f"fastdet: {error}"), file=sys.stderr)
                unread += 1
                continue
            found = _confident(found, options.score)
            drawn = "" if options.out is None else f" -> {_draw(found, class_names, options.out)}"
            counts = Counter(class_names[label - 1] for label in found.labels.tolist())
            listed = ", ".join(f"{times} {printable(name, 40)}" for name, times in counts.most_common()) or "nothing"
            print(printable(f"{path}: {listed}{drawn}"))
            records.append(_describe(found, class_names))
    finally:
        # After Ctrl-C too: those that are done.
        if options.json is not None and records:
            write_json(options.json, records, indent=None)
    if unread:
        raise UserError(f"{unread} of {len(paths)} images could not be read")


def _list_images(given: Iterable[Path]) -> list[Path]:
    """Files as they are, and of folders the image files in them, by name."""
    paths: list[Path] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        names = sorted(name for names in find_images(path).values() for name in names)
        if not names:
            raise UserError(f"{path}: a folder without image files")
        paths += [path / name for name in names]
    return paths


def _confident(found: ImageDetections, score: float) -> ImageDetections:
    chosen = found.scores >= score
    return found._replace(boxes=found.boxes[chosen], labels=found.labels[chosen], scores=found.scores[chosen])


def _draw(found: ImageDetections, class_names: Sequence[str], folder: Path) -> str:
    """The name of the picture."""
    file = _create(folder, found.path.stem)
    with file:
        draw_detections(found.image, found.boxes, found.labels, found.scores, class_names).save(file, format="PNG")
    return file.name


def _create(folder: Path, stem: str) -> BinaryIO:
    """A new file, of a name that is free: none that is there is overwritten, and no link is followed."""
    for number in count(1):
        with contextlib.suppress(FileExistsError):
            return (folder / (f"{stem}_{number}.png" if number > 1 else f"{stem}.png")).open("xb")
    raise AssertionError


def _describe(found: ImageDetections, class_names: Sequence[str]) -> dict[str, Any]:
    """What the JSON file has of an image: boxes are x1, y1, x2, y2 in pixels of the image as viewers turn it."""
    height, width = found.image.shape[-2:]
    labels = found.labels.tolist()
    return {
        "file_name": str(found.path),
        "width": width,
        "height": height,
        "boxes": found.boxes.tolist(),
        "labels": labels,
        "class_names": [class_names[label - 1] for label in labels],
        "scores": found.scores.tolist(),
    }
