"""Every hyperparameter of the detector in one frozen dataclass, under torchvision's keyword names where it has one."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fastdet.models.anchors import MAX_SIDE, AnchorGenerator
from fastdet.weights.names import DETECTRON2_PIXEL_MEAN, DETECTRON2_PIXEL_STD


@dataclass(frozen=True)
class Settings:
    """The defaults are the VGG16 detector of Ren et al. 2015; `TORCHVISION` below is torchvision's.

    Sides and sizes are pixels of the resized image except where a comment gives another unit. Top n are counts per
    image, before suppression per image and feature level.
    """

    # Input. `min_size` may list several: training draws one a batch, evaluation takes the last.
    min_size: int | tuple[int, ...] = 600
    max_size: int = 1000
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    # "rgb" takes the image as it comes, 0..1; "bgr255" reverses the channels and multiplies by 255 before the mean.
    image_format: Literal["rgb", "bgr255"] = "rgb"
    # A batch is padded to multiples of this, or to the smallest bucket (height, width) that holds it. With one bucket
    # each image is always padded alike, so that its detections do not depend on the images beside it.
    size_divisible: int = 1
    size_buckets: tuple[tuple[int, int], ...] = ()
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
    # Proposals with a smaller side are dropped; in pixels of the original image if the next is True.
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
    # RoI align with corners between the centers of cells.
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
        for setting in fields(self):
            accepts, wanted = _RULES[setting.name]
            value = _to_tuples(getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)
            if not accepts(value):
                raise ValueError(f"{setting.name} must be {wanted}, got {value!r:.200}")
        smallest = max(self.min_sizes)
        if self.max_size < smallest:
            raise ValueError(f"max_size must be at least min_size ({smallest}), got {self.max_size!r}")
        if len(self.image_std) != len(self.image_mean):
            raise ValueError(f"image_std must hold {len(self.image_mean)} numbers, as image_mean, got {self.image_std}")
        for low, high in (
            ("rpn_bg_iou_thresh", "rpn_fg_iou_thresh"),
            ("box_bg_iou_thresh", "box_fg_iou_thresh"),
            ("box_bg_iou_thresh_low", "box_bg_iou_thresh"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} ({getattr(self, low)}) must not be above {high} ({getattr(self, high)})")

    @property
    def min_sizes(self) -> tuple[int, ...]:
        """`min_size`, one or several, as a tuple."""
        return (self.min_size,) if isinstance(self.min_size, int) else self.min_size

    def check_classes(self, num_classes: int) -> None:
        """Raises ValueError if there are weights of another number of classes."""
        weights = self.class_weights
        if weights is not None and len(weights) != num_classes:
            raise ValueError(f"class_weights must hold {num_classes} numbers, the background's first, got {weights}")

    def override(self, **changes: Any) -> "Settings":
        """A copy with some fields changed. Raises TypeError for a name that is not a field, listing similar names."""
        known = [setting.name for setting in fields(self)]
        for name in changes:
            if name not in known:
                similar = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
                hint = f"; similar: {', '.join(similar)}" if similar else f"; there are: {', '.join(known)}"
                raise TypeError(f"unknown setting {name!r}{hint}")
        return replace(self, **changes)


# Fields that decide layers and buffers, and cannot be changed once the detector is built.
FIXED_FIELDS = (
    *("image_mean", "image_std", "rpn_anchor_generator", "rpn_objectness", "rpn_hidden_channels", "rpn_conv_depth"),
    *("box_pool_size", "box_num_convs", "box_representation_size", "class_weights"),
)


def _to_tuples(value: Any) -> Any:
    """Lists become tuples, so that settings can be compared and hashed."""
    return tuple(map(_to_tuples, value)) if isinstance(value, (tuple, list)) else value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38


def _is_count(value: object, most: int = 2**31 - 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _is_side(value: object) -> bool:
    return _is_count(value, MAX_SIDE)


def _is_sequence_of(accepts: Callable[[Any], bool], value: Any, length: int | None = None) -> bool:
    """A tuple, not empty, of `length` items if that is given."""
    if not isinstance(value, tuple) or not value or (length is not None and len(value) != length):
        return False
    return all(map(accepts, value))


def _is_weight(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _rule(names: str, accepts: Callable[[Any], bool], wanted: str) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """Of each of the fields `names`, apart by spaces, what it accepts, in code and in words."""
    return dict.fromkeys(names.split(), (accepts, wanted))


def _choice(name: str, *choices: str) -> dict[str, tuple[Callable[[Any], bool], str]]:
    return _rule(name, lambda value: value in choices, f"one of {choices}")


# Every field has a rule: one that is left out fails at once, in `Settings()`.
_RULES = {
    **_choice("image_format", "rgb", "bgr255"),
    **_choice("rpn_objectness", "softmax", "sigmoid"),
    **_choice("box_pooling", "max", "align"),
    **_rule(
        "rpn_nms_thresh rpn_fg_iou_thresh rpn_bg_iou_thresh rpn_score_thresh rpn_positive_fraction box_fg_iou_thresh "
        "box_bg_iou_thresh box_bg_iou_thresh_low box_positive_fraction box_score_thresh box_nms_thresh",
        _is_share,
        "a number in [0, 1]",
    ),
    **_rule("ignore_iof_thresh", lambda value: value is None or _is_share(value), "a number in [0, 1] or None"),
    **_rule(
        "rpn_anchors_inside_only rpn_min_size_in_original_pixels rpn_min_size_before_top_n box_aligned",
        lambda value: isinstance(value, bool),
        "True or False",
    ),
    **_rule(
        "rpn_pre_nms_top_n_train rpn_pre_nms_top_n_test rpn_post_nms_top_n_train rpn_post_nms_top_n_test "
        "box_representation_size",
        _is_count,
        "a positive whole number of 32 bits",
    ),
    # Larger ones are a mistake, or a file that is to take all memory.
    **_rule("max_size size_divisible", _is_side, f"a whole number in 1..{MAX_SIDE}"),
    **_rule("rpn_batch_size_per_image box_batch_size_per_image", lambda x: _is_count(x, 1 << 20), "in 1..2**20"),
    **_rule("rpn_conv_depth box_pool_size", lambda value: _is_count(value, 64), "a whole number in 1..64"),
    **_rule(
        "rpn_hidden_channels box_detections_per_img",
        lambda value: value is None or _is_count(value),
        "a positive whole number or None",
    ),
    **_rule("box_sampling_ratio box_num_convs", lambda x: type(x) is int and 0 <= x <= 64, "a whole number in 0..64"),
    **_rule("rpn_smooth_l1_beta box_smooth_l1_beta rpn_min_size box_min_size", _is_weight, "finite, at least 0"),
    **_rule("bbox_xform_clip", lambda value: value is None or _is_positive(value), "a positive number or None"),
    **_rule("bbox_reg_weights", lambda value: _is_sequence_of(_is_positive, value, 4), "4 positive numbers"),
    **_rule("loss_weights", lambda value: _is_sequence_of(_is_weight, value, 4), "4 numbers, at least 0"),
    **_rule(
        "box_predictor_std",
        lambda value: value is None or _is_sequence_of(_is_positive, value, 2),
        "2 positive numbers or None",
    ),
    **_rule(
        "class_weights",
        lambda value: value is None or (_is_sequence_of(_is_weight, value) and any(value)),
        "numbers, at least 0 and not all 0, or None",
    ),
    **_rule(
        "box_featmap_names",
        lambda value: value is None or _is_sequence_of(lambda name: isinstance(name, str), value),
        "names, or None",
    ),
    **_rule(
        "size_buckets",
        lambda value: value == () or _is_sequence_of(lambda pair: _is_sequence_of(_is_side, pair, 2), value),
        f"pairs of height and width in 1..{MAX_SIDE}",
    ),
    **_rule("rpn_anchor_generator", lambda value: isinstance(value, AnchorGenerator), "an AnchorGenerator"),
    **_rule("min_size", lambda value: _is_side(value) or _is_sequence_of(_is_side, value), f"in 1..{MAX_SIDE}"),
    **_rule("image_mean", lambda x: _is_sequence_of(_is_number, x) and len(x) <= 1024, "a number for each channel"),
    **_rule("image_std", lambda x: _is_sequence_of(_is_positive, x), "a positive number for each channel"),
}


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
    image_mean=DETECTRON2_PIXEL_MEAN,
    image_std=DETECTRON2_PIXEL_STD,
    min_size=(640, 672, 704, 736, 768, 800),
    rpn_anchor_generator=replace(TORCHVISION.rpn_anchor_generator, rounded=False, strides=(4, 8, 16, 32, 64)),
    rpn_post_nms_top_n_train=1000,
    # It drops what has no area at all.
    rpn_min_size=1e-12,
    rpn_smooth_l1_beta=0.0,
    box_aligned=True,
    box_predictor_std=VGG16.box_predictor_std,
    box_sampling_ratio=0,
    box_smooth_l1_beta=0.0,
    box_min_size=0.0,
)
