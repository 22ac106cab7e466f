"""Copies of data sets in COCO's format."""

import shutil
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from fastdet.data.images import error_at, read_header
from fastdet.data.joined import DetectionDataset
from fastdet.safe_files import write_json


def write_coco(
    dataset: DetectionDataset,
    out: str | Path,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    leave_out: Mapping[int, Container[int]] = MappingProxyType({}),
) -> None:
    """Write a data set as `out/images` and `out/instances.json`, which `fastdet.data.COCO` reads as the same items.

    Files are copied as they are. Pictures that are in no file, and images with an EXIF orientation, whose readers do
    not agree on whether it is applied, are written as PNG, of the pixels that the data set gives. What is to be ignored
    becomes a crowd.

    Args:
        dataset: one of this package's.
        out: a folder that is not there, or is empty.
        progress: wraps the indices of the items, to show a bar.
        leave_out: by the index of an item the boxes of it that are left out.

    Raises:
        DataError: there is something in the folder, or an image cannot be read.
        OSError: a file cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise error_at(out, "there is something already, and nothing is overwritten")
    (out / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    used: set[str] = set()
    for index in progress(range(len(dataset))):
        path = dataset.image_path(index)
        is_copied = path is not None and read_header(path).orientation == 1
        stem = Path(path.name if path else dataset.ids[index]).stem
        name = _choose_name(stem, path.suffix if path and is_copied else ".png", used)
        if path and is_copied:
            shutil.copyfile(path, out / "images" / name)
        else:
            pixels = dataset[index][0].permute(1, 2, 0).numpy()
            Image.fromarray(np.ascontiguousarray(pixels)).save(out / "images" / name)
        height, width = dataset.sizes[index]
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
        target = dataset.target(index)
        for row, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
            if row in leave_out.get(index, ()):
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": int(target["labels"][row]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(target["ignore"][row]),
                }
            )
    categories = [{"id": label, "name": name} for label, name in enumerate(dataset.class_names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(out / "instances.json", content, indent=None)


def _choose_name(stem: str, suffix: str, used: set[str]) -> str:
    """A file's name whose stem no other image has, even with letters of another case."""
    number, name = 1, stem
    while name.lower() in used:
        number += 1
        name = f"{stem}_{number}"
    used.add(name.lower())
    return f"{name}{suffix}"
