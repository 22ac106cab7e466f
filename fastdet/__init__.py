"""fastdet: the two-stage object detector as batched, fixed-shape tensor operations with Triton kernels."""

from fastdet import data, export, graphs, ops, weights
from fastdet.engine import TrainSettings, train
from fastdet.interop.accelerate import accelerate
from fastdet.models.anchors import AnchorGenerator
from fastdet.models.builders import (
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_detectron2,
    fasterrcnn_resnet50_fpn_v2,
    fasterrcnn_vgg16,
)
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.fuse import fuse
from fastdet.models.settings import DETECTRON2, TORCHVISION, VGG16, Settings
from fastdet.structures import Detections, Proposals, Samples, Targets
from fastdet.version import VERSION as __version__

__all__ = [
    "DETECTRON2",
    "TORCHVISION",
    "VGG16",
    "AnchorGenerator",
    "Detections",
    "FasterRCNN",
    "Proposals",
    "Samples",
    "Settings",
    "Targets",
    "TrainSettings",
    "__version__",
    "accelerate",
    "data",
    "export",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_detectron2",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_vgg16",
    "fuse",
    "graphs",
    "ops",
    "train",
    "weights",
]
