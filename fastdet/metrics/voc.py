"""Average precision as Pascal VOC defines it.

Everingham et al., The PASCAL Visual Object Classes Challenge: A Retrospective (IJCV 2015), section 4.2, and the
development kit's VOCevaldet.m.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from fastdet.metrics.common import Arrays, Detected, Truth, mean_of_known, to_numpy


class VOCResult(NamedTuple):
    """Average precision of each class.

    `ap` is float64 [num_classes - 1], for labels 1, 2, ..., with NaN where a class has no ground truth that counts;
    `mean` is over the other classes (NaN if there is none). `precision[k]` and `recall[k]` are the curve of label
    k + 1, float64, a point for each of its detections by falling score (recall is NaN without ground truth).
    """

    ap: np.ndarray
    mean: float
    precision: tuple[np.ndarray, ...]
    recall: tuple[np.ndarray, ...]


def voc_average_precision(
    predictions: Sequence[Arrays],
    targets: Sequence[Arrays],
    num_classes: int,
    iou_threshold: float = 0.5,
    method: Literal["voc07", "voc12"] = "voc12",
) -> VOCResult:
    """Average precision with the matching of the VOC development kit.

    The detections of a class, over all images by falling score (equal scores in the order given), are each compared
    to the ground truth of the class in their image with which they have the largest IoU. If that is >=
    `iou_threshold` (>= as in the kit's VOCevaldet.m; the Python port that came with Fast R-CNN has >), the detection
    is true if it is the box's first, and false if the box was found before; on an ignored box it counts as neither.
    All others are false. Ignored boxes are not counted as ground truth either. Unlike the kit, coordinates are
    continuous: a side is x2 - x1, without + 1.

    Args:
        predictions: for each image "boxes" [D, 4] x1, y1, x2, y2, "scores" [D], "labels" [D].
        targets: for each image "boxes" [G, 4], "labels" [G] and, optionally, "ignore" bool [G] (VOC's `difficult`).
        num_classes: counts the background, so that labels are 1..num_classes - 1.
        iou_threshold: in 0..1.
        method: "voc07", the mean precision at recalls 0, .1, ..., 1; "voc12", the area under the curve.

    Raises:
        ValueError: lengths differ, a label is out of range, or the method is unknown.
    """
    if method not in ("voc07", "voc12"):
        raise ValueError(f"method must be 'voc07' or 'voc12', not {method!r}")
    detected, truths = to_numpy(predictions, targets, num_classes)
    best, overlap = _best_matches(detected, truths)
    scores = np.concatenate([np.zeros(0), *(item.scores for item in detected)])
    labels = np.concatenate([np.zeros(0, np.int64), *(item.labels for item in detected)])
    ignore = np.concatenate([np.zeros(0, np.bool_), *(item.ignore for item in truths)])
    truth_labels = np.concatenate([np.zeros(0, np.int64), *(item.labels for item in truths)])

    ap = np.full(num_classes - 1, np.nan)
    precisions, recalls = [], []
    for label in range(1, num_classes):
        members = np.flatnonzero(labels == label)
        order = members[np.argsort(-scores[members], kind="stable")]
        count = int(np.count_nonzero((truth_labels == label) & ~ignore))
        precision, recall = _curve(best[order], overlap[order] >= iou_threshold, ignore, count)
        precisions.append(precision)
        recalls.append(recall)
        if count:
            ap[label - 1] = (_area if method == "voc12" else _eleven_points)(precision, recall)
    return VOCResult(ap, mean_of_known(ap), tuple(precisions), tuple(recalls))


def _best_matches(detected: Sequence[Detected], truths: Sequence[Truth]) -> tuple[np.ndarray, np.ndarray]:
    """For every detection, the ground truth of its class and image with the largest IoU, and that IoU.

    Ground truths are counted through all images. A detection without any gets index -1 and IoU -1.
    """
    best, overlap, first = [np.zeros(0, np.int64)], [np.zeros(0)], 0
    for found, truth in zip(detected, truths, strict=True):
        # The first column is that of no ground truth.
        iou = np.full((len(found.boxes), 1 + len(truth.boxes)), -1.0)
        np.copyto(iou[:, 1:], _box_iou(found.boxes, truth.boxes), where=found.labels[:, None] == truth.labels)
        largest = iou.max(axis=1)
        best.append(np.where(largest >= 0, iou.argmax(axis=1) - 1 + first, -1))
        overlap.append(largest)
        first += len(truth.boxes)
    return np.concatenate(best), np.concatenate(overlap)


def _box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    extent = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    inter = extent.clip(min=0).prod(axis=2)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1)[:, None] + (b[:, 2:] - b[:, :2]).prod(axis=1) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=(inter > 0) & (union > 0))


def _curve(best: np.ndarray, hit: np.ndarray, ignore: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each detection of a class, by falling score.

    `best` [D] is the ground truth that each is compared to, `hit` [D] whether it overlaps enough, `ignore` is by ground
    truth, `count` how many ground truths the class has.
    """
    neither = np.zeros(len(best), dtype=np.bool_)
    neither[hit] = ignore[best[hit]]
    candidates = np.flatnonzero(hit & ~neither)
    true = np.zeros(len(best), dtype=np.bool_)
    true[candidates[np.unique(best[candidates], return_index=True)[1]]] = True
    found, wrong = np.cumsum(true), np.cumsum(~true & ~neither)
    # 0 / 0, as long as all detections lie on ignored boxes, counts as no precision, as in the kit's sums.
    return found / np.maximum(found + wrong, 1), found / count if count else np.full(len(best), np.nan)


def _area(precision: np.ndarray, recall: np.ndarray) -> float:
    """The area under the curve made monotone: at each recall the best precision from there on."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


def _eleven_points(precision: np.ndarray, recall: np.ndarray) -> float:
    # Tenths by division: 3 * 0.1 is above 0.3, and would miss a recall of exactly 3 / 10.
    return float(np.mean([precision[recall >= k / 10].max(initial=0.0) for k in range(11)]))
