"""`fastdet lint`: what is wrong in a data set, and which anchors reach its objects."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from fastdet.cli.data import open_training_data
from fastdet.cli.plan import Plan, plan_detector
from fastdet.cli.values import UserError
from fastdet.data import DataError, JoinedImages
from fastdet.data.convert import write_coco
from fastdet.data.lint import Finding, Mark, clean, find_shared_images, lint
from fastdet.safe_files import printable, replace_file
from fastdet.visualize import draw_detections, tile

# Images that are drawn, and descriptions of a finding that are printed.
_DRAWN, _PRINTED = 12, 3
# The longest side of an image that is drawn, in pixels.
_LARGEST_DRAWN = 800


class DataSetError(Exception):
    """A data set has lost or false ground truth."""


def run(options: argparse.Namespace) -> bool:
    """Print and write what is found in the data sets; returns whether ground truth is lost or false."""
    if options.fix and options.fix.exists():
        raise UserError(f"--fix: {options.fix} is there already, and nothing is overwritten")
    problems: list[DataError] = []
    val_problems: list[DataError] = []
    train, val = open_training_data(options, problems, val_problems)
    of_train, of_val = lint(train, problems, lambda items: tqdm(items, "images to train on")), None
    findings: dict[str, list[Finding]] = {}
    if val is not None:
        of_val = lint(val, val_problems, lambda items: tqdm(items, "images to evaluate on"))
        both = find_shared_images(train, val, of_train, of_val)
        findings["val"] = [*of_val.findings, *([both] if both.items else [])]
    used, found = _plan_both(options, train)
    unreached = _find_unreached(train, used)
    findings["train"] = [*of_train.findings, *([unreached] if unreached.items else [])]
    classes = _summarize_classes(train, used, found)
    _write(options.out, findings, classes, found, {"train": train, "val": val})
    if options.fix:
        cleaned = {"train": clean(train, of_train, of_val.digests if of_val else ())}
        if val is not None and of_val is not None:
            cleaned["val"] = clean(val, of_val)
        for part, (dataset, repeated) in cleaned.items():
            write_coco(dataset, options.fix / part, tqdm, repeated)
    print("\n".join(printable(line, 300) for line in _describe(findings, classes, used, found)))
    return any(finding.is_error for finding in chain(*findings.values()))


def _plan_both(options: argparse.Namespace, data: JoinedImages) -> tuple[Plan, Plan]:
    """The detector with the anchors that are given, or the backbone's own; and with those that fit the data."""
    is_given = options.anchor_sizes is not None or options.aspect_ratios is not None
    used = {"anchors": None if is_given else "default"}
    found = {"anchors": "auto", "anchor_sizes": None, "aspect_ratios": None}
    first, second = (
        plan_detector(argparse.Namespace(**{**vars(options), **changes}), data) for changes in (used, found)
    )
    return first, second


def _find_unreached(data: JoinedImages, plan: Plan) -> Finding:
    """The boxes that no anchor has an IoU of .5 with, the least first."""
    marks, described = list[Mark](), list[str]()
    for row in np.argsort(plan.overlaps, kind="stable").tolist():
        if plan.overlaps[row] >= 0.5:
            break
        item, corners = int(plan.objects.image[row]), plan.objects.boxes[row].tolist()
        text = f"{data.class_names[plan.objects.labels[row] - 1]}: IoU {plan.overlaps[row]:.2f} with an anchor"
        marks.append(Mark(item, tuple(corners), text))
        described.append(f"{data.ids[item]} {text} ({', '.join(f'{x:g}' for x in corners)})")
    return Finding("box(es) that no anchor reaches at IoU .5", False, described, marks)


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
            part: [{"kind": f.kind, "is_error": f.is_error, "items": f.items} for f in of_part]
            for part, of_part in findings.items()
        },
        "classes": classes,
        "anchors": found.architecture["anchors"],
        "resizing": found.reasons[0],
    }
    text = json.dumps(content, indent=2)
    replace_file(out / "lint.json", lambda file: file.write(f"{text}\n".encode()))
    for part, of_part in findings.items():
        dataset = datasets[part]
        marks: dict[int, list[Any]] = {}
        for mark in chain(*(finding.marks for finding in of_part)):
            marks.setdefault(mark.item, []).append(mark)
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
            corners = torch.tensor([_show([x * factor for x in mark.corners]) for mark in of_image])
            texts = [printable(mark.text, 60) for mark in of_image]
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
    names = {name: printable(name, 30) for name in classes}
    width = max([5, *map(len, names.values())])
    lines = [f"{'class':<{width}}   boxes    side    IoU .5      .7   found .5      .7"]
    for name, row in classes.items():
        shares = [row[key] for key in ("reached_0.5", "reached_0.7", "found_reached_0.5", "found_reached_0.7")]
        cells = ["-" if share is None else f"{share:.1%}" for share in shares]
        side = "-" if row["side"] is None else f"{row['side']:.0f}"
        lines.append(
            f"{names[name]:<{width}}{row['boxes']:>8}{side:>8}{cells[0]:>10}{cells[1]:>8}{cells[2]:>11}{cells[3]:>8}"
        )
    lines += [f"{found.reasons[0]}", f"used: {used.reasons[1]}", f"found: {found.reasons[1]}"]
    anchors = found.architecture["anchors"]
    sizes = ",".join(f"{size:g}" for level in anchors["sizes"] for size in level)
    ratios = ",".join(f"{ratio:g}" for ratio in anchors["aspect_ratios"][0])
    lines.append(f"options for the found anchors: --anchor-sizes {sizes} --aspect-ratios {ratios}")
    for part, of_part in findings.items():
        for finding in of_part:
            listed = "; ".join(finding.items[:_PRINTED]) + ("; ..." if len(finding.items) > _PRINTED else "")
            kind = "error" if finding.is_error else "note"
            lines.append(f"{kind}, {part}: {len(finding.items)} {finding.kind}: {listed}")
    if not any(findings.values()):
        lines.append("nothing is wrong")
    return lines
