"""Boxes and their captions on images, and images side by side."""

from __future__ import annotations

import bisect
import colorsys
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_Box = tuple[float, float, float, float]
_Color = tuple[int, int, int]


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
        image: [3, H, W], uint8 or floating point in 0..1, on any device; or a Pillow image.
        boxes: [N, 4] x1, y1, x2, y2 in pixels.
        labels: int [N]; each label has its own color.
        scores: [N], written in percent after the name.
        class_names: label k is written as `class_names[k - 1]`; as the number itself without, or when out of range.

    Raises:
        ValueError: the image is not [3, H, W], or lengths differ.
    """
    canvas, names, count = _to_pil(image), class_names or (), len(boxes)
    corners, label_list, score_list = boxes.tolist(), labels.tolist(), None if scores is None else scores.tolist()
    if len(labels) != count or (scores is not None and len(scores) != count):
        lengths = f"{len(labels)} labels" + ("" if scores is None else f", {len(scores)} scores")
        raise ValueError(f"{count} boxes but {lengths}: there must be one of each a box")
    order = torch.arange(count) if scores is None else torch.argsort(scores.detach().cpu(), stable=True)
    draw = ImageDraw.Draw(canvas)
    draw.font = ImageFont.load_default(max(9, round(max(canvas.size) / 45)))
    captions: list[tuple[_Box, str, _Color]] = []
    for k in order.tolist():
        box, label = _clip_to_pixels(corners[k], canvas.size), int(label_list[k])
        if box is not None:
            color = class_color(label)
            draw.rectangle(box, outline=color, width=max(1, round(max(canvas.size) / 320)))
            name = names[label - 1] if 1 <= label <= len(names) else str(label)
            captions.append((box, name if score_list is None else f"{name} {score_list[k]:.0%}", color))
    # Captions last and the best first: no line crosses them, and the best get the best places.
    occupied: list[_Box] = []
    for box, text, color in reversed(captions):
        occupied.append(_draw_caption(draw, box, text, color, canvas.size, occupied))
    return canvas


def class_color(label: int) -> _Color:
    """A saturated RGB color for a label; consecutive labels get distant hues."""
    # Steps by the golden ratio spread any number of hues evenly; three brightnesses separate similar ones.
    hue = (0.98 + label * 0.6180339887) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.82, (1.0, 0.88, 0.76)[label // 8 % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def tile(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay images out in rows on white, each centered in a cell as large as the largest.

    Raises:
        ValueError: there are no images, or `columns` is below 1.
    """
    if not images or columns < 1:
        raise ValueError(f"tile needs an image and a column, not {len(images)} and {columns}")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    gap = max(2, round(max(width, height) / 64))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        left = gap + column * (width + gap) + (width - image.width) // 2
        top = gap + row * (height + gap) + (height - image.height) // 2
        sheet.paste(image.convert("RGB"), (left, top))
    return sheet


def _to_pil(image: torch.Tensor | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB").copy()
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"the image must be [3, H, W], not {list(image.shape)}")
    pixels = image.detach().as_subclass(torch.Tensor)
    if pixels.dtype != torch.uint8:
        pixels = pixels.float().nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.cpu().permute(1, 2, 0).numpy()))


def _clip_to_pixels(box: Sequence[float], size: tuple[int, int]) -> _Box | None:
    """The box cut to the image, as the first and last pixel on each axis; None if nothing of it is inside."""
    x1, y1, x2, y2 = box
    width, height = size
    if not all(map(math.isfinite, box)) or x2 <= max(x1, 0) or y2 <= max(y1, 0) or x1 >= width or y1 >= height:
        return None
    left, top = min(max(round(x1), 0), width - 1), min(max(round(y1), 0), height - 1)
    return left, top, max(left, min(round(x2), width) - 1), max(top, min(round(y2), height) - 1)


def _draw_caption(
    draw: ImageDraw.ImageDraw, box: _Box, text: str, color: _Color, size: tuple[int, int], occupied: Sequence[_Box]
) -> _Box:
    """Write a box's caption inside the image, off the earlier captions where it can; returns its place."""
    pad = max(1, round(getattr(draw.font, "size", 10) / 6))
    fits = bisect.bisect_right(
        range(1, len(text) + 1), int(size[0] - 2 * pad), key=lambda n: math.ceil(draw.textlength(text[:n]))
    )
    text = text[: max(fits, 1)]
    # One height for all captions, with or without letters that hang below the line.
    _, top, _, bottom = draw.textbbox((0, 0), "Ag|")
    places = _caption_places(box, math.ceil(draw.textlength(text)) + 2 * pad, bottom - top + 2 * pad, size)
    place = next((place for place in places if not any(_overlap(place, other) for other in occupied)), places[0])
    draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
    red, green, blue = color
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
    draw.text((place[0] + pad, place[1] + pad - top), text, fill=ink)
    return place


def _caption_places(box: _Box, width: float, height: float, size: tuple[int, int]) -> list[_Box]:
    """Places for a caption, best first: on the box, in it, under it; then the same at its right end."""
    x1, y1, x2, y2 = box
    rows = (y1 - height, y1, y2 + 1, y2 + 1 - height) if y1 >= height else (y1, y2 + 1, y2 + 1 - height)
    columns = [max(0, min(x, size[0] - width)) for x in (x1, x2 + 1 - width)]
    return [(x, y, x + width, y + height) for x in columns for y in (max(0, min(y, size[1] - height)) for y in rows)]


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
