"""A detector as one file that needs no Python code of its own: for `torch.export`, or in ONNX.

The file holds the whole detector in evaluation mode, from pixels to suppressed boxes, for any number of images of one
fixed size. Inputs, in this order:

    images  fp32 [B, C, H, W], in 0..1 (not uint8, which is not divided by 255): resized already, each in the upper
            left corner. It is normalized inside; pixels beyond its size are ignored.
    sizes   int64 [B, 2], (height, width) of each image inside H x W.
    scales  fp32 [B], the resize factor of each image, 1 if it was not resized. Only the setting
            `rpn_min_size_in_original_pixels` makes use of it.

Outputs, with D rows for each image, as many as it can have at most, best first:

    boxes   fp32 [B, D, 4], x1, y1, x2, y2 in pixels of `images`; zeros from row `count` on.
    scores  fp32 [B, D], likewise.
    labels  int64 [B, D], from 1, likewise.
    count   int64 [B], how many rows are detections.

D is `box_detections_per_img`, or without that cap the proposals times the classes.

A .pt2 file calls fastdet's operators, the same ones on the CPU and the GPU: `import fastdet` comes before
`torch.export.load(path).module()`, to register them. An .onnx file has operators of the standard alone.
"""

from fastdet.export.onnx import OPSET, export_onnx
from fastdet.export.pt2 import INPUTS, OUTPUTS, ExportError, export_pt2, input_size

__all__ = ["INPUTS", "OPSET", "OUTPUTS", "ExportError", "export_onnx", "export_pt2", "input_size"]
