"""Drawn shapes: the same everywhere, boxed exactly, distinct in their form, visible on their background."""

import numpy as np
import pytest
import torch

from fastdet.data import Shapes, shapes


def test_shapes_item_format() -> None:
    data = Shapes(4, size=64)
    for image, target in (data[k] for k in range(4)):
        assert image.shape == (3, 64, 64)
        assert image.dtype == torch.uint8
        assert image.max() - image.min() > 50
        count = len(target["labels"])
        assert 1 <= count <= 4
        assert target["boxes"].shape == (count, 4)
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].dtype == torch.int64
        assert target["ignore"].tolist() == [False] * count


def test_shapes_depend_on_seed_and_index_alone() -> None:
    data = Shapes(10)
    seventh = data[7]
    again = Shapes(500, seed=0)[7]
    assert torch.equal(seventh[0], again[0])
    assert torch.equal(seventh[1]["boxes"], again[1]["boxes"])
    assert torch.equal(data[-3][0], seventh[0])
    pictures = [Shapes(10, seed=seed)[k][0] for seed in (0, 1, 7) for k in (0, 1, 7)]
    for k, picture in enumerate(pictures):
        assert not any(torch.equal(picture, other) for other in pictures[:k])
    with pytest.raises(IndexError):
        data[10]


def test_shapes_boxes_are_the_extent_of_the_masks() -> None:
    data = Shapes(60)
    for k in range(60):
        drawing = data.draw(k)
        for mask, box in zip(drawing.masks, drawing.boxes, strict=True):
            rows, columns = np.nonzero(mask)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == extent


def test_shapes_masks_are_the_pixels_that_are_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    def mark(rng: np.random.Generator, area: np.ndarray, coverage: np.ndarray) -> None:
        area[:, coverage > 0] = 9

    monkeypatch.setattr(shapes, "_paint", mark)
    monkeypatch.setattr(shapes, "_draw_background", lambda rng, size: np.zeros((3, size, size), dtype=np.float32))
    data = Shapes(20)
    for k in range(20):
        drawing = data.draw(k)
        assert (drawing.masks.any(axis=0) == (drawing.picture[0] == 1)).all()
        assert drawing.masks.sum(axis=0).max() == 1


def test_shapes_stand_out() -> None:
    """Inside a mask the color is nearly one, and unlike the background just around the box."""
    data = Shapes(80, max_shapes=1)
    gaps = []
    for k in range(80):
        drawing = data.draw(k)
        mask = drawing.masks[0]
        inner = mask & np.roll(mask, 2, 0) & np.roll(mask, -2, 0) & np.roll(mask, 2, 1) & np.roll(mask, -2, 1)
        assert drawing.picture[:, inner].std(axis=1).max() < 0.08
        x1, y1, x2, y2 = drawing.boxes[0].astype(int)
        ring = np.zeros_like(mask)
        ring[max(y1 - 3, 0) : y2 + 3, max(x1 - 3, 0) : x2 + 3] = True
        ring[y1:y2, x1:x2] = False
        gap = drawing.picture[:, inner].mean(axis=1) - drawing.picture[:, ring].mean(axis=1)
        gaps.append(np.linalg.norm(gap))
    assert min(gaps) > 0.2


def test_shapes_fill_their_boxes_as_their_class_does() -> None:
    """The share of its box that a mask fills separates the classes, at any angle."""
    data = Shapes(300, size=256, max_shapes=1)
    fill: dict[str, list[float]] = {name: [] for name in data.class_names}
    for k in range(300):
        drawing = data.draw(k)
        x1, y1, x2, y2 = drawing.boxes[0]
        fill[data.class_names[drawing.labels[0] - 1]].append(drawing.masks[0].sum() / ((x2 - x1) * (y2 - y1)))
    # Circle pi / 4; a square from a half (on its corner) to one; a triangle up to a half; a pentagram about a third.
    expected = {"circle": (0.74, 0.83), "square": (0.49, 1.0), "triangle": (0.4, 0.56), "star": (0.3, 0.42)}
    for name, (least, most) in expected.items():
        assert len(fill[name]) > 40
        assert least < min(fill[name])
        assert max(fill[name]) <= most


def test_shapes_sizes_and_overlap() -> None:
    data = Shapes(150, max_shapes=6)
    counts = set()
    for k in range(150):
        boxes = data[k][1]["boxes"].double()
        counts.add(len(boxes))
        sides = boxes[:, 2:] - boxes[:, :2]
        assert boxes.min() >= 0
        assert boxes.max() <= 128
        assert sides.max(dim=1).values.min() >= 0.16 * 128 * 0.7
        assert sides.max() <= 0.45 * 128 + 2
        inter = (
            torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
        ).clamp(0)
        areas = sides.prod(dim=1)
        iou = inter.prod(dim=2) / (areas[:, None] + areas - inter.prod(dim=2))
        assert iou.fill_diagonal_(0).max() <= 0.1
    assert counts == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("wrong", [{"length": -1}, {"size": 8}, {"seed": -1}, {"max_shapes": 0}])
def test_shapes_arguments(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Shapes(**{"length": 1, **wrong})
