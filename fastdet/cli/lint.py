"""`fastdet lint`: what is wrong in a data set, and which anchors reach its objects."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from fastdet.cli.data import open_training_data
from fastdet.cli.plan import DetectorOptions, Plan, plan_detector
from fastdet.cli.values import UserError
from fastdet.data import DataError, JoinedImages
from fastdet.data.convert import write_coco
from fastdet.data.findings import Finding, Kind, Mark, group, summarize
from fastdet.data.lint import clean, find_shared_images, lint
from fastdet.engine.defaults import collect_objects
from fastdet.safe_files import printable, replace_file, write_json
from fastdet.visualize import draw_detections, tile

# Images that are drawn, boxes that are marked in one, and findings of a kind that are printed.
_DRAWN, _MARKED, _PRINTED = 12, 100, 3
# The longest side of an image that is drawn, in pixels.
_LARGEST_DRAWN = 800


class DataSetError(Exception):
    """A data set has lost or false ground truth."""


def bar(text: str) -> Callable[[Iterable[int]], Iterable[int]]:
    """Shows how many of the images are done, where stderr is a terminal."""
    return partial(tqdm, desc=text, disable=None)


def run(options: argparse.Namespace) -> bool:
    """Print and write what is found in the data sets; returns whether ground truth is lost or false."""
    if options.fix and options.fix.exists():
        raise UserError(f"--fix: {options.fix} is there already, and nothing is overwritten")
    problems: list[DataError] = []
    val_problems: list[DataError] = []
    train, val = open_training_data(options, problems, val_problems)
    of_train, of_val = lint(train, problems, bar("images to train on")), None
    used, found = _plan_both(DetectorOptions.of(options), train)
    findings = {"train": [*of_train.findings, *_find_unreached(train, used)]}
    if val is not None:
        of_val = lint(val, val_problems, bar("images to evaluate on"))
        # What is found of a whole data set is the same of its other part.
        common = {finding for finding in of_train.findings if finding.item is None}
        new = [finding for finding in of_val.findings if finding not in common]
        findings["val"] = [*new, *find_shared_images(train, val, of_train, of_val)]
    classes = _summarize_classes(train, used, found)
    _write(options.out, findings, classes, found, {"train": train, "val": val})
    if options.fix:
        cleaned = {"train": clean(train, of_train, of_val.digests if of_val else ())}
        if val is not None and of_val is not None:
            cleaned["val"] = clean(val, of_val)
        for part, (dataset, repeated) in cleaned.items():
            write_coco(dataset, options.fix / part, bar("images written"), repeated)
    print("\n".join(printable(line, 300) for line in _describe(findings, classes, used, found)))
    return any(finding.kind.is_error for finding in chain(*findings.values()))


def _plan_both(options: DetectorOptions, data: JoinedImages) -> tuple[Plan, Plan]:
    """The detector with the anchors that are given, or the backbone's own; and with those that fit the data."""
    is_given = options.anchors or options.anchor_sizes or options.aspect_ratios
    objects = collect_objects(data)
    used = options if is_given else replace(options, anchors="default")
    found = replace(options, anchors="auto", anchor_sizes=None, aspect_ratios=None)
    return plan_detector(used, objects, data.class_names), plan_detector(found, objects, data.class_names)


def _find_unreached(data: JoinedImages, plan: Plan) -> Iterator[Finding]:
    """The boxes that no anchor has an IoU of .5 with, the least first."""
    for row in np.argsort(plan.overlaps, kind="stable").tolist():
        if plan.overlaps[row] >= 0.5:
            break
        item, corners = int(plan.objects.image[row]), tuple(plan.objects.boxes[row].tolist())
        text = f"{data.class_names[plan.objects.labels[row] - 1]}: IoU {plan.overlaps[row]:.2f}"
        listed = f"{data.ids[item]} {text} with an anchor ({', '.join(f'{x:g}' for x in corners)})"
        yield Finding(Kind.UNREACHED, listed, item, Mark(corners, text))


