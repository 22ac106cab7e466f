"""Average precision: worked cases, a slow loop beside it, and the two metrics beside each other."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

from fastdet.metrics import coco_average_precision, voc_average_precision

Image = dict[str, Any]


def box(x: float, width: float = 10.0) -> list[float]:
    """A box 10 pixels high; two that are shifted by s of their width w share (w - s) / (w + s)."""
    return [x, 0.0, x + width, 10.0]


def predicted(*rows: tuple[float, list[float]], label: int = 1) -> Image:
    return {
        "boxes": torch.tensor([corners for _, corners in rows]).reshape(-1, 4),
        "scores": torch.tensor([score for score, _ in rows]),
        "labels": torch.full((len(rows),), label),
    }


def truth(*boxes: list[float], label: int = 1, ignore: tuple[bool, ...] | None = None) -> Image:
    target = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.full((len(boxes),), label)}
    return target if ignore is None else {**target, "ignore": torch.tensor(ignore, dtype=torch.bool)}


def both(predictions: list[Image], targets: list[Image], **options: Any) -> tuple[float, float]:
    """(voc07, voc12) of label 1."""
    old = voc_average_precision(predictions, targets, 2, method="voc07", **options)
    new = voc_average_precision(predictions, targets, 2, method="voc12", **options)
    return old.mean, new.mean


def test_worked_case() -> None:
    # By falling score: hit, miss, hit, of 4: precision 1, 1/2, 2/3 at recall 1/4, 1/4, 1/2.
    predictions = [predicted((0.9, box(0)), (0.8, box(300)), (0.7, box(100)))]
    targets = [truth(box(0), box(100), box(200), box(500))]
    result = voc_average_precision(predictions, targets, 2)
    assert result.precision[0].tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert result.recall[0].tolist() == [0.25, 0.25, 0.5]
    old, new = both(predictions, targets)
    assert new == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
    assert old == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)


def test_recall_of_exactly_three_tenths_reaches_its_point() -> None:
    targets = [truth(*(box(100 * k) for k in range(10)))]
    predictions = [predicted(*((0.9 - 0.1 * k, box(100 * k)) for k in range(3)))]
    assert both(predictions, targets) == pytest.approx((4 / 11, 0.3))


def test_scores_rank_over_all_images() -> None:
    # The miss of the second image comes before the hit of the first.
    predictions = [predicted((0.5, box(0))), predicted((0.6, box(50)))]
    assert both(predictions, [truth(box(0)), truth()]) == pytest.approx((0.5, 0.5))
    predictions[1]["scores"] -= 0.2
    assert both(predictions, [truth(box(0)), truth()]) == pytest.approx((1, 1))


def test_equal_scores_keep_their_order() -> None:
    hit_first = [predicted((0.5, box(0)), (0.5, box(50)))]
    miss_first = [predicted((0.5, box(50)), (0.5, box(0)))]
    assert both(hit_first, [truth(box(0))])[1] == 1
    assert both(miss_first, [truth(box(0))])[1] == 0.5


def test_a_second_detection_is_false_even_where_another_box_is_free() -> None:
    # The first box is the best match of both (IoU 0.82 with the second one); the other box, at IoU 0.54, stays unfound.
    predictions = [predicted((0.9, box(0)), (0.8, box(1)))]
    targets = [truth(box(0), box(4))]
    result = voc_average_precision(predictions, targets, 2)
    assert result.precision[0].tolist() == [1, 0.5]
    assert result.recall[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, 1.0), (0.5000001, 0.0), (0.49, 1.0)])
def test_an_iou_on_the_threshold_counts(threshold: float, expected: float) -> None:
    assert both([predicted((0.9, box(0, 5)))], [truth(box(0))], iou_threshold=threshold) == (expected, expected)


def test_ignored_boxes_neither_count_nor_harm() -> None:
    # Two detections on the ignored box, ranked first, change nothing; without the mark they would.
    predictions = [predicted((0.9, box(100)), (0.8, box(100)), (0.7, box(0)))]
    assert both(predictions, [truth(box(0), box(100), ignore=(False, True))]) == (1, 1)
    assert both(predictions, [truth(box(0), box(100), ignore=(False, False))])[1] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_classes_do_not_meet() -> None:
    targets = [{"boxes": torch.tensor([box(0), box(100)]), "labels": torch.tensor([1, 3]), "ignore": None}]
    predictions = [predicted((0.9, box(0)), (0.8, box(100)), label=3)]
    result = voc_average_precision(predictions, targets, 5)
    assert result.ap.dtype == np.float64
    np.testing.assert_allclose(result.ap, [0, np.nan, 0.5, np.nan])
    assert result.mean == 0.25


def test_a_class_with_only_ignored_boxes_is_left_out() -> None:
    result = voc_average_precision([predicted((0.9, box(0)))], [truth(box(0), ignore=(True,))], 2)
    assert math.isnan(result.ap[0])
    assert math.isnan(result.mean)


@pytest.mark.parametrize("metric", [voc_average_precision, coco_average_precision])
def test_nothing_at_all(metric: Any) -> None:
    nothing = metric([], [], 3)
    assert math.isnan(nothing[0].mean() if isinstance(nothing[0], np.ndarray) else nothing[0])
    empty = metric([predicted(), predicted()], [truth(), truth()], 3)
    assert math.isnan(empty[0].mean() if isinstance(empty[0], np.ndarray) else empty[0])


def test_no_predictions_is_zero_and_perfect_ones_are_one() -> None:
    targets = [truth(box(0), box(30), label=2), truth(), truth(box(5))]
    none = [predicted() for _ in targets]
    assert voc_average_precision(none, targets, 3).mean == 0
    assert coco_average_precision(none, targets, 3)[:3] == (0, 0, 0)
    perfect = [{**target, "scores": torch.rand(len(target["labels"]))} for target in targets]
    methods: tuple[Any, ...] = ("voc07", "voc12")
    for method in methods:
        assert voc_average_precision(perfect, targets, 3, method=method).ap.tolist() == pytest.approx([1, 1])
    result = coco_average_precision(perfect, targets, 3)
    assert result[:3] == pytest.approx((1, 1, 1))
    assert result.ap_per_class.tolist() == pytest.approx([1, 1])


def test_boxes_that_are_not_finite_are_false() -> None:
    nan, inf = float("nan"), float("inf")
    bad: list[list[float]] = [[nan, 0, 10, 10], [-inf, -inf, inf, inf], [10.0, 0, 0, 10], [5, 5, 5, 5]]
    predictions = [predicted(*((0.9, corners) for corners in bad), (0.5, box(0)))]
    assert voc_average_precision(predictions, [truth(box(0))], 2).mean == pytest.approx(1 / 5)
    assert coco_average_precision(predictions, [truth(box(0))], 2).ap == pytest.approx(1 / 5)


def test_half_precision_arrays_and_gradients_are_accepted() -> None:
    prediction = predicted((0.9, box(0)))
    prediction["scores"] = prediction["scores"].bfloat16().requires_grad_()
    prediction["boxes"] = prediction["boxes"].numpy()
    assert voc_average_precision([prediction], [truth(box(0))], 2).mean == 1


def broken(**changes: Any) -> tuple[list[Image], list[Image]]:
    prediction, target = predicted((0.9, box(0))), truth(box(0))
    for key, value in changes.items():
        side, name = key.split("_")
        (prediction if side == "p" else target)[name] = value
    return [prediction], [target]


@pytest.mark.parametrize("metric", [voc_average_precision, coco_average_precision])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("p_scores", torch.ones(2), r"predictions\[0\]\['scores'\]"),
        ("p_labels", torch.ones(2), r"predictions\[0\]\['labels'\]"),
        ("p_labels", torch.zeros(1), "labels are 1..1"),
        ("p_boxes", torch.ones(4), r"predictions\[0\]\['boxes'\]"),
        ("t_labels", torch.tensor([2]), "labels are 1..1"),
        ("t_ignore", torch.ones(3), r"targets\[0\]\['ignore'\]"),
    ],
)
def test_wrong_inputs(metric: Any, key: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(*broken(**{key: value}), 2)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="1 predictions but 0 targets"):
        voc_average_precision([predicted()], [], 2)
    with pytest.raises(ValueError, match="voc10"):
        voc_average_precision([], [], 2, method="voc10")  # type: ignore[arg-type]


def slow_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both_areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (both_areas - width * height) if width * height > 0 else 0.0


def slow_ap(predictions: list[Image], targets: list[Image], label: int, threshold: float, method: str) -> float:
    """One detection after another, as the development kit does it; the area as a sum over the true ones."""
    total = sum(
        1 for t in targets for k in range(len(t["labels"])) if int(t["labels"][k]) == label and not bool(t["ignore"][k])
    )
    if total == 0:
        return float("nan")
    rows = [
        (-float(p["scores"][k]), i, p["boxes"][k].tolist())
        for i, p in enumerate(predictions)
        for k in range(len(p["labels"]))
        if int(p["labels"][k]) == label
    ]
    rows.sort(key=lambda row: row[0])
    found: set[tuple[int, int]] = set()
    points: list[tuple[int, int]] = []  # (true, detections that count) after each detection
    true = counted = 0
    for _, image, corners in rows:
        best, where = -1.0, -1
        target = targets[image]
        for k in range(len(target["labels"])):
            if int(target["labels"][k]) == label:
                iou = slow_iou(corners, target["boxes"][k].tolist())
                if iou > best:
                    best, where = iou, k
        if best >= threshold and bool(target["ignore"][where]):
            continue
        counted += 1
        if best >= threshold and (image, where) not in found:
            found.add((image, where))
            true += 1
        points.append((true, counted))
    if method == "voc07":
        marks = [max((t / c for t, c in points if 10 * t >= k * total), default=0.0) for k in range(11)]
        return sum(marks) / 11
    steps = [max((t / c for t, c in points if t >= k), default=0.0) for k in range(1, total + 1)]
    return sum(steps) / total


def random_case(rng: np.random.Generator, images: int, classes: int) -> tuple[list[Image], list[Image]]:
    """Small whole coordinates and few distinct scores, so that ties of IoU, score and threshold are common."""

    predictions, targets = [], []
    for _ in range(images):
        d, g = int(rng.integers(0, 12)), int(rng.integers(0, 6))
        corner, extent = rng.integers(0, 12, (g, 2)), rng.integers(2, 7, (g, 2))
        boxes, labels = np.concatenate([corner, corner + extent], axis=1), rng.integers(1, classes, g)
        ignore = torch.tensor(rng.random(g) < 0.25, dtype=torch.bool)
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels), "ignore": ignore})
        # Most detections are a ground truth, moved by up to a pixel; the others, and all of an empty image, are not.
        source = rng.integers(0, g, d) if g else np.zeros(d, dtype=np.int64)
        sources = boxes[source] if g else np.tile([0, 0, 5, 5], (d, 1))
        names = np.where(rng.random(d) < 0.8, labels[source], rng.integers(1, classes, d)) if g else 1 + source
        moved = torch.tensor(sources + rng.integers(-1, 2, (d, 4)) * rng.integers(0, 2, (d, 1))).float()
        scores = torch.tensor(rng.integers(0, 6, d) / 5).float()
        predictions.append({"boxes": moved, "scores": scores, "labels": torch.tensor(names)})
    return predictions, targets


@pytest.mark.parametrize("method", ["voc07", "voc12"])
@pytest.mark.parametrize("threshold", [0.25, 0.5])
def test_against_the_slow_loop(method: Any, threshold: float) -> None:
    rng = np.random.default_rng(5)
    values = []
    for _ in range(40):
        predictions, targets = random_case(rng, int(rng.integers(1, 8)), 4)
        fast = voc_average_precision(predictions, targets, 4, threshold, method)
        slow = [slow_ap(predictions, targets, label, threshold, method) for label in (1, 2, 3)]
        np.testing.assert_allclose(fast.ap, slow, rtol=0, atol=1e-12)
        values += slow
    assert np.nanstd(values) > 0.1


def test_voc_and_coco_agree_where_their_rules_do() -> None:
    """Boxes without overlap and distinct scores: the areas differ only by COCO's 101 points."""
    rng = np.random.default_rng(3)
    for _ in range(5):
        predictions, targets = [], []
        for _ in range(30):
            boxes = torch.tensor([box(100 * k) for k in range(4)])
            shift = torch.tensor(rng.choice([0.0, 1.0, 9.0], (4, 1)), dtype=torch.float32)
            targets.append({"boxes": boxes, "labels": torch.tensor([1, 1, 2, 2])})
            scores = torch.tensor(rng.random(4))
            moved = boxes + shift * torch.tensor([1.0, 0, 1, 0])
            predictions.append({"boxes": moved, "scores": scores, "labels": torch.tensor([1, 1, 2, 2])})
        voc = voc_average_precision(predictions, targets, 3)
        coco = coco_average_precision(predictions, targets, 3)
        np.testing.assert_allclose(coco.ap50_per_class, voc.ap, atol=0.012)
        assert coco.ap50 == pytest.approx(coco.ap50_per_class.mean())
        strict = voc_average_precision(predictions, targets, 3, iou_threshold=0.75)
        assert coco.ap75 == pytest.approx(strict.mean, abs=0.012)
        assert 0.2 < coco.ap < coco.ap75 <= coco.ap50 < 0.9


