"""Using a detector: average precision on a data set, and boxes in image files."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastdet.data import Item, collate, read_image
from fastdet.metrics import COCOResult, VOCResult, coco_average_precision, voc_average_precision
from fastdet.visualize.draw import draw_detections, tile

__all__ = ["Detected", "Evaluation", "detect", "evaluate", "read_image", "write_report"]


class Detected(NamedTuple):
    """What was found in an image file; all tensors on the CPU."""

    path: Path
    image: Tensor  # float32 [3, H, W] in 0..1
    boxes: Tensor  # float32 [N, 4], x1, y1, x2, y2 in pixels of the file
    labels: Tensor  # int64 [N], from 1
    scores: Tensor  # float32 [N], falling


@dataclass(frozen=True)
class Evaluation:
    """Detections in a data set and how good they are.

    Attributes:
        class_names: of labels 1, 2, ...
        predictions: for each image "boxes" [N, 4], "labels" [N], "scores" [N], on the CPU.
        voc07: VOC's average precision at IoU .5, the mean over eleven recalls.
        voc12: the same, the area under the curve.
        coco: COCO's average precision, None where pycocotools is not installed.
    """

    class_names: tuple[str, ...]
    predictions: list[dict[str, Tensor]]
    voc07: VOCResult
    voc12: VOCResult
    coco: COCOResult | None

    def summary(self) -> dict[str, Any]:
        """All figures as plain values fit for JSON, None where a class has no ground truth."""
        whole: dict[str, Any] = {"VOC07": self.voc07.mean, "VOC12": self.voc12.mean}
        columns: dict[str, Any] = {"VOC07": self.voc07.ap, "VOC12": self.voc12.ap}
        if self.coco:
            whole = {"AP": self.coco.ap, "AP50": self.coco.ap50, "AP75": self.coco.ap75, **whole}
            columns = {"AP": self.coco.ap_per_class, "AP50": self.coco.ap50_per_class, **columns}
        classes = {
            name: {column: _or_none(values[k]) for column, values in columns.items()}
            for k, name in enumerate(self.class_names)
        }
        return {**{name: _or_none(value) for name, value in whole.items()}, "classes": classes}

    def table(self) -> str:
        """The figures for people, a line for each class and one for their mean."""
        summary = self.summary()
        rows = {**summary.pop("classes"), "mean": summary}
        columns = list(summary)
        width = max(map(len, rows))
        lines = [" " * width + "".join(f"{column:>8}" for column in columns)]
        for name, values in rows.items():
            cells = ("" if column not in values else _three_places(values[column]) for column in columns)
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>8}" for cell in cells))
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    dataset: Dataset[Item],
    class_names: Sequence[str],
    *,
    batch_size: int = 4,
    workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Detect in every image of a data set and compare with its targets.

    Args:
        model: a detector on any device; it is left in the mode it was in.
        dataset: items (image [3, H, W], target with "boxes" [G, 4], "labels" [G] and "ignore" bool [G]).
        class_names: of labels 1, 2, ...
        batch_size: images at a time.
        workers: processes that load data.
        progress: show a bar.

    Raises:
        ValueError: a label is out of range.
        DataError: an image cannot be decoded.
    """
    loader = DataLoader(dataset, batch_size, collate_fn=collate, num_workers=workers)
    predictions: list[dict[str, Tensor]] = []
    targets: list[dict[str, Tensor]] = []
    with _evaluating(model):
        for images, found in tqdm(loader, "evaluate", disable=not progress, unit=" batches"):
            predictions += _detect(model, images)
            targets += found
    arguments = predictions, targets, len(class_names) + 1
    return Evaluation(
        class_names=tuple(class_names),
        predictions=predictions,
        voc07=voc_average_precision(*arguments, method="voc07"),
        voc12=voc_average_precision(*arguments, method="voc12"),
        coco=coco_average_precision(*arguments) if importlib.util.find_spec("pycocotools") else None,
    )


def detect(model: nn.Module, paths: Iterable[str | Path], *, batch_size: int = 1) -> Iterator[Detected]:
    """Detect in image files, one result a file in their order, as soon as its batch is done.

    Args:
        model: a detector on any device; it is left in the mode it was in.
        paths: files in any format that Pillow reads.
        batch_size: images at a time.

    Raises:
        DataError: a file is missing or cannot be decoded.
    """
    remaining = iter(paths)
    while batch := [Path(path) for path in islice(remaining, batch_size)]:
        images = [read_image(path) for path in batch]
        # Only while a batch is computed: the caller may do with the model what it likes between two results.
        with _evaluating(model):
            predictions = _detect(model, images)
        for path, image, found in zip(batch, images, predictions, strict=True):
            yield Detected(path, image, found["boxes"], found["labels"], found["scores"])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _detect(model: nn.Module, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    device = next(model.parameters()).device
    with torch.inference_mode():
        found = model([image.to(device, non_blocking=True) for image in images])
    # Copies, made outside of the mode, because tensors of the inference mode cannot be changed in place out here.
    return [{name: values.to("cpu", copy=True) for name, values in prediction.items()} for prediction in found]


def write_report(
    evaluation: Evaluation,
    dataset: Any,
    out: str | Path,
    *,
    facts: Mapping[str, Any],
    pictures: int = 6,
    score: float = 0.5,
) -> None:
    """Write `result.json`, the figures with some facts beside them, and `detections.png`, the first images with boxes.

    Args:
        evaluation: of `dataset`.
        dataset: what was evaluated.
        out: the folder, made if it is not there.
        facts: plain values to put first into the file.
        pictures: how many images to draw.
        score: detections below are not drawn.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, "images": len(dataset), **evaluation.summary()}, indent=2)
    (out / "result.json").write_text(text + "\n", encoding="utf-8")
    drawn = []
    for k, found in enumerate(evaluation.predictions[:pictures]):
        sure = found["scores"] >= score
        boxes, labels, scores = (found[name][sure] for name in ("boxes", "labels", "scores"))
        image, times = _enlarge(dataset[k][0])
        drawn.append(draw_detections(image, boxes * times, labels, scores, evaluation.class_names))
    tile(drawn, columns=3).save(out / "detections.png")


def _enlarge(image: Tensor, side: int = 320) -> tuple[Tensor, int]:
    """A small image [3, H, W] made a whole number of times larger, that its captions leave something to be seen."""
    times = max(1, side // max(image.shape[-2:]))
    if times == 1:
        return image, times
    return F.interpolate(image[None], scale_factor=times, mode="bicubic")[0].clamp(0, 1), times


def _or_none(value: float) -> float | None:
    # NaN is not JSON.
    return None if math.isnan(value) else float(value)


def _three_places(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
