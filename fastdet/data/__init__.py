"""Datasets: Pascal VOC folders and pictures drawn on the fly."""

from fastdet.data.images import DataError, read_image
from fastdet.data.shapes import Shapes
from fastdet.data.transforms import Item, Target, collate, flip_horizontal
from fastdet.data.voc import VOC

__all__ = ["VOC", "DataError", "Item", "Shapes", "Target", "collate", "flip_horizontal", "read_image"]
