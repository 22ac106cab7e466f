"""A detector as an .onnx file."""

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdet.export.pt2 import INPUTS, OUTPUTS, ExportError, trace_program
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.ops.decode import decode_planes
from fastdet.weights import files

OPSET = 18


def export_onnx(model: FasterRCNN, path: str | Path, *, height: int | None = None, width: int | None = None) -> None:
    """Write a detector in ONNX, opset 18, in operators of the standard alone, weights included.

    It was compared with the model in ONNX Runtime on the CPU. Where boxes are max-pooled (`box_pooling="max"`) the
    standard leaves open which cells belong to a bin of `MaxRoiPool`: compare, before you rely on another runtime.

    Args:
        model: on any device; it is left in the mode it was in.
        path: the file, by convention .onnx; its folder is created if it does not exist.
        height, width: as of `export_pt2`.

    Raises:
        ExportError: onnx or onnxscript is not installed; else, like TypeError and TensorFileError, as of `export_pt2`.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from fastdet.export import onnx_operators

    # An ONNX file belongs to no device.
    model = model if next(model.parameters()).device.type == "cpu" else copy.deepcopy(model).cpu()
    with warnings.catch_warnings():
        # The exporter of torch 2.11 calls a deprecated function of its own.
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        program = trace_program(model, height, width)
        program = program.run_decompositions({torch.ops.fastdet.decode.default: _decode})
        exported = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=onnx_operators.TABLE,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
            # Gives the dimension its name; the program has it as one and the same in all inputs.
            dynamic_shapes={name: {0: "batch"} if name == "images" else None for name in INPUTS},
            external_data=False,
            verbose=False,
        )
    assert exported is not None
    content = exported.model_proto.SerializeToString()
    files.write(path, lambda file: file.write(content), kind="exported model")


def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    """`torch.ops.fastdet.decode` in operators that torch can translate."""
    corners, score = decode_planes(*args)
    boxes = torch.stack(corners, dim=-1).permute(0, 2, 3, 1, 4)
    return boxes.flatten(1, 3), score.permute(0, 2, 3, 1).flatten(1)
