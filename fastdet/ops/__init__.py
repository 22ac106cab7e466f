"""The operations, with torchvision's names and signatures. Importing this registers them as `torch.ops.fastdet.*`."""

from fastdet.ops._checks import is_recorded
from fastdet.ops.box_iou import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou
from fastdet.ops.decode import Decoded, decode
from fastdet.ops.match import Matches, match
from fastdet.ops.nms import Kept, batched_nms, nms, nms_padded
from fastdet.ops.roi_align import batched_roi_align, multiscale_roi_align, roi_align
from fastdet.ops.roi_pool import batched_roi_pool, roi_pool
from fastdet.ops.sample import Sampled, sample

__all__ = [
    "Decoded",
    "Kept",
    "Matches",
    "Sampled",
    "batched_nms",
    "batched_roi_align",
    "batched_roi_pool",
    "box_iou",
    "complete_box_iou",
    "decode",
    "distance_box_iou",
    "generalized_box_iou",
    "is_recorded",
    "match",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "roi_align",
    "roi_pool",
    "sample",
]
