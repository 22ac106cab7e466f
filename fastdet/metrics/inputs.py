"""What both metrics ask of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

Arrays = Mapping[str, Any]  # tensors on any device, or NumPy arrays


class Detected(NamedTuple):
    boxes: np.ndarray  # float64 [D, 4]
    scores: np.ndarray  # float64 [D]
    labels: np.ndarray  # int64 [D]


class Truth(NamedTuple):
    boxes: np.ndarray  # float64 [G, 4]
    labels: np.ndarray  # int64 [G]
    ignore: np.ndarray  # bool [G]


def to_numpy(
    predictions: Sequence[Arrays], targets: Sequence[Arrays], num_classes: int
) -> tuple[list[Detected], list[Truth]]:
    """Bring predictions and targets to NumPy, checked; boxes that are not finite become empty ones at the origin.

    An empty box overlaps nothing, so such a prediction counts as false and such a ground truth as missed.

    Raises:
        ValueError: lengths differ, or a label is not in 1..num_classes - 1.
    """
    if len(predictions) != len(targets):
        raise ValueError(
            f"{len(predictions)} predictions but {len(targets)} targets: there must be one of each an image"
        )
    detected, truths = [], []
    for image, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        boxes, labels = _boxes_and_labels(prediction, num_classes, f"predictions[{image}]")
        scores = _array(prediction["scores"], np.float64)
        _check_length(scores, len(boxes), f"predictions[{image}]['scores']")
        detected.append(Detected(boxes, scores, labels))

        boxes, labels = _boxes_and_labels(target, num_classes, f"targets[{image}]")
        ignore = target.get("ignore")
        flags = np.zeros(len(boxes), dtype=np.bool_) if ignore is None else _array(ignore, np.bool_)
        _check_length(flags, len(boxes), f"targets[{image}]['ignore']")
        truths.append(Truth(boxes, labels, flags))
    return detected, truths


def _boxes_and_labels(arrays: Arrays, num_classes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    boxes, labels = _array(arrays["boxes"], np.float64), _array(arrays["labels"], np.int64)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{where}['boxes'] must be [N, 4], not {list(boxes.shape)}")
    _check_length(labels, len(boxes), f"{where}['labels']")
    if len(labels) and not 1 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"{where}['labels'] has {labels.min()}..{labels.max()}, but labels are 1..{num_classes - 1}")
    return np.where(np.isfinite(boxes).all(axis=1, keepdims=True), boxes, 0.0), labels


def _array(values: Any, dtype: type) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64 if values.is_floating_point() else values.dtype).numpy()
    return np.asarray(values, dtype=dtype)


def _check_length(values: np.ndarray, length: int, where: str) -> None:
    if values.shape != (length,):
        raise ValueError(f"{where} must be [{length}], as there are {length} boxes, not {list(values.shape)}")
