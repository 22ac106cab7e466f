"""What both metrics share: the check of their inputs, and the mean over classes."""

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
    """Check predictions and targets and make NumPy arrays; boxes that are not finite become empty ones at the origin.

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
        boxes, labels = _read_boxes(prediction, num_classes, f"predictions[{image}]")
        scores = _read_column(prediction, "scores", np.float64, len(boxes), f"predictions[{image}]")
        detected.append(Detected(boxes, scores, labels))
        boxes, labels = _read_boxes(target, num_classes, f"targets[{image}]")
        if target.get("ignore") is None:
            target = {"ignore": np.zeros(len(boxes))}
        truths.append(Truth(boxes, labels, _read_column(target, "ignore", np.bool_, len(boxes), f"targets[{image}]")))
    return detected, truths


def mean_of_known(values: np.ndarray) -> float:
    """The mean of what is not NaN; NaN if all is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _read_boxes(arrays: Arrays, num_classes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and labels."""
    boxes = _to_array(arrays["boxes"], np.float64)
    if boxes.size == 0:
        boxes = boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{where}['boxes'] must be [N, 4], not {list(boxes.shape)}")
    labels = _read_column(arrays, "labels", np.int64, len(boxes), where)
    if len(labels) and not 1 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"{where}['labels'] has {labels.min()}..{labels.max()}, but labels are 1..{num_classes - 1}")
    return np.where(np.isfinite(boxes).all(axis=1, keepdims=True), boxes, 0.0), labels


def _read_column(arrays: Arrays, name: str, dtype: type, length: int, where: str) -> np.ndarray:
    values = _to_array(arrays[name], dtype)
    if values.shape != (length,):
        raise ValueError(f"{where}['{name}'] must be [{length}], as there are {length} boxes, not {list(values.shape)}")
    return values


def _to_array(values: Any, dtype: type) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64 if values.is_floating_point() else values.dtype).numpy()
    return np.asarray(values, dtype=dtype)
