"""Pictures of shapes, drawn on the fly: a detection dataset with nothing to download."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from fastdet.data.transforms import Item, make_item

_SMALLEST, _LARGEST = 0.16, 0.45  # diameter of the circle around a shape, as a share of the picture's side
_SUPERSAMPLING = 3
_PLACEMENT_TRIES = 20
_MAX_COVER = 0.1  # intersection over the smaller of two boxes: unlike IoU, it counts a small shape in a large one
_MIN_CONTRAST = 0.35  # distance in RGB between a shape and the mean of what it is drawn on
_SIDES = {"square": 4, "triangle": 3, "star": 5}

Box = tuple[int, int, int, int]


class Drawing(NamedTuple):
    """A generated picture and what is in it."""

    picture: np.ndarray  # float32 [3, size, size] in 0..1
    masks: np.ndarray  # bool [N, size, size], the pixels of each shape that no later shape covers
    boxes: np.ndarray  # float32 [N, 4], the extent of each mask
    labels: np.ndarray  # int64 [N], from 1


class Shapes(Dataset[Item]):
    """Circles, squares, triangles and stars on textured backgrounds.

    Item i depends on `seed`, `size`, `max_shapes` and i alone: it is the same in every run and every loader's worker,
    and for every `length`. Different seeds give different pictures, so a held-out set is another seed.

    An item is as `fastdet.data.VOC` gives it: an Image uint8 [3, size, size]; target "boxes" BoundingBoxes float32
    [N, 4] x1, y1, x2, y2 in pixels, the exact extent of the visible pixels of each shape, "labels" int64 [N] from 1,
    "ignore" bool [N], all False. There are 1 to `max_shapes` shapes, 16 to 45 % of the side across; two boxes share
    at most a tenth of the smaller one.

    Args:
        length: how many items.
        size: side of the pictures in pixels, at least 32.
        seed: not negative.
        max_shapes: the most shapes in a picture, at least 1; fewer where there is no space.

    Raises:
        ValueError: an argument is out of its range.
    """

    class_names: tuple[str, ...] = ("circle", "square", "triangle", "star")

    def __init__(self, length: int, *, size: int = 128, seed: int = 0, max_shapes: int = 4) -> None:
        minimum = {"length": (length, 0), "size": (size, 32), "seed": (seed, 0), "max_shapes": (max_shapes, 1)}
        for name, (value, least) in minimum.items():
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.length, self.size, self.seed, self.max_shapes = length, size, seed, max_shapes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Item:
        drawing = self.draw(index)
        picture = torch.from_numpy((drawing.picture * 255).round().astype(np.uint8))
        return make_item(
            picture, {"boxes": torch.from_numpy(drawing.boxes), "labels": torch.from_numpy(drawing.labels)}
        )

    @property
    def ids(self) -> tuple[str, ...]:
        """The names of the items."""
        return tuple(f"shapes_{self.seed}_{index}" for index in range(self.length))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the pictures."""
        return [(self.size, self.size)] * self.length

    def image_path(self, index: int) -> None:
        """None: the pictures are in no files."""

    def target(self, index: int) -> dict[str, np.ndarray]:
        """The target of item `index` as arrays."""
        drawing = self.draw(index)
        ignore = np.zeros(len(drawing.labels), dtype=np.bool_)
        return {"boxes": drawing.boxes, "labels": drawing.labels, "ignore": ignore}

    def draw(self, index: int) -> Drawing:
        """Item `index` with the mask of each shape.

        Raises:
            IndexError: `index` is not in -length..length - 1.
        """
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} items")
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(index % self.length,)))
        count = int(rng.integers(1, self.max_shapes + 1))
        picture = _draw_background(rng, self.size)
        shape_of_pixel = np.full((self.size, self.size), -1, dtype=np.int64)
        boxes: list[Box] = []
        labels: list[int] = []
        for _ in range(count):
            label = int(rng.integers(1, len(self.class_names) + 1))
            coverage = _draw_coverage(rng, self.class_names[label - 1], self.size)
            box = _find_place(rng, coverage.shape, self.size, boxes)
            if box is not None:
                left, top, right, bottom = box
                _paint(rng, picture[:, top:bottom, left:right], coverage)
                shape_of_pixel[top:bottom, left:right][coverage > 0] = len(boxes)
                boxes.append(box)
                labels.append(label)
        # A last grain over everything, so that a shape is no flatter than what it lies on.
        picture += rng.normal(0, 0.02, picture.shape).astype(np.float32)
        np.clip(picture, 0, 1, out=picture)
        masks = shape_of_pixel == np.arange(len(boxes))[:, None, None]
        return Drawing(picture, masks, _find_extents(masks), np.array(labels, dtype=np.int64))


def _find_extents(masks: np.ndarray) -> np.ndarray:
    """The tight box [N, 4] of each mask [N, H, W], which must not be empty."""
    columns, rows = masks.max(axis=1), masks.max(axis=2)
    x1, y1 = columns.argmax(axis=1), rows.argmax(axis=1)
    x2 = columns.shape[1] - columns[:, ::-1].argmax(axis=1)
    y2 = rows.shape[1] - rows[:, ::-1].argmax(axis=1)
    return np.stack((x1, y1, x2, y2), axis=1).astype(np.float32)


