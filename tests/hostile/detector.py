"""Calls of a small detector, drawn at random: valid ones, and ones in which an image or a target is hostile.

A call either raises ValueError naming the image or the target, or gives finite losses, or detections that hold what
`FasterRCNN.forward` promises.
"""

import functools
import re
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastdet import FasterRCNN
from tests.hostile.operations import Draw, boxes, make_hostile, numbers

CLASSES = 4
NAMED = re.compile(r"\b(images|targets|(image|target) \d+)\b")


SMALL = {"min_size": 48, "max_size": 80, "box_representation_size": 8}


@functools.cache
def _detector(settings: tuple[tuple[str, Any], ...]) -> FasterRCNN:
    torch.manual_seed(0)
    return FasterRCNN("small", CLASSES, freeze_batchnorm=True, **{**SMALL, **dict(settings)})


SETTINGS: list[tuple[tuple[str, Any], ...]] = [
    (),
    (("rpn_anchors_inside_only", False), ("box_pooling", "align"), ("box_detections_per_img", 5)),
    (("box_score_thresh", 0.0), ("rpn_objectness", "sigmoid"), ("size_divisible", 16), ("class_weights", (1, 2, 0, 4))),
]


def _image(draw: Draw) -> Tensor:
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    pixels = numbers(draw, 3, height, width).sigmoid()
    return (pixels * 255).to(torch.uint8) if draw(st.booleans()) else pixels


def _target(draw: Draw, image: Tensor) -> dict[str, Tensor]:
    count = draw(st.integers(0, 4))
    height, width = image.shape[1:]
    corners = boxes(draw, count)
    corners[:, 2:] += 0.5
    corners *= torch.tensor([width, height, width, height]) / 41
    labels = numbers(draw, count).abs().long() % (CLASSES - 1) + 1
    return {"boxes": corners, "labels": labels, "ignore": numbers(draw, count) > 1}


def check_detector(draw: Draw) -> None:
    """Draw a call and check what it does."""
    model = _detector(draw(st.sampled_from(SETTINGS))).train(draw(st.booleans()))
    images: Any = [_image(draw) for _ in range(draw(st.integers(1, 2)))]
    targets: Any = [_target(draw, image) for image in images]
    sizes = [tuple(image.shape[1:]) for image in images]
    places = ["image", "images", "boxes", "labels", "ignore", "target", "targets"]
    for where in draw(st.lists(st.sampled_from(places), max_size=2, unique=True)):
        if where == "images":
            images = make_hostile(draw, images)
        elif where == "targets":
            targets = make_hostile(draw, targets)
        elif where == "image" and isinstance(images, list):
            images[0] = make_hostile(draw, images[0])
        elif isinstance(targets, list) and isinstance(targets[0], dict):
            if where == "target":
                targets[0] = make_hostile(draw, None)
            elif where in targets[0]:
                targets[0][where] = make_hostile(draw, targets[0][where])
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            found = model(images, targets, return_losses=True)
    except ValueError as error:
        if not NAMED.search(str(error)):
            raise
        return
    losses, detections = found
    assert all(loss.isfinite() for loss in losses.values())
    for detection, (height, width) in zip(detections, sizes, strict=True):
        corners, scores = detection["boxes"], detection["scores"]
        limit = torch.tensor([width, height, width, height])
        assert corners.isfinite().all()
        assert ((corners >= 0) & (corners <= limit + 1e-3)).all()
        assert ((scores >= 0) & (scores <= 1)).all()
        assert torch.equal(scores, scores.sort(descending=True).values)
        assert ((detection["labels"] >= 1) & (detection["labels"] < CLASSES)).all()