def test_coco_thresholds_and_classes_without_truth() -> None:
    # IoU 0.6 passes at .5, .55 and .6 of ten thresholds.
    result = coco_average_precision([predicted((0.9, box(0, 6.0001)), label=2)], [truth(box(0), label=2)], 4)
    assert result.ap == pytest.approx(0.3)
    assert (result.ap50, result.ap75) == pytest.approx((1, 0))
    np.testing.assert_allclose(result.ap_per_class, [np.nan, 0.3, np.nan])
    np.testing.assert_allclose(result.ap50_per_class, [np.nan, 1, np.nan])
    for width, expected in ((7.3, 0), (7.7, 1)):
        result = coco_average_precision([predicted((0.9, box(0, width)))], [truth(box(0))], 2)
        assert result.ap75 == pytest.approx(expected)


def test_coco_ignores_crowds() -> None:
    predictions = [predicted((0.9, box(100)), (0.85, box(105, 3)), (0.8, box(0)))]
    assert coco_average_precision(predictions, [truth(box(0), box(100), ignore=(False, True))], 2).ap == pytest.approx(
        1
    )
    only_crowds = coco_average_precision(predictions, [truth(box(0), ignore=(True,))], 2)
    assert math.isnan(only_crowds.ap)


def test_coco_max_detections() -> None:
    predictions = [predicted((0.9, box(50)), (0.8, box(0)))]
    assert coco_average_precision(predictions, [truth(box(0))], 2).ap50 == pytest.approx(0.5)
    assert coco_average_precision(predictions, [truth(box(0))], 2, max_detections=1).ap50 == 0


def test_coco_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    coco_average_precision([predicted((0.9, box(0)))], [truth(box(0))], 2)
    assert capfd.readouterr() == ("", "")


def test_coco_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"pip install pycocotools"):
        coco_average_precision([], [], 2)
