"""Average precision, as Pascal VOC and as COCO define it."""

from fastdet.metrics.coco import COCOResult, coco_average_precision, require_pycocotools
from fastdet.metrics.voc import VOCResult, voc_average_precision

__all__ = ["COCOResult", "VOCResult", "coco_average_precision", "require_pycocotools", "voc_average_precision"]
