"""Running of exported models, and the comparison of their detections with the eager model's."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdet
from fastdet import export
from fastdet.models.preprocessing import resize_factors, resized_size

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ABSENT = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
FORMATS = [".pt2", pytest.param(".onnx", marks=needs_onnx)]

Run = Callable[..., tuple[Tensor, ...]]


def laid_out(images: list[Tensor], model: fastdet.FasterRCNN) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of an exported model: resized images on one canvas, their sizes and scales."""
    settings = model.settings
    # What lies beyond an image must not matter.
    canvas = torch.full((len(images), 3, *settings.size_buckets[0]), 0.7)
    sizes, scales = [], []
    for k, image in enumerate(images):
        size, scale = resized_size((image.shape[1], image.shape[2]), settings.min_size, settings.max_size)
        if size != tuple(image.shape[1:]):
            image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        canvas[k, :, : size[0], : size[1]] = image
        sizes.append(size)
        scales.append(scale)
    return canvas, torch.tensor(sizes), torch.tensor(scales)


def loaded(path: Path) -> Run:
    """An exported model as a function of tensors."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = {name: value.numpy() for name, value in zip(export.INPUTS, inputs, strict=True)}
        return tuple(map(torch.from_numpy, session.run(list(export.OUTPUTS), given)))

    return run


def write(model: fastdet.FasterRCNN, path: Path) -> None:
    (export.export_pt2 if path.suffix == ".pt2" else export.export_onnx)(model, path)


def assert_same(
    found: tuple[Tensor, ...], eager: list[dict[str, Tensor]], images: list[Tensor], sizes: Tensor
) -> list[int]:
    """The detections are the eager model's and the rest is zeros; returns the counts."""
    boxes, scores, labels, count = found
    assert [value.dtype for value in found] == [torch.float32, torch.float32, torch.int64, torch.int64]
    assert count.tolist() == [len(image["scores"]) for image in eager]
    factors = resize_factors([(image.shape[1], image.shape[2]) for image in images], sizes)
    for k, detections in enumerate(eager):
        kept = int(count[k])
        torch.testing.assert_close(boxes[k, :kept], detections["boxes"] * factors[k], rtol=0, atol=1e-2)
        torch.testing.assert_close(scores[k, :kept], detections["scores"], rtol=0, atol=1e-4)
        assert torch.equal(labels[k, :kept], detections["labels"])
        assert not boxes[k, kept:].any()
        assert not scores[k, kept:].any()
        assert not labels[k, kept:].any()
    return count.tolist()
