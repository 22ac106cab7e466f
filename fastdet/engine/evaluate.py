"""Average precision of a detector on a data set, and its losses there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastdet.data import DataError, Item, collate
from fastdet.engine.distributed import ALONE, Processes
from fastdet.engine.loading import ignore_sigterm, image_names, sizes_of
from fastdet.engine.predict import detect_in_batch, detect_with_losses
from fastdet.metrics import (
    COCOResult,
    VOCResult,
    coco_average_precision,
    require_pycocotools,
    voc_average_precision,
)
from fastdet.models.losses import NAMES, divisor
from fastdet.safe_files import printable


@dataclass(frozen=True)
class Evaluation:
    """Detections in a data set and their average precision.

    Attributes:
        class_names: of labels 1, 2, ...
        predictions: for each image "boxes" [N, 4], "labels" [N], "scores" [N], on the CPU.
        voc07: VOC's average precision at IoU .5, the mean over eleven recalls.
        voc12: the same, the area under the curve.
        coco: COCO's average precision.
        losses: the four losses by name, if they were asked for: those of one batch of all images.
    """

    class_names: tuple[str, ...]
    predictions: list[dict[str, Tensor]]
    voc07: VOCResult
    voc12: VOCResult
    coco: COCOResult
    losses: dict[str, float] | None = None

    def summary(self) -> dict[str, Any]:
        """All metrics as plain values fit for JSON, None where a class has no ground truth."""
        coco, voc07, voc12 = self.coco, self.voc07, self.voc12
        means = {"AP": coco.ap, "AP50": coco.ap50, "AP75": coco.ap75, "VOC07": voc07.mean, "VOC12": voc12.mean}
        columns = {"AP": coco.ap_per_class, "AP50": coco.ap50_per_class, "VOC07": voc07.ap, "VOC12": voc12.ap}
        classes = {
            name: _nan_to_none({column: values[k] for column, values in columns.items()})
            for k, name in enumerate(self.class_names)
        }
        return {**_nan_to_none(means), "classes": classes}

    def table(self) -> str:
        """The metrics for people, a line for each class and one for their mean."""
        means = self.summary()
        rows = {**means.pop("classes"), "mean": means}
        rows = {printable(name, 40): row for name, row in rows.items()}
        width = max(map(len, rows))
        lines = [" " * width + "".join(f"{column:>8}" for column in means)]
        for name, row in rows.items():
            # AP75 has no value a class.
            cells = ("-" if (value := row.get(column, "")) is None else value for column in means)
            lines.append(
                f"{name:<{width}}" + "".join(f"{c:8.3f}" if isinstance(c, float) else f"{c:>8}" for c in cells)
            )
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    dataset: Dataset[Item],
    class_names: Sequence[str],
    *,
    batch_size: int = 4,
    workers: int = 0,
    progress: bool = False,
    processes: Processes = ALONE,
    compute_losses: bool = False,
) -> Evaluation:
    """Detect in every image of a data set and compare with its targets.

    The losses are sums over the anchors and samples of all images by their number, so that no batch size changes them.
    What is sampled in an image follows from its index, so that two evaluations of one model give the same.

    Args:
        model: a detector on any device; its modules keep the modes they are in.
        dataset: items (image [3, H, W], target with "boxes" [G, 4], "labels" [G] and perhaps "ignore" bool [G]).
        class_names: of labels 1, 2, ..., as the data set's own `class_names`, if it has them.
        batch_size: images at a time, if the data set has their `sizes`: only those of one size are put together, so
            that the figures do not depend on it. Without, one at a time.
        workers: processes that load data.
        progress: show a bar where stderr is a terminal.
        processes: that share the images, each with this call; all get the whole result.
        compute_losses: of a `fastdet.FasterRCNN`; on a CPU it takes about a quarter longer.

    Raises:
        ImportError: pycocotools is missing; before anything is computed.
        ValueError: a label is out of range, or has another name in the data set.
        DataError: an image cannot be decoded, or the model takes no losses of a target.
    """
    from tqdm import tqdm

    require_pycocotools()
    _check_names(class_names, getattr(dataset, "class_names", ()))
    plan = processes.share(_plan_batches(dataset, batch_size))
    # A generator of its own: a loader draws a seed for its workers, which would change what training draws.
    loader = DataLoader(
        dataset,
        batch_sampler=plan,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_sigterm,
        generator=torch.Generator(),
    )
    found: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    sums: dict[int, Tensor] = {}
    # tqdm shows nothing elsewhere than on a terminal where `disable` is None.
    hidden = None if progress else True
    batches = tqdm(zip(plan, loader, strict=True), "evaluate", len(plan), disable=hidden, unit=" batches")
    for indices, (images, batch_targets) in batches:
        complete = [{"ignore": torch.zeros(len(t["labels"]), dtype=torch.bool), **t} for t in batch_targets]
        if compute_losses:
            seeded = [{**t, "seed": torch.tensor(2 * k)} for k, t in zip(indices, complete, strict=True)]
            try:
                detections, sums[indices[0]] = detect_with_losses(model, images, seeded)  # type: ignore[arg-type]
            except ValueError as error:
                raise DataError(f"images {image_names(dataset, indices)}: {error}") from error
        else:
            detections = detect_in_batch(model, images)
        found.update(zip(indices, zip(detections, complete, strict=True), strict=True))
    found = {index: each for part in processes.gather(found) for index, each in part.items()}
    sums = {index: each for part in processes.gather(sums) for index, each in part.items()}
    predictions, targets = [[found[index][part] for index in range(len(found))] for part in range(2)]
    arguments = predictions, targets, len(class_names) + 1
    return Evaluation(
        class_names=tuple(class_names),
        predictions=predictions,
        voc07=voc_average_precision(*arguments, method="voc07"),
        voc12=voc_average_precision(*arguments, method="voc12"),
        coco=coco_average_precision(*arguments),
        losses=_mean_losses(sums) if compute_losses else None,
    )


def _check_names(class_names: Sequence[str], own: Sequence[str]) -> None:
    """Raises ValueError if a label has another name in the data set: its boxes would be compared with other classes."""
    for label, (given, name) in enumerate(zip(class_names, own, strict=False), start=1):
        if given != name:
            raise ValueError(
                f"class_names: label {label} is {given!r:.100}, and {name!r:.100} in the data set; "
                "fastdet.data.JoinedImages([dataset], class_names) gives it these labels"
            )


def _mean_losses(sums: dict[int, Tensor]) -> dict[str, float]:
    """Of what `detect_with_losses` gives for each batch, in an order that the number of processes does not change."""
    total, count = torch.stack([torch.zeros(2, len(NAMES)).double(), *(sums[k] for k in sorted(sums))]).sum(0)
    return dict(zip(NAMES, (total / divisor(count)).tolist(), strict=True))


def _plan_batches(dataset: Any, batch_size: int) -> list[list[int]]:
    """Indices of images of one size, so that none is padded: its detections then do not depend on those beside it.

    Where the data set has no `sizes` each image is a batch.
    """
    groups: dict[Any, list[int]] = {}
    for index, size in enumerate(sizes_of(dataset) or range(len(dataset))):
        groups.setdefault(size, []).append(index)
    return [group[k : k + batch_size] for group in groups.values() for k in range(0, len(group), batch_size)]


def _nan_to_none(values: dict[str, float]) -> dict[str, float | None]:
    # NaN is not JSON.
    return {name: None if math.isnan(value) else float(value) for name, value in values.items()}
