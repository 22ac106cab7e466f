"""Data sets: VOC's, COCO's and YOLO's formats, pictures drawn on the fly, and several of them joined."""

from fastdet.data.formats.coco import COCO
from fastdet.data.formats.voc import VOC
from fastdet.data.formats.yolo import YOLO
from fastdet.data.images import DataError, read_image
from fastdet.data.joined import DetectionDataset, JoinedImages
from fastdet.data.shapes import Shapes
from fastdet.data.transforms import Item, Target, collate

__all__ = [
    "COCO",
    "VOC",
    "YOLO",
    "DataError",
    "DetectionDataset",
    "Item",
    "JoinedImages",
    "Shapes",
    "Target",
    "collate",
    "read_image",
]
