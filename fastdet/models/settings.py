"""Every number of the detector in one frozen dataclass, under torchvision's keyword names where it has one."""

import difflib
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fastdet.models.anchors import AnchorGenerator


@dataclass(frozen=True)
class Settings:
    """The defaults are the VGG16 detector of Ren et al. 2015; `TORCHVISION` below is torchvision's.

    Sides and sizes are pixels of the resized image unless a comment says otherwise. Top n are counts per image, before
    suppression per image and feature level.
    """

    # Input. `min_size` may list several: training draws one a batch, evaluation takes the last.
    min_size: int | tuple[int, ...] = 600
    max_size: int = 1000
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    # "rgb" takes the image as it comes, 0..1; "bgr255" reverses the channels and multiplies by 255 before the mean.
    image_format: Literal["rgb", "bgr255"] = "rgb"
    # A batch is padded to multiples of this, or to the smallest bucket (height, width) that holds it.
    size_divisible: int = 1
    size_buckets: tuple[tuple[int, int], ...] = ()
    # Make what is found in an image independent of the images beside it in the batch: see `fastdet.padding`.
    mask_padding: bool = False
    # Background that a box to be ignored covers by at least this share is not trained on; None trains on it.
    ignore_iof_thresh: float | None = 0.5
    # Factors of the four losses, in the order of `fastdet.models.losses.NAMES`.
    loss_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    # Region proposal network.
    rpn_anchor_generator: AnchorGenerator = field(default_factory=lambda: AnchorGenerator(offset=8.0, rounded=False))
    # Two logits (background, object) or one (object).
    rpn_objectness: Literal["softmax", "sigmoid"] = "softmax"
    # None: as many as the features have.
    rpn_hidden_channels: int | None = 512
    # 3x3 convolutions before the two of 1x1.
    rpn_conv_depth: int = 1
    rpn_anchors_inside_only: bool = True
    rpn_pre_nms_top_n_train: int = 12000
    rpn_pre_nms_top_n_test: int = 6000
    rpn_post_nms_top_n_train: int = 2000
    rpn_post_nms_top_n_test: int = 300
    rpn_nms_thresh: float = 0.7
    rpn_fg_iou_thresh: float = 0.7
    rpn_bg_iou_thresh: float = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_score_thresh: float = 0.0
    # Proposals with a smaller side are dropped; in pixels of the original image if the next says so.
    rpn_min_size: float = 16.0
    rpn_min_size_in_original_pixels: bool = True
    rpn_min_size_before_top_n: bool = True
    rpn_smooth_l1_beta: float = 1 / 9

    # Boxes. dw and dh are clamped from above at this; None does not clamp.
    bbox_xform_clip: float | None = None
    bbox_reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)

    # Box head.
    box_pooling: Literal["max", "align"] = "max"
    box_pool_size: int = 7
    # RoI align's samples a bin and side; 0 takes as many as the bin has cells.
    box_sampling_ratio: int = 2
    # RoI align with corners between the centres of cells.
    box_aligned: bool = False
    # Which of the backbone's named levels are pooled; None pools all.
    box_featmap_names: tuple[str, ...] | None = None
    # The head is two hidden layers, or so many convolutions with BatchNorm and one hidden layer.
    box_num_convs: int = 0
    box_representation_size: int = 1024
    # Deviation of the weights that the layers of class scores and of boxes start from; None: as torch starts them.
    box_predictor_std: tuple[float, float] | None = (0.01, 0.001)
    box_fg_iou_thresh: float = 0.5
    box_bg_iou_thresh: float = 0.5
    # Background samples have at least this IoU with some ground truth (if the image has any).
    box_bg_iou_thresh_low: float = 0.1
    box_batch_size_per_image: int = 128
    box_positive_fraction: float = 0.25
    box_smooth_l1_beta: float = 1.0
    # Of the classifier's loss, one number a class, the background's first; None weighs all alike.
    class_weights: tuple[float, ...] | None = None
    box_score_thresh: float = 0.05
    box_nms_thresh: float = 0.3
    # None: no cap.
    box_detections_per_img: int | None = None
    box_min_size: float = 0.0

    def __post_init__(self) -> None:
        for name in _CHOICES:
            if getattr(self, name) not in _CHOICES[name]:
                raise ValueError(f"{name} must be one of {_CHOICES[name]}, got {getattr(self, name)!r}")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name == "ignore_iof_thresh" and value is None:
                continue
            if setting.name.endswith(("_thresh", "_thresh_low", "_fraction")):
                _require(setting.name, value, _is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
            elif setting.type is bool:
                _require(setting.name, value, isinstance(value, bool), "True or False")
            elif "_nms_top_n_" in setting.name or setting.name in _COUNTS:
                _require(setting.name, value, _is_count(value), "a positive whole number")
            elif setting.name in _OPTIONAL_COUNTS:
                _require(setting.name, value, value is None or _is_count(value), "a positive whole number or None")
            elif setting.name.endswith(("_beta", "_min_size")):
                _require(setting.name, value, _is_number(value) and value >= 0, "a number, at least 0")
        clip, names, buckets = self.bbox_xform_clip, self.box_featmap_names, self.size_buckets
        _require("bbox_xform_clip", clip, clip is None or (_is_number(clip) and clip > 0), "a positive number or None")
        weights = self.bbox_reg_weights
        _require("bbox_reg_weights", weights, _are_positive(weights, 4), "4 positive numbers")
        for name in ("box_sampling_ratio", "box_num_convs"):
            count = getattr(self, name)
            _require(name, count, count == 0 or _is_count(count), "a whole number, at least 0")
        _require("loss_weights", self.loss_weights, _are_weights(self.loss_weights, 4), "4 numbers, at least 0")
        deviation = self.box_predictor_std
        _require("box_predictor_std", deviation, deviation is None or _are_positive(deviation, 2), "2 numbers or None")
        balance = self.class_weights
        numbers = isinstance(balance, (tuple, list)) and _are_weights(balance, len(balance)) and any(balance)
        good = balance is None or numbers
        _require("class_weights", balance, good, "numbers, at least 0 and not all 0, or None")
        _require("box_featmap_names", names, names is None or _are(str, names), "names, or None")
        fit = isinstance(buckets, (tuple, list)) and all(_are(int, pair) and len(pair) == 2 for pair in buckets)
        _require("size_buckets", buckets, fit, "pairs of height and width")
        generator = self.rpn_anchor_generator
        _require("rpn_anchor_generator", generator, isinstance(generator, AnchorGenerator), "an AnchorGenerator")
        sizes = self.min_size if isinstance(self.min_size, (tuple, list)) else (self.min_size,)
        _require("min_size", self.min_size, bool(sizes) and all(map(_is_count, sizes)), "whole numbers above 0")
        _require("max_size", self.max_size, self.max_size >= max(sizes), f"at least min_size ({max(sizes)})")
        mean, std = self.image_mean, self.image_std
        numbers = isinstance(mean, (tuple, list)) and len(mean) > 0 and all(map(_is_number, mean))
        _require("image_mean", mean, numbers, "a number for each channel")
        _require("image_std", std, _are_positive(std, len(mean)), f"{len(mean)} positive numbers, as image_mean")
        for low, high in (
            ("rpn_bg_iou_thresh", "rpn_fg_iou_thresh"),
            ("box_bg_iou_thresh", "box_fg_iou_thresh"),
            ("box_bg_iou_thresh_low", "box_bg_iou_thresh"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low)}) must not be above {high} ({getattr(self, high)})")

    def check_classes(self, num_classes: int) -> None:
        """Raises ValueError if there are weights of another number of classes."""
        weights = self.class_weights
        if weights is not None and len(weights) != num_classes:
            raise ValueError(f"class_weights must hold {num_classes} numbers, the background's first, got {weights}")

    def override(self, **changes: Any) -> "Settings":
        """A copy with some fields changed. Raises TypeError for a name that is not a field, listing the near ones."""
        known = [setting.name for setting in fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
                hint = f"; near ones: {', '.join(near)}" if near else f"; there are: {', '.join(known)}"
                raise TypeError(f"unknown setting {name!r}{hint}")
        return replace(self, **changes)


# What a detector's layers are made for, and cannot be changed once it is built.
MADE_FOR = (
    "image_mean",
    "image_std",
    "mask_padding",
    "rpn_anchor_generator",
    "rpn_objectness",
    "rpn_hidden_channels",
    "rpn_conv_depth",
    "box_pool_size",
    "box_num_convs",
    "box_representation_size",
    "class_weights",
)

_CHOICES = {
    "image_format": ("rgb", "bgr255"),
    "rpn_objectness": ("softmax", "sigmoid"),
    "box_pooling": ("max", "align"),
}
_COUNTS = (
    "max_size",
    "size_divisible",
    "rpn_batch_size_per_image",
    "rpn_conv_depth",
    "box_pool_size",
    "box_representation_size",
    "box_batch_size_per_image",
)
_OPTIONAL_COUNTS = ("rpn_hidden_channels", "box_detections_per_img")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are(kind: type, values: object) -> bool:
    return isinstance(values, (tuple, list)) and all(isinstance(value, kind) for value in values)


def _are_positive(values: Any, count: int) -> bool:
    return _are_weights(values, count) and all(values)


def _are_weights(values: Any, count: int) -> bool:
    """So many numbers, none below 0."""
    if not isinstance(values, (tuple, list)) or len(values) != count:
        return False
    return all(_is_number(value) and value >= 0 for value in values)


def _require(name: str, value: object, good: bool, what: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {what}, got {value!r}")


def refuse(name: str, settings: dict[str, str]) -> None:
    """Raise AttributeError for an attribute to be set that is a setting: `settings` are their names by attribute."""
    if name in settings:
        setting = settings[name]
        raise AttributeError(
            f"{name} is the setting {setting}: model.settings = model.settings.override({setting}=...)"
        )


VGG16 = Settings()

# torchvision's, made for a feature pyramid over a ResNet.
TORCHVISION = Settings(
    min_size=800,
    max_size=1333,
    size_divisible=32,
    rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,))),
    rpn_objectness="sigmoid",
    rpn_hidden_channels=None,
    rpn_anchors_inside_only=False,
    rpn_pre_nms_top_n_train=2000,
    rpn_pre_nms_top_n_test=1000,
    rpn_post_nms_top_n_train=2000,
    rpn_post_nms_top_n_test=1000,
    rpn_min_size=1e-3,
    rpn_min_size_in_original_pixels=False,
    rpn_min_size_before_top_n=False,
    bbox_xform_clip=math.log(1000 / 16),
    box_pooling="align",
    box_featmap_names=("0", "1", "2", "3"),
    box_predictor_std=None,
    box_bg_iou_thresh_low=0.0,
    box_batch_size_per_image=512,
    box_smooth_l1_beta=1 / 9,
    box_nms_thresh=0.5,
    box_detections_per_img=100,
    box_min_size=0.01,
)

# The Faster R-CNN with a feature pyramid of detectron2's model zoo. Its images are BGR in 0..255.
DETECTRON2 = TORCHVISION.override(
    image_format="bgr255",
    image_mean=(103.53, 116.28, 123.675),
    image_std=(1.0, 1.0, 1.0),
    min_size=(640, 672, 704, 736, 768, 800),
    rpn_anchor_generator=replace(TORCHVISION.rpn_anchor_generator, rounded=False, strides=(4, 8, 16, 32, 64)),
    rpn_pre_nms_top_n_train=2000,
    rpn_pre_nms_top_n_test=1000,
    rpn_post_nms_top_n_train=1000,
    rpn_post_nms_top_n_test=1000,
    # It drops what has no area at all.
    rpn_min_size=1e-12,
    rpn_smooth_l1_beta=0.0,
    box_aligned=True,
    box_predictor_std=VGG16.box_predictor_std,
    box_sampling_ratio=0,
    box_smooth_l1_beta=0.0,
    box_min_size=0.0,
)
