"""Boxes on images: lines where the boxes are, captions inside the image."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastdet.visualize import boxes as boxes_module
from fastdet.visualize import class_color, draw_detections, tile

GRAY = 128


def gray(width: int = 200, height: int = 150) -> torch.Tensor:
    return torch.full((3, height, width), GRAY / 255)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def changed(picture: Image.Image) -> np.ndarray:
    return (pixels(picture) != GRAY).any(axis=2)


def test_a_box_is_drawn_on_its_border_pixels() -> None:
    picture = draw_detections(gray(), torch.tensor([[50.0, 60, 120, 110]]), torch.tensor([2]))
    color = class_color(2)
    array = pixels(picture)
    for x, y in ((50, 60), (119, 60), (50, 109), (119, 109), (85, 109), (119, 90)):
        assert tuple(array[y, x]) == color
    mask = changed(picture)
    assert not mask[63:107, 53:117].any()
    assert not mask[110:].any()
    assert not mask[60:, 120:].any()
    assert not mask[60:, :50].any()
    assert mask[:60].any()  # the caption, on top


def test_the_image_is_not_changed_and_its_values_stay() -> None:
    image = torch.rand(3, 20, 30)
    before = image.clone()
    picture = draw_detections(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert np.abs(pixels(picture) - 255 * image.permute(1, 2, 0).numpy()).max() <= 0.51
    original = Image.new("RGB", (30, 20), "red")
    drawn = draw_detections(original, torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([1]))
    assert original.tobytes() == Image.new("RGB", (30, 20), "red").tobytes()
    assert drawn.tobytes() != original.tobytes()
    assert torch.equal(image, before)


def test_values_outside_the_range_are_clamped() -> None:
    picture = draw_detections(torch.full((3, 8, 8), 1.5), torch.zeros(0, 4), torch.zeros(0))
    assert (pixels(picture) == 255).all()


def captions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[float, float, float, float], str]]:
    """Record the places and texts of the captions that are drawn."""
    drawn_captions: list[tuple[tuple[float, float, float, float], str]] = []
    original = boxes_module._draw_caption

    def record(draw, box, text, *rest):  # type: ignore[no-untyped-def]
        place = original(draw, box, text, *rest)
        drawn_captions.append((place, text))
        return place

    monkeypatch.setattr(boxes_module, "_draw_caption", record)
    return drawn_captions


@pytest.mark.parametrize("size", [(200, 150), (60, 40), (900, 500)])
def test_captions_stay_inside(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    drawn_captions = captions(monkeypatch)
    width, height = size
    corners = [
        [0, 0, 20, 20],
        [width - 9, 0, width, 9],
        [0, height - 9, 9, height],
        [width - 9, height - 9, width, height],
    ]
    boxes = torch.tensor([*corners, [-50, -50, width + 50, height + 50]], dtype=torch.float32)
    draw_detections(torch.zeros(3, height, width), boxes, torch.ones(5, dtype=torch.int64), torch.rand(5), ["elephant"])
    assert len(drawn_captions) == 5
    for (x1, y1, x2, y2), _ in drawn_captions:
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height


def test_a_caption_too_long_for_the_picture_is_cut() -> None:
    box = torch.tensor([[5.0, 20, 30, 38]])
    long, longer = (
        pixels(draw_detections(gray(60, 40), box, torch.tensor([1]), None, [name])) for name in ("x" * 99, "x" * 999)
    )
    assert (long == longer).all()


def test_captions_do_not_cover_each_other_where_there_is_space(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_captions = captions(monkeypatch)
    boxes = torch.tensor([[50.0, 60, 120, 110], [52, 61, 122, 112], [48, 59, 118, 108]])
    draw_detections(gray(), boxes, torch.tensor([1, 2, 3]), torch.tensor([0.5, 0.9, 0.7]))
    places = [place for place, _ in drawn_captions]
    for k, a in enumerate(places):
        for b in places[:k]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]


def test_the_text_of_captions_and_the_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_captions = captions(monkeypatch)
    boxes = torch.tensor([[50.0, 60, 120, 110]]).repeat(4, 1)
    draw_detections(gray(), boxes, torch.tensor([1, 2, 3, 0]), torch.tensor([0.25, 0.99, 0.5, 0.1]), ["cat", "dog"])
    assert [text for _, text in drawn_captions] == ["dog 99%", "3 50%", "cat 25%", "0 10%"]
    drawn_captions.clear()
    draw_detections(gray(), boxes[:1], torch.tensor([2]), class_names=["cat", "dog"])
    assert [text for _, text in drawn_captions] == ["dog"]


def test_the_highest_score_lies_on_top() -> None:
    boxes = torch.tensor([[50.0, 60, 120, 110]]).repeat(2, 1)
    for scores in ([0.9, 0.1], [0.1, 0.9]):
        array = pixels(draw_detections(gray(), boxes, torch.tensor([1, 2]), torch.tensor(scores)))
        assert tuple(array[109, 85]) == class_color(1 if scores[0] > scores[1] else 2)


def test_boxes_are_cut_at_the_border() -> None:
    array = pixels(draw_detections(gray(), torch.tensor([[-40.0, -30, 260, 190]]), torch.tensor([1])))
    for x, y in ((0, 100), (199, 100), (100, 149), (150, 0)):
        assert tuple(array[y, x]) == class_color(1)


def test_boxes_that_cannot_be_drawn_are_left_out() -> None:
    nan, inf = float("nan"), float("inf")
    bad = [[nan, 0, 9, 9], [0, 0, inf, 9], [9, 9, 3, 3], [5, 5, 5, 5], [200, 0, 300, 50], [0, -9, 9, 0]]
    picture = draw_detections(gray(), torch.tensor(bad, dtype=torch.float32), torch.arange(6))
    assert not changed(picture).any()


def test_lines_grow_with_the_image() -> None:
    def line(side: int) -> int:
        box = torch.tensor([[side * 0.25, side * 0.5, side * 0.75, side * 0.75]])
        return int(changed(draw_detections(gray(side, side), box, torch.tensor([1])))[side * 5 // 8, : side // 2].sum())

    assert line(100) == 1
    assert line(1600) == 5


def test_wrong_inputs() -> None:
    with pytest.raises(ValueError, match="2 boxes but 1 labels"):
        draw_detections(gray(), torch.zeros(2, 4), torch.zeros(1))
    with pytest.raises(ValueError, match="2 labels, 3 scores"):
        draw_detections(gray(), torch.zeros(2, 4), torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        draw_detections(torch.zeros(1, 3, 8, 8), torch.zeros(0, 4), torch.zeros(0))


def test_colors_of_twenty_classes_differ() -> None:
    colors = np.array([class_color(label) for label in range(1, 21)])
    gaps = np.linalg.norm(colors[:, None] - colors, axis=2) + 1e3 * np.eye(20)
    assert gaps.min() > 25
    assert np.linalg.norm(colors[:6, None] - colors[:6], axis=2)[~np.eye(6, dtype=bool)].min() > 80


def test_tile() -> None:
    pictures = [
        Image.new("RGB", size, color) for size, color in (((20, 10), "red"), ((8, 8), "lime"), ((20, 10), "blue"))
    ]
    sheet = tile(pictures, 2)
    assert sheet.size == (2 * 20 + 3 * 2, 2 * 10 + 3 * 2)
    assert sheet.getpixel((0, 0)) == (255, 255, 255)
    assert sheet.getpixel((2, 2)) == (255, 0, 0)
    assert sheet.getpixel((24 + 10, 2 + 5)) == (0, 255, 0)
    assert sheet.getpixel((24, 2)) == (255, 255, 255)
    assert sheet.getpixel((2, 14)) == (0, 0, 255)
    assert tile(pictures[:1], 5).width == 24
    with pytest.raises(ValueError, match="0 and 2"):
        tile([], 2)
    with pytest.raises(ValueError, match="0"):
        tile(pictures, 0)


def test_bytes_are_drawn_as_they_are() -> None:
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    picture = draw_detections(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert (pixels(picture) == image.permute(1, 2, 0).numpy()).all()
