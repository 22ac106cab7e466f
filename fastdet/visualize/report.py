"""The report of an evaluation: its metrics as JSON, and detections drawn on the first images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdet.safe_files import replace_file, write_json
from fastdet.visualize.boxes import draw_detections, tile


def write_report(
    out: str | Path,
    summary: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Tensor]],
    class_names: Sequence[str],
    dataset: Any,
    *,
    metadata: Mapping[str, Any],
    max_images: int = 6,
    score_threshold: float = 0.5,
) -> None:
    """Write `result.json`, the metrics after some metadata, and `detections.png`, the first images with boxes.

    Args:
        out: the folder, made if it is not there.
        summary: the metrics as plain values fit for JSON.
        predictions: for each image of `dataset` "boxes" [N, 4] x1, y1, x2, y2, "labels" [N], "scores" [N], on the CPU.
        class_names: of labels 1, 2, ...
        dataset: items (image [3, H, W], uint8 or in 0..1, target), and a length.
        metadata: plain values to put first into the file.
        max_images: how many images to draw.
        score_threshold: detections below are not drawn.
    """
    out = Path(out)
    write_json(out / "result.json", {**metadata, "images": len(dataset), **summary})
    drawn = []
    for k, prediction in enumerate(predictions[:max_images]):
        image = dataset[k][0]
        # Small images are enlarged, so that captions do not hide them.
        factor = max(1, 320 // max(image.shape[-2:]))
        if factor > 1:
            pixels = image / 255 if image.dtype == torch.uint8 else image
            image = F.interpolate(pixels[None], scale_factor=factor, mode="bicubic")[0].clamp(0, 1)
        confident = prediction["scores"] >= score_threshold
        boxes, labels, scores = (prediction[name][confident] for name in ("boxes", "labels", "scores"))
        drawn.append(draw_detections(image, boxes * factor, labels, scores, class_names))
    sheet = tile(drawn, columns=3)
    replace_file(out / "detections.png", lambda file: sheet.save(file, format="PNG"))
