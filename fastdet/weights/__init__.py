"""Weights in files and of other libraries, in and out."""

from fastdet.weights.convert import (
    SIMPLE_FASTER_RCNN_CAFFE_INPUT,
    SIMPLE_FASTER_RCNN_TORCH_INPUT,
    WeightsError,
    fit,
    from_detectron2,
    from_simple_faster_rcnn,
    load,
    prefix_errors,
    to_detectron2,
    to_simple_faster_rcnn,
)
from fastdet.weights.files import TensorFileError, read_state_dict, write_state_dict

__all__ = [
    "SIMPLE_FASTER_RCNN_CAFFE_INPUT",
    "SIMPLE_FASTER_RCNN_TORCH_INPUT",
    "TensorFileError",
    "WeightsError",
    "fit",
    "from_detectron2",
    "from_simple_faster_rcnn",
    "load",
    "prefix_errors",
    "read_state_dict",
    "to_detectron2",
    "to_simple_faster_rcnn",
    "write_state_dict",
]
