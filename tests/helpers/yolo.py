"""Small data sets in YOLO's layout, and what opening them gives."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdet.data import DataError, Shapes
from fastdet.data.formats.yolo import YOLO

NAMES = "names: [cat, dog]\n"


def write_yolo(root: Path, splits: dict[str, int]) -> Path:
    """The drawn shapes of 64 pixels that `write_voc` draws, in the layout of Ultralytics; the path of the data.yaml."""
    for seed, (split, count) in enumerate(splits.items()):
        shapes = Shapes(count, size=64, seed=seed)
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for k in range(count):
            drawing = shapes.draw(k)
            pixels = (drawing.picture * 255).astype(np.uint8).transpose(1, 2, 0)
            Image.fromarray(pixels).save(root / f"images/{split}/{split}_{k}.jpg", quality=95)
            x1, y1, x2, y2 = drawing.boxes.astype(np.float64).T / 64
            lines = zip(drawing.labels - 1, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, strict=True)
            text = "".join(
                f"{label} {x:.8f} {y:.8f} {width:.8f} {height:.8f}\n" for label, x, y, width, height in lines
            )
            (root / f"labels/{split}/{split}_{k}.txt").write_text(text)
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(Shapes.class_names))
    paths = "".join(f"{split}: images/{split}\n" for split in splits)
    (root / "data.yaml").write_text(f"path: .\n{paths}names:\n{names}")
    return root / "data.yaml"


def write_pair(root: Path) -> Path:
    """Two images of 40 x 20 in the split "train": `a` with a dog, `b`, in a folder of its own, with a cat."""
    for stem, line in (("a", "1 0.5 0.5 0.5 0.5\n"), ("part/b", "0 0.25 0.5 0.5 1\n")):
        picture(root / f"images/train/{stem}.jpg")
        label(root / f"labels/train/{stem}.txt", line)
    configure(root, f"train: images/train\n{NAMES}")
    return root


def picture(path: Path, size: tuple[int, int] = (40, 20), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)
    return path


def label(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def configure(root: Path, text: str) -> Path:
    (root / "data.yaml").write_text(text)
    return root / "data.yaml"


def open_quietly(path: Path, *arguments: Any, **options: Any) -> YOLO:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return YOLO(path, *arguments, **options)


def warnings_of(path: Path, *arguments: Any, **options: Any) -> tuple[YOLO, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = YOLO(path, *arguments, **options)
    messages = [str(warning.message) for warning in caught]
    assert all(message.isprintable() for message in messages)
    return data, messages


def boxes_of(data: YOLO, index: int = 0) -> list[list[float]]:
    return data[index][1]["boxes"].tolist()


def fails(path: Path, *arguments: Any, **options: Any) -> str:
    """The message of the error, of one line that a terminal can show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError) as caught:
            YOLO(path, *arguments, **options)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2100
    return str(caught.value)
