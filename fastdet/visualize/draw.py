"""Pictures for people: boxes on images, images side by side, the course of the losses."""

from __future__ import annotations

import colorsys
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_Box = tuple[float, float, float, float]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_LOSSES = {
    "loss": "total",
    "loss_classifier": "box classes",
    "loss_box_reg": "box locations",
    "loss_objectness": "proposal scores",
    "loss_rpn_box_reg": "proposal locations",
}


def draw_detections(
    image: torch.Tensor | Image.Image,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    scores: torch.Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> Image.Image:
    """Draw boxes with their names and scores on a copy of an image.

    Lines and letters grow with the image. Boxes are cut at its border; those that are outside or not finite are left
    out. Where boxes have scores, the highest lie on top.

    Args:
        image: float [3, H, W] in 0..1 on any device, or a Pillow image.
        boxes: [N, 4] x1, y1, x2, y2 in pixels.
        labels: int [N]; each label has its own colour.
        scores: [N], written in percent after the name.
        class_names: label k is written as `class_names[k - 1]`; as the number itself without, or when out of range.

    Raises:
        ValueError: the image is not [3, H, W], or lengths differ.
    """
    picture = _to_picture(image)
    corners, numbers = boxes.tolist(), labels.tolist()
    count = len(boxes)
    if len(labels) != count or (scores is not None and len(scores) != count):
        found = f"{len(labels)} labels" + ("" if scores is None else f", {len(scores)} scores")
        raise ValueError(f"{count} boxes but {found}: there must be one of each a box")
    order = torch.arange(count) if scores is None else torch.argsort(scores.detach().cpu(), stable=True)
    font = ImageFont.load_default(_font_size(picture))
    draw = ImageDraw.Draw(picture)
    line = max(1, round(max(picture.size) / 320))
    captions: list[tuple[_Box, str, tuple[int, int, int]]] = []
    for k in order.tolist():
        box = _visible(corners[k], picture.size)
        if box is None:
            continue
        label = int(numbers[k])
        colour = class_colour(label)
        draw.rectangle(box, outline=colour, width=line)
        captions.append((box, _caption(label, None if scores is None else float(scores[k]), class_names), colour))
    # Captions last and the best first: no line crosses them, and the best take the best places.
    taken: list[_Box] = []
    for box, text, colour in reversed(captions):
        taken.append(_draw_caption(draw, font, box, text, colour, picture.size, taken))
    return picture


def class_colour(label: int) -> tuple[int, int, int]:
    """A saturated RGB colour for a label; near labels get far hues."""
    # Steps by the golden ratio spread any number of hues evenly; three brightnesses tell near ones apart.
    hue = (0.98 + label * 0.6180339887) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.82, (1.0, 0.88, 0.76)[label // 8 % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def tile(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay pictures out in rows on white, each centred in a cell as large as the largest.

    Raises:
        ValueError: there are no pictures, or `columns` is below 1.
    """
    if not pictures or columns < 1:
        raise ValueError(f"tile needs a picture and a column, not {len(pictures)} and {columns}")
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    gap = max(2, round(max(width, height) / 64))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for k, picture in enumerate(pictures):
        row, column = divmod(k, columns)
        left = gap + column * (width + gap) + (width - picture.width) // 2
        top = gap + row * (height + gap) + (height - picture.height) // 2
        sheet.paste(picture.convert("RGB"), (left, top))
    return sheet


def plot_losses(csv_path: str | Path, png_path: str | Path) -> None:
    """Draw the losses in a trainer's metrics file against the step: the total, and its four parts.

    Faint lines are the file's values, strong ones their running mean. Where a step comes twice, as after a resumed
    run, the later row counts; a last row that was cut short is left out.

    Args:
        csv_path: a CSV file with the columns step, loss, loss_classifier, loss_box_reg, loss_objectness and
            loss_rpn_box_reg; others are not looked at.
        png_path: the picture to write.

    Raises:
        ValueError: a column is missing, a value is not a number, or there is no row.
    """
    from matplotlib.figure import Figure

    steps, losses = _read_losses(Path(csv_path))
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    whole, parts = figure.subplots(1, 2, sharex=True)
    colours = ("#222222", "#d1495b", "#2e86ab", "#edae49", "#3b8a5a")
    for (column, name), colour in zip(_LOSSES.items(), colours, strict=True):
        axes = whole if column == "loss" else parts
        axes.plot(steps, losses[column], color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(steps, _smooth(losses[column]), color=colour, linewidth=1.8, label=name)
    for axes, title in ((whole, "Total loss"), (parts, "Its four parts")):
        _finish(axes, title)
    parts.legend(frameon=False)
    figure.savefig(png_path)


def _to_picture(image: torch.Tensor | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB").copy()
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"the image must be [3, H, W], not {list(image.shape)}")
    pixels = image.detach().float().nan_to_num().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def _font_size(picture: Image.Image) -> int:
    return max(9, round(max(picture.size) / 45))


def _visible(box: Sequence[float], size: tuple[int, int]) -> _Box | None:
    """The box cut to the picture, as the first and last pixel on each axis; None if nothing of it is inside."""
    x1, y1, x2, y2 = box
    width, height = size
    if not all(map(math.isfinite, box)) or x2 <= max(x1, 0) or y2 <= max(y1, 0) or x1 >= width or y1 >= height:
        return None
    left, top = max(round(x1), 0), max(round(y1), 0)
    left, top = min(left, width - 1), min(top, height - 1)
    return left, top, max(left, min(round(x2), width) - 1), max(top, min(round(y2), height) - 1)


def _caption(label: int, score: float | None, class_names: Sequence[str] | None) -> str:
    known = class_names is not None and 1 <= label <= len(class_names)
    name = class_names[label - 1] if class_names is not None and known else str(label)
    return name if score is None else f"{name} {score:.0%}"


def _draw_caption(
    draw: ImageDraw.ImageDraw,
    font: _Font,
    box: _Box,
    text: str,
    colour: tuple[int, int, int],
    size: tuple[int, int],
    taken: Sequence[_Box],
) -> _Box:
    """Write a box's caption inside the picture, off the earlier captions where it can; returns the place taken."""
    pad = max(1, round(getattr(font, "size", 10) / 6))
    while len(text) > 1 and draw.textlength(text, font) + 2 * pad > size[0]:
        text = text[:-1]
    # One height for all captions, with or without letters that hang below the line.
    top, bottom = (draw.textbbox((0, 0), "Ag|", font)[k] for k in (1, 3))
    width, height = math.ceil(draw.textlength(text, font)) + 2 * pad, bottom - top + 2 * pad
    places = [_shift_inside(place, width, height, size) for place in _caption_places(box, width, height)]
    place = next((p for p in places if not any(_overlap(p, other) for other in taken)), places[0])
    draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=colour)
    red, green, blue = colour
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
    draw.text((place[0] + pad, place[1] + pad - top), text, fill=ink, font=font)
    return place


def _caption_places(box: _Box, width: float, height: float) -> list[tuple[float, float]]:
    """Corners to put a caption at, best first: on the box, in it, under it; then the same at its right end."""
    x1, y1, x2, y2 = box
    rows = (y1 - height, y1, y2 + 1, y2 + 1 - height) if y1 >= height else (y1, y2 + 1, y2 + 1 - height)
    return [(x, y) for x in (x1, x2 + 1 - width) for y in rows]


def _shift_inside(corner: tuple[float, float], width: float, height: float, size: tuple[int, int]) -> _Box:
    x, y = max(0, min(corner[0], size[0] - width)), max(0, min(corner[1], size[1] - height))
    return x, y, x + width, y + height


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _read_losses(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in ("step", *_LOSSES) if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}")
        lines = list(reader)
    if lines and any(value is None for value in lines[-1].values()):
        lines.pop()
    rows: dict[int, list[float]] = {}
    for number, line in enumerate(lines, start=2):
        try:
            rows[int(line["step"])] = [float(line[name]) for name in _LOSSES]
        except (TypeError, ValueError):
            raise ValueError(f"{path}, row {number}: not a row of numbers") from None
    if not rows:
        raise ValueError(f"{path}: no rows yet")
    steps = sorted(rows)
    table = np.array([rows[step] for step in steps], dtype=np.float64)
    return np.array(steps), {name: table[:, k] for k, name in enumerate(_LOSSES)}


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a centred window of about a twentieth of the values, shorter at the ends; NaN is skipped."""
    half = max(1, len(values) // 40)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    place = np.arange(len(values))
    start, end = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    total = counts[end] - counts[start]
    return np.divide(sums[end] - sums[start], total, out=np.full(len(values), np.nan), where=total > 0)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
