"""The `torch.export` program of a detector, its .pt2 file, and the size of its images."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdet.models import preprocessing
from fastdet.models.anchors import Size
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.fuse import fuse
from fastdet.models.settings import Settings
from fastdet.weights import files

INPUTS = ("images", "sizes", "scales")
OUTPUTS = ("boxes", "scores", "labels", "count")


class ExportError(ValueError):
    """A detector cannot be exported; the message is one line."""


def export_pt2(model: FasterRCNN, path: str | Path, *, height: int | None = None, width: int | None = None) -> None:
    """Write a detector for `torch.export.load`, which needs `import fastdet` before it.

    Args:
        model: on the device that the file is to run on; it is left in the mode it was in.
        path: the file, by convention .pt2; its folder is created if it does not exist.
        height, width: of the images that it takes, in pixels; None: the default of `input_size`.

    Raises:
        ExportError: a size that does not fit the model.
        TypeError: the model is not in fp32.
        TensorFileError: the file cannot be written.
    """
    program = trace_program(model, height, width)
    with warnings.catch_warnings():
        # torch takes every channels-last weight for a part of something larger; it is saved whole.
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        files.write(path, lambda file: torch.export.save(program, file), kind="exported model")


def input_size(settings: Settings, height: int | None = None, width: int | None = None) -> Size:
    """(height, width), in pixels, of the images that an exported detector takes.

    By default the largest size to which a landscape image is resized and padded: `min_size` x `max_size`, rounded up to
    `size_divisible` or to the smallest of `size_buckets` that holds it.

    Raises:
        ExportError: a side that is not positive, or without buckets no multiple of `size_divisible`; no fitting bucket.
    """
    try:
        largest = settings.min_sizes[-1], settings.max_size
        default = preprocessing.padded_size([largest], settings.size_divisible, settings.size_buckets)
    except ValueError as error:
        if height is None or width is None:
            raise ExportError(f"{error}: give height and width") from None
        default = height, width
    size = default[0] if height is None else height, default[1] if width is None else width
    divisor = preprocessing.side_divisor(settings)
    for name, side in zip(("height", "width"), size, strict=True):
        if not isinstance(side, int) or side < 1 or side % divisor:
            raise ExportError(f"{name} must be a positive multiple of {divisor}, got {side}")
    return size


class _TensorDetector(nn.Module):
    """A detector on tensors alone. Its outputs are a plain tuple: named ones do not survive `torch.export.save`."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model = self.model
        inside = preprocessing.padding_mask(sizes, (images.shape[-2], images.shape[-1]))
        pixels = torch.where(inside[:, None], model.normalize(images), 0.0)
        _, found = model.forward_padded(pixels, sizes, None, scales, compute_losses=False, compute_detections=True)
        assert found is not None
        return found.boxes, found.scores, found.labels, found.count


def trace_program(model: FasterRCNN, height: int | None, width: int | None) -> Any:
    """The `torch.export.ExportedProgram` of a detector for any number of images of `input_size`.

    Raises:
        ExportError: a size that does not fit the model.
        TypeError: the model is not in fp32.
    """
    size = input_size(model.settings, height, width)
    parameter, channels = next(model.parameters()), len(model.settings.image_mean)
    device = parameter.device
    if parameter.dtype != torch.float32:
        raise TypeError(f"the model must be in float32, got {parameter.dtype}")
    # Two images: torch.export specializes a batch of one.
    images, scales = torch.zeros(2, channels, *size, device=device), torch.ones(2, device=device)
    sizes = torch.tensor([size, size], device=device)
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch} for name in INPUTS}
    # Casts of a caller's autocast would become part of the program.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        detector = _TensorDetector(fuse(model)).eval()
        return torch.export.export(detector, (images, sizes, scales), dynamic_shapes=shapes, strict=False)
