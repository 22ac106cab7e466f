"""Average precision as COCO defines it, computed by pycocotools."""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastdet.metrics.common import Arrays, Detected, Truth, mean_of_known, to_numpy


class COCOResult(NamedTuple):
    """Average precision over all areas; NaN where there is no ground truth that counts.

    `ap` is the mean over the IoU thresholds .5, .55, ..., .95 and the classes, `ap50` and `ap75` are at one threshold;
    `ap_per_class` and `ap50_per_class` are float64 [num_classes - 1], for labels 1, 2, ...
    """

    ap: float
    ap50: float
    ap75: float
    ap_per_class: np.ndarray
    ap50_per_class: np.ndarray


def require_pycocotools() -> None:
    """Raises ImportError, with the command that installs it, where pycocotools is missing."""
    if importlib.util.find_spec("pycocotools") is None:
        raise ImportError("COCO's average precision needs pycocotools: pip install pycocotools")


def coco_average_precision(
    predictions: Sequence[Arrays], targets: Sequence[Arrays], num_classes: int, max_detections: int = 100
) -> COCOResult:
    """Average precision with the matching and the 101 recalls of COCO.

    Args:
        predictions: for each image "boxes" [D, 4] x1, y1, x2, y2, "scores" [D], "labels" [D].
        targets: for each image "boxes" [G, 4], "labels" [G] and, optionally, "ignore" bool [G]: COCO's crowds, which
            are not counted, and on which detections that lie inside them are neither true nor false.
        num_classes: counts the background, so that labels are 1..num_classes - 1.
        max_detections: how many detections an image and class may have; those with the highest scores count.

    Raises:
        ValueError: lengths differ or a label is out of range.
        ImportError: pycocotools is not installed.
    """
    require_pycocotools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    detected, truths = to_numpy(predictions, targets, num_classes)

    def index(images: Sequence[Detected | Truth]) -> Any:
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(images))],
            "categories": [{"id": label} for label in range(1, num_classes)],
            "annotations": _to_annotations(images),
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        # Both sides are indexed by hand: `loadRes` fails on an empty list.
        evaluation = COCOeval(index(truths), index(detected), "bbox")
        evaluation.params.maxDets = [max_detections]
        evaluation.params.areaRng = [[0.0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 0]  # [thresholds, recalls, classes], -1 without ground truth
    ap = np.where(precision > -1, precision, np.nan).mean(axis=1)
    return COCOResult(mean_of_known(ap), mean_of_known(ap[0]), mean_of_known(ap[5]), ap.mean(axis=0), ap[0])


def _to_annotations(images: Sequence[Detected | Truth]) -> list[dict[str, Any]]:
    annotations: list[dict[str, Any]] = []
    for image, found in enumerate(images):
        name, values = ("score", found.scores) if isinstance(found, Detected) else ("iscrowd", found.ignore.astype(int))
        for (x1, y1, x2, y2), label, value in zip(
            found.boxes.tolist(), found.labels.tolist(), values.tolist(), strict=True
        ):
            width, height = max(x2 - x1, 0.0), max(y2 - y1, 0.0)  # a negative area would be out of range, and not count
            annotation = {"image_id": image, "category_id": label, "bbox": [x1, y1, width, height]}
            # From 1: pycocotools writes the id of the match, and reads 0 as unmatched.
            annotation |= {"id": len(annotations) + 1, "area": width * height, "iscrowd": 0, name: value}
            annotations.append(annotation)
    return annotations
