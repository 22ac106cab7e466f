"""A detector as one file that needs no Python of its own: for `torch.export`, or in ONNX.

The file holds the whole detector in evaluation mode, from pixels to suppressed boxes, for any number of images of one
fixed size. Inputs, in this order:

    images  fp32 [B, C, H, W], in 0..1 (no uint8, which nothing divides by 255): resized already, each in the upper
            left corner. It is normalised inside; what lies beyond its size is disregarded.
    sizes   int64 [B, 2], (height, width) of each image inside H x W.
    scales  fp32 [B], by how much each was resized, 1 if it was not. It matters where the setting
            `rpn_min_size_in_original_pixels` is on.

Outputs, with D rows for each image, as many as it can have at most, best first:

    boxes   fp32 [B, D, 4], x1, y1, x2, y2 in pixels of `images`; zeros from row `count` on.
    scores  fp32 [B, D], likewise.
    labels  int64 [B, D], from 1, likewise.
    count   int64 [B], how many rows are detections.

D is `box_detections_per_img`, or without that cap the proposals times the classes.

A .pt2 file calls fastdet's operators, which are those of the CPU or the GPU alike: `import fastdet` comes before
`torch.export.load(path).module()`, or torch does not know them. An .onnx file has the standard's operators alone.
"""

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdet.models import preprocessing
from fastdet.models.anchors import Size
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.preserve import preserve_mode
from fastdet.models.settings import Settings
from fastdet.ops.decode import decoded_planes
from fastdet.weights import files

INPUTS = ("images", "sizes", "scales")
OUTPUTS = ("boxes", "scores", "labels", "count")
OPSET = 18


class ExportError(ValueError):
    """A detector cannot be exported; the message is one line."""


def export_pt2(model: FasterRCNN, path: str | Path, *, height: int | None = None, width: int | None = None) -> None:
    """Write a detector for `torch.export.load`, which needs `import fastdet` before it.

    Args:
        model: on the device that the file is to run on; it is left in the mode it was in.
        path: the file, by custom .pt2; its folder is made if it is not there.
        height, width: of the images that it takes, in pixels; None: as `input_size` has it.

    Raises:
        ExportError: a size that does not fit the model.
        TypeError: the model is not in fp32.
        TensorFileError: the file cannot be written.
    """
    program = _program(model, input_size(model.settings, height, width))
    with warnings.catch_warnings():
        # Said of every channels-last weight, which torch takes for a part of something larger; it is saved whole.
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        files.write(path, lambda file: torch.export.save(program, file), kind="exported model")


def export_onnx(model: FasterRCNN, path: str | Path, *, height: int | None = None, width: int | None = None) -> None:
    """Write a detector in ONNX, opset 18, in operators of the standard alone, weights included.

    It was compared with the model in ONNX Runtime on the CPU. Where boxes are max-pooled (`box_pooling="max"`) the
    standard leaves open which cells a bin of `MaxRoiPool` has: compare, before you trust another runtime.

    Args:
        model: it is left in the mode it was in.
        path: the file, by custom .onnx; its folder is made if it is not there.
        height, width: of the images that it takes, in pixels; None: as `input_size` has it.

    Raises:
        ExportError: onnx or onnxscript is not installed; a size that does not fit the model.
        TypeError: the model is not in fp32.
        TensorFileError: the file cannot be written.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {' and '.join(missing)}: pip install 'fastdet[onnx]'")
    from fastdet.export import onnx_operators

    # The file belongs to no device.
    model = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
    with warnings.catch_warnings():
        # Of torch 2.11's exporter to itself.
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        program = _program(model, input_size(model.settings, height, width))
        program = program.run_decompositions({torch.ops.fastdet.decode.default: _plain_decode})
        exported = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=onnx_operators.TABLE,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
            # Names the dimension; that it is the same in all of them, the program knows.
            dynamic_shapes={name: {0: "batch"} if name == "images" else None for name in INPUTS},
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    content = exported.model_proto.SerializeToString()
    files.write(path, lambda file: file.write(content), kind="exported model")


def input_size(settings: Settings, height: int | None = None, width: int | None = None) -> Size:
    """(height, width) of the images that an exported detector takes.

    By default what an image in landscape is resized and padded to at most: `min_size` x `max_size`, rounded up to
    `size_divisible` or to the smallest of `size_buckets` that holds it.

    Raises:
        ExportError: a side that is not positive or no multiple of `size_divisible`, or no bucket that fits.
    """
    smallest = settings.min_size if isinstance(settings.min_size, int) else settings.min_size[-1]
    try:
        usual = preprocessing.padded_size(
            [(smallest, settings.max_size)], settings.size_divisible, settings.size_buckets
        )
    except ValueError as error:
        if height is None or width is None:
            raise ExportError(f"{error}: give height and width") from None
        usual = height, width
    size = usual[0] if height is None else height, usual[1] if width is None else width
    for name, side in zip(("height", "width"), size, strict=True):
        if not isinstance(side, int) or side < 1 or side % settings.size_divisible:
            raise ExportError(f"{name} must be a positive multiple of {settings.size_divisible}, got {side}")
    return size


class _Exported(nn.Module):
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


def _program(model: FasterRCNN, size: Size) -> Any:
    """The `torch.export.ExportedProgram` of a detector for images of `size`, any number of them."""
    parameter, channels = next(model.parameters()), len(model.settings.image_mean)
    device = parameter.device
    if parameter.dtype != torch.float32:
        raise TypeError(f"the model must be in float32, got {parameter.dtype}")
    # Of one image torch.export would make a constant.
    images = torch.zeros(2, channels, *size, device=device)
    sizes = torch.tensor([size, size], device=device)
    scales = torch.ones(2, device=device)
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch} for name in INPUTS}
    # Casts of a caller's autocast would become part of it.
    with preserve_mode(model, training=False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        return torch.export.export(
            _Exported(model).eval(), (images, sizes, scales), dynamic_shapes=shapes, strict=False
        )


def _plain_decode(*args: Any) -> tuple[Tensor, Tensor]:
    """`torch.ops.fastdet.decode` in operators that torch can translate."""
    corners, score = decoded_planes(*args)
    boxes = torch.stack(corners, dim=-1).permute(0, 2, 3, 1, 4)
    return boxes.flatten(1, 3), score.permute(0, 2, 3, 1).flatten(1)