def _draw_coverage(rng: np.random.Generator, name: str, size: int) -> np.ndarray:
    """How much of each pixel a randomly sized and turned shape covers, cropped to the shape: float32 [h, w] in 0..1."""
    radius = 0.5 * size * rng.uniform(_SMALLEST, _LARGEST)
    angle = rng.uniform(0, 2 * math.pi)
    offset = rng.uniform(0, 1, 2)
    side = 2 * math.ceil(radius) + 2
    axis = (np.arange(side * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING - side / 2
    x, y = (axis - (offset[0] - 0.5)).astype(np.float32), (axis - (offset[1] - 0.5)).astype(np.float32)[:, None]
    inside = _is_inside(x, y, name, radius, angle)
    samples = inside.reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING)
    coverage = samples.mean(axis=(1, 3), dtype=np.float32)
    x1, y1, x2, y2 = _find_extents(coverage[None] > 0)[0].astype(int)
    return coverage[y1:y2, x1:x2]


def _is_inside(x: np.ndarray, y: np.ndarray, name: str, radius: float, angle: float) -> np.ndarray:
    """Whether points lie in a circle, or in a regular polygon or a five-pointed star with its points at `radius`.

    A polygon is where all its sides' half-planes meet. The star is bounded by the same kind of half-planes, those of
    the pentagon at its center: the pentagon is where all five meet, and a point of the star is where four do.
    """
    if name == "circle":
        return x * x + y * y <= np.float32(radius * radius)
    sides, star = _SIDES[name], name == "star"
    apothem = np.float32(radius * math.cos((2 if star else 1) * math.pi / sides))
    met = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=np.uint8)
    for k in range(sides):
        turn = angle + 2 * math.pi * k / sides
        met += x * np.float32(math.cos(turn)) + y * np.float32(math.sin(turn)) <= apothem
    return met >= (sides - 1 if star else sides)


def _find_place(rng: np.random.Generator, shape: tuple[int, ...], size: int, boxes: list[Box]) -> Box | None:
    """A random box for a shape [h, w] that hardly covers any of `boxes`; None if no try gives one."""
    height, width = shape
    x1, y1, x2, y2 = np.array(boxes, dtype=np.int64).reshape(-1, 4).T
    smaller = np.minimum((x2 - x1) * (y2 - y1), width * height)
    for _ in range(_PLACEMENT_TRIES):
        left, top = int(rng.integers(0, size - width + 1)), int(rng.integers(0, size - height + 1))
        right, bottom = left + width, top + height
        inter_w, inter_h = np.minimum(x2, right) - np.maximum(x1, left), np.minimum(y2, bottom) - np.maximum(y1, top)
        if (inter_w.clip(min=0) * inter_h.clip(min=0) / smaller <= _MAX_COVER).all():
            return left, top, right, bottom
    return None


def _paint(rng: np.random.Generator, area: np.ndarray, coverage: np.ndarray) -> None:
    """Blend a shape of one random color, lit from one side, into `area` [3, h, w] in place."""
    ground = area.mean(axis=(1, 2))
    color = rng.uniform(0, 1, 3)
    while np.linalg.norm(color - ground) < _MIN_CONTRAST:
        color = rng.uniform(0, 1, 3)
    light = np.linspace(-0.08, 0.08, area.shape[2], dtype=np.float32) * np.float32(rng.uniform(-1, 1))
    area += coverage * (color.astype(np.float32)[:, None, None] + light - area)


def _draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A gradient between two colors with stripes and noise at several scales: float32 [3, size, size]."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    start, end = rng.uniform(0.15, 0.85, (2, 3, 1, 1)).astype(np.float32)
    picture = start + (end - start) * (0.5 + 0.35 * _make_ramp(axis, rng.uniform(0, 2 * math.pi)))
    if rng.random() < 0.5:
        cycles = rng.uniform(2, 14)
        wave = np.sin(math.pi * cycles * _make_ramp(axis, rng.uniform(0, 2 * math.pi)) + rng.uniform(0, 2 * math.pi))
        picture += rng.uniform(-0.12, 0.12, (3, 1, 1)).astype(np.float32) * wave.astype(np.float32)
    for cells in (4, 9, 20, 48):
        strength = rng.uniform(0, 0.1)
        # Mostly gray, with a tint: noise that is independent in the three channels looks like confetti.
        grid = rng.normal(0, strength, (1, cells, cells)) + rng.normal(0, 0.4 * strength, (3, cells, cells))
        picture += _stretch(_stretch(grid.astype(np.float32), size).swapaxes(1, 2), size).swapaxes(1, 2)
    return picture


def _make_ramp(axis: np.ndarray, angle: float) -> np.ndarray:
    return np.float32(math.cos(angle)) * axis + np.float32(math.sin(angle)) * axis[:, None]


def _stretch(grid: np.ndarray, size: int) -> np.ndarray:
    """Interpolate the last axis linearly to `size` values."""
    # By indices and not by a matrix: NumPy would run the small product on all cores, which costs more than it saves.
    position = np.linspace(0, grid.shape[-1] - 1, size, dtype=np.float32)
    left = np.minimum(position.astype(np.intp), grid.shape[-1] - 2)
    share = position - left.astype(np.float32)
    return grid[..., left] * (1 - share) + grid[..., left + 1] * share
