"""One data set of photographs in each format."""

import warnings
from pathlib import Path

import pytest
import torch

from fastdet.data import COCO, VOC, YOLO, DataError, JoinedImages
from fastdet.data.convert import write_coco
from fastdet.data.findings import Kind, group
from fastdet.data.lint import lint

pytestmark = [pytest.mark.shared, pytest.mark.filterwarnings("ignore:.*box.es. left out")]


@pytest.fixture(scope="module")
def bccd(shared_dir: Path) -> VOC:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return VOC(shared_dir / "data/BCCD", "test")


def write_yolo(data: VOC, root: Path) -> Path:
    for folder in ("images/test", "labels/test"):
        (root / folder).mkdir(parents=True)
    for index, name in enumerate(data.ids):
        (root / f"images/test/{name}.jpg").symlink_to(data.image_path(index))
        (height, width), target = data.sizes[index], data.target(index)
        lines = []
        for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            shares = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            lines.append(f"{label - 1} {' '.join(map(repr, shares))}")
        (root / f"labels/test/{name}.txt").write_text("\n".join(lines))
    names = ", ".join(data.class_names)
    (root / "data.yaml").write_text(f"train: images/test\nval: images/test\ntest: images/test\nnames: [{names}]\n")
    return root / "data.yaml"


def test_three_formats_give_identical_tensors(bccd, tmp_path):
    write_coco(bccd, tmp_path / "coco")
    coco = COCO(tmp_path / "coco/images", tmp_path / "coco/instances.json")
    yolo = YOLO(write_yolo(bccd, tmp_path / "yolo"), "test")
    assert len(bccd) == len(coco) == len(yolo) == 72
    assert bccd.class_names == coco.class_names == yolo.class_names
    by_name = {Path(name).stem: index for index, name in enumerate(yolo.ids)}
    for index, name in enumerate(bccd.ids):
        image, target = bccd[index]
        for other in (coco[index], yolo[by_name[name]]):
            assert torch.equal(image, other[0])
            for key in ("boxes", "labels", "ignore"):
                assert torch.equal(target[key], other[1][key]), (name, key)


def test_lint_finds_the_degenerate_boxes(shared_dir):
    problems: list[DataError] = []
    data = JoinedImages([VOC(shared_dir / "data/BCCD", "trainval", problems=problems)])
    found = group(lint(data, problems).findings)
    assert [finding.text for finding in found[Kind.BOX_LEFT_OUT]] == [
        "BloodImage_00338 RBC (504, 337, 504, 337)",
        "BloodImage_00343 RBC (181, 329, 181, 329)",
    ]
    assert not {Kind.UNREADABLE, Kind.UNDECODABLE} & found.keys()