def _summarize_classes(data: JoinedImages, used: Plan, found: Plan) -> dict[str, dict[str, float | None]]:
    """For each class its number of boxes, their median side, and the shares that anchors reach."""
    boxes, labels = used.objects.boxes, used.objects.labels
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1))
    summary: dict[str, dict[str, float | None]] = {}
    for label, name in enumerate(data.class_names, start=1):
        rows = labels == label
        columns = {"side": np.median(sides[rows]) if rows.any() else None}
        for prefix, plan in (("", used), ("found_", found)):
            for threshold in (0.5, 0.7):
                share = (plan.overlaps[rows] >= threshold).mean() if rows.any() else None
                columns[f"{prefix}reached_{threshold:g}"] = share
        rounded = {key: None if value is None else round(float(value), 4) for key, value in columns.items()}
        summary[name] = {"boxes": int(rows.sum()), **rounded}
    return summary


def _write(
    out: Path,
    findings: Mapping[str, Sequence[Finding]],
    classes: Mapping[str, Any],
    found: Plan,
    datasets: Mapping[str, JoinedImages | None],
) -> None:
    """`lint.json`, and a picture of the images of each part that have marked boxes."""
    content = {
        "images": {part: len(dataset) for part, dataset in datasets.items() if dataset is not None},
        "findings": {
            part: [
                {"kind": kind.words, "is_error": kind.is_error, "items": [finding.text for finding in found]}
                for kind, found in group(of_part).items()
            ]
            for part, of_part in findings.items()
        },
        "classes": classes,
        "anchors": found.architecture["anchors"],
        "resizing": found.reasons[0],
    }
    write_json(out / "lint.json", content)
    for part, of_part in findings.items():
        dataset = datasets[part]
        marks: dict[int, list[Mark]] = {}
        for finding in of_part:
            if finding.item is not None and finding.mark is not None:
                marks.setdefault(finding.item, []).append(finding.mark)
        drawn = []
        for index, of_image in list(marks.items())[:_DRAWN]:
            try:
                image = dataset[index][0]  # type: ignore[index]
            except DataError:
                continue
            factor = min(1.0, _LARGEST_DRAWN / max(image.shape[-2:]))
            if factor < 1:
                size = [max(round(side * factor), 1) for side in image.shape[-2:]]
                image = functional.resize(image, size, antialias=True)
            shown = of_image[:_MARKED]
            corners = torch.tensor([_show([x * factor for x in mark.corners]) for mark in shown])
            texts = [printable(mark.text, 60) for mark in shown]
            drawn.append(draw_detections(image, corners, torch.arange(1, len(texts) + 1), class_names=texts))
        if drawn:
            sheet = tile(drawn, columns=3)
            replace_file(out / f"{part}.png", lambda file, sheet=sheet: sheet.save(file, format="PNG"))  # type: ignore[misc]


def _show(corners: Sequence[float]) -> list[float]:
    """Corners in order, at least some pixels apart, so that what has no area can be seen."""
    x1, x2 = sorted(corners[0::2])
    y1, y2 = sorted(corners[1::2])
    return [x1 - 2, y1 - 2, x2 + 2, y2 + 2]


def _describe(
    findings: Mapping[str, Sequence[Finding]], classes: Mapping[str, Any], used: Plan, found: Plan
) -> list[str]:
    # The others are a finding.
    names = {name: printable(name, 30) for name, row in classes.items() if row["boxes"]}
    width = max([5, *map(len, names.values())])
    lines = [f"{'class':<{width}}   boxes    side    IoU .5      .7   found .5      .7"]
    for name, shown in names.items():
        row = classes[name]
        shares = [row[key] for key in ("reached_0.5", "reached_0.7", "found_reached_0.5", "found_reached_0.7")]
        cells = [f"{share:.1%}" for share in shares]
        lines.append(
            f"{shown:<{width}}{row['boxes']:>8}{row['side']:>8.0f}"
            f"{cells[0]:>10}{cells[1]:>8}{cells[2]:>11}{cells[3]:>8}"
        )
    lines += [f"{found.reasons[0]}", f"used: {used.reasons[1]}", f"found: {found.reasons[1]}"]
    anchors = found.architecture["anchors"]
    sizes = ",".join(f"{size:g}" for level in anchors["sizes"] for size in level)
    ratios = ",".join(f"{ratio:g}" for ratio in anchors["aspect_ratios"][0])
    lines.append(f"options for the found anchors: --anchor-sizes {sizes} --aspect-ratios {ratios}")
    for part, of_part in findings.items():
        for kind, of_kind in group(of_part).items():
            lines.append(f"{'error' if kind.is_error else 'note'}, {part}: {summarize(kind, of_kind, _PRINTED)}")
    if not any(findings.values()):
        lines.append("nothing is wrong")
    return lines
