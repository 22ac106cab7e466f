"""Data sets: folders in the VOC layout, files in COCO's format, and pictures drawn on the fly."""

from fastdet.data.coco import COCO
from fastdet.data.images import DataError, read_image
from fastdet.data.shapes import Shapes
from fastdet.data.transforms import Item, Target, collate, flip_horizontal
from fastdet.data.voc import VOC

__all__ = ["COCO", "VOC", "DataError", "Item", "Shapes", "Target", "collate", "flip_horizontal", "read_image"]
