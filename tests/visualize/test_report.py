import json

import pytest
import torch
from PIL import Image

from fastdet.visualize import write_report


def prediction(score: float) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.ones(1).long(), "scores": torch.tensor([score])}


def report(out, scores: list[float], value: float = 0.25, **options) -> Image.Image:
    dataset = [(torch.ones(3, 32, 32) * value, {}) for _ in scores]
    summary = {"AP": 0.25, "classes": {"cat": {"AP": 0.25}}}
    predictions = [prediction(score) for score in scores]
    write_report(out, summary, predictions, ["cat"], dataset, metadata={"data": "gray"}, **options)
    with Image.open(out / "detections.png") as image:
        return image.copy()


def test_a_report_holds_metadata_metrics_and_images(tmp_path):
    report(tmp_path / "new" / "folder", [0.9] * 8)
    result = json.loads((tmp_path / "new" / "folder" / "result.json").read_text())
    assert list(result) == ["data", "images", "AP", "classes"]
    assert (result["images"], result["classes"]) == (8, {"cat": {"AP": 0.25}})


@pytest.mark.parametrize(("count", "limit", "columns", "rows"), [(2, 6, 2, 1), (8, 6, 3, 2), (8, 1, 1, 1)])
def test_the_first_images_are_drawn_and_small_ones_enlarged(tmp_path, count, limit, columns, rows):
    image = report(tmp_path, [0.9] * count, max_images=limit)
    assert image.size == (columns * 325 + 5, rows * 325 + 5)


def test_detections_below_the_threshold_are_not_drawn(tmp_path):
    blank = report(tmp_path, [0.4])
    assert blank.crop((5, 5, 325, 325)).getcolors() == [(320 * 320, (64, 64, 64))]
    assert len(report(tmp_path, [0.4], score_threshold=0.3).crop((5, 5, 325, 325)).getcolors()) > 1


def test_images_of_bytes_are_drawn_alike(tmp_path):
    dataset = [(torch.full((3, 32, 32), 64, dtype=torch.uint8), {})]
    write_report(tmp_path / "bytes", {}, [prediction(0.9)], ["cat"], dataset, metadata={})
    floats = report(tmp_path / "floats", [0.9], 64 / 255)
    with Image.open(tmp_path / "bytes/detections.png") as image:
        assert image.tobytes() == floats.tobytes()
