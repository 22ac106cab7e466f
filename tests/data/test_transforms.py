"""Items that data sets of other people give."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from fastdet.data.transforms import make_item

IMAGE = torch.zeros(3, 4, 5, dtype=torch.uint8)
BOXES, LABELS = torch.tensor([[0, 0, 2, 2]]), torch.tensor([1])


def test_boxes_of_any_format_and_dtype():
    boxes = tv_tensors.BoundingBoxes([[1, 1, 2, 2]], format="XYWH", canvas_size=(4, 5))
    image, target = make_item(IMAGE, {"boxes": boxes, "labels": LABELS.int(), "area": 4})
    assert target["boxes"].tolist() == [[1, 1, 3, 3]]
    assert (target["boxes"].dtype, target["boxes"].canvas_size) == (torch.float32, (4, 5))
    assert target["ignore"].tolist() == [False]
    assert set(target) == {"boxes", "labels", "ignore"}
    assert isinstance(image, tv_tensors.Image)


@pytest.mark.parametrize(
    ("image", "target", "message"),
    [
        (np.zeros((4, 5, 3)), {"boxes": BOXES, "labels": LABELS}, r"image must be .* \[3, H, W\], got numpy\.ndarray"),
        (IMAGE[0], {"boxes": BOXES, "labels": LABELS}, r"image must be .*, got torch\.uint8 \[4, 5\]"),
        (IMAGE.long(), {"boxes": BOXES, "labels": LABELS}, r"image must be .*, got torch\.int64 \[3, 4, 5\]"),
        (IMAGE, [BOXES, LABELS], "target must be a dict with boxes and labels, got list"),
        (IMAGE, {"bbox": BOXES, "labels": LABELS}, "with boxes and labels, got one with bbox, labels"),
        (IMAGE, {"boxes": BOXES.numpy(), "labels": LABELS}, r"boxes must be .* \[N, 4\], got numpy\.ndarray"),
        (IMAGE, {"boxes": [[0, 0, 2, 2]], "labels": LABELS}, r"boxes must be .* \[N, 4\], got builtins\.list"),
        (IMAGE, {"boxes": torch.tensor([]), "labels": LABELS}, r"boxes must be .*, got torch\.float32 \[0\]"),
        (IMAGE, {"boxes": BOXES[0], "labels": LABELS}, r"boxes must be .*, got torch\.int64 \[4\]"),
        (
            IMAGE,
            {"boxes": BOXES, "labels": [1]},
            r"labels must be a tensor of whole numbers \[1\].*, got builtins\.list",
        ),
        (IMAGE, {"boxes": BOXES, "labels": LABELS.float()}, r"labels must be .*, got torch\.float32 \[1\]"),
        (IMAGE, {"boxes": BOXES, "labels": LABELS.repeat(2)}, r"labels must be .* \[1\].*, got torch\.int64 \[2\]"),
        (
            IMAGE,
            {"boxes": BOXES, "labels": LABELS, "ignore": LABELS},
            r"ignore must be .* bool \[1\].*torch\.int64 \[1\]",
        ),
    ],
)
def test_items_that_are_wrong_are_named(image, target, message):
    with pytest.raises(ValueError, match=f"an item's .*{message}"):
        make_item(image, target)
