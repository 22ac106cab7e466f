"""The operations, with torchvision's names and signatures. Importing this registers them as `torch.ops.fastdet.*`."""

from .box_iou import box_iou, complete_box_iou, distance_box_iou, generalized_box_iou
from .decode import Decoded, decode
from .match import Matches, match
from .nms import Kept, batched_nms, nms, nms_padded
from .roi_align import batched_roi_align, multiscale_roi_align, roi_align
from .roi_pool import batched_roi_pool, roi_pool
from .sample import Sampled, sample

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
    "match",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "roi_align",
    "roi_pool",
    "sample",
]
