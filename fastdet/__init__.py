"""fastdet: the two-stage object detector as batched, fixed-shape tensor operations with Triton kernels."""

from . import data, ops
from .anchors import AnchorGenerator
from .config import TORCHVISION, VGG16, Settings
from .faster_rcnn import FasterRCNN, fasterrcnn_vgg16
from .structures import Detections, Proposals, Samples, Targets

__all__ = [
    "TORCHVISION",
    "VGG16",
    "AnchorGenerator",
    "Detections",
    "FasterRCNN",
    "Proposals",
    "Samples",
    "Settings",
    "Targets",
    "data",
    "fasterrcnn_vgg16",
    "ops",
]
