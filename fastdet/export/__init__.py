"""A detector as one file that needs no Python of its own."""

from fastdet.export.detector import INPUTS, OPSET, OUTPUTS, ExportError, export_onnx, export_pt2, input_size

__all__ = ["INPUTS", "OPSET", "OUTPUTS", "ExportError", "export_onnx", "export_pt2", "input_size"]
