"""Small data sets in the VOC layout, and options of a detector that trains on them in seconds."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastdet.data import Shapes

SMALL = [
    *("--backbone", "small", "--min-size", "64", "--max-size", "64", "--anchor-sizes", "12,20,32"),
    *("--set", "rpn_pre_nms_top_n_train=60", "--set", "rpn_post_nms_top_n_train=20", "--set", "rpn_min_size=2"),
    *("--set", "rpn_pre_nms_top_n_test=60", "--set", "rpn_post_nms_top_n_test=20"),
    *("--set", "box_representation_size=32", "--set", "rpn_hidden_channels=16", "--set", "box_batch_size_per_image=16"),
    *("--batch-size", "2", "--warmup-steps", "2", "--device", "cpu"),
]


def write_voc(root: Path, splits: dict[str, int]) -> Path:
    """Drawn shapes of 64 pixels in the VOC layout."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    for seed, (split, count) in enumerate(splits.items()):
        shapes = Shapes(count, size=64, seed=seed)
        stems = [f"{split}_{k}" for k in range(count)]
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(stems))
        for k, stem in enumerate(stems):
            drawing = shapes.draw(k)
            pixels = (drawing.picture * 255).astype(np.uint8).transpose(1, 2, 0)
            Image.fromarray(pixels).save(root / f"JPEGImages/{stem}.jpg", quality=95)
            objects = "".join(
                f"<object><name>{shapes.class_names[label - 1]}</name><bndbox><xmin>{x1 + 1}</xmin>"
                f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                for (x1, y1, x2, y2), label in zip(drawing.boxes.tolist(), drawing.labels, strict=True)
            )
            (root / f"Annotations/{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    return root
