"""Detectors by name. Those of torchvision have its builders' signatures, and give its results with its weights."""

import os
from collections.abc import Mapping
from typing import Any

import torchvision
from torch import Tensor
from torchvision.models import WeightsEnum
from torchvision.models.detection import (
    FasterRCNN_MobileNet_V3_Large_320_FPN_Weights,
    FasterRCNN_MobileNet_V3_Large_FPN_Weights,
    FasterRCNN_ResNet50_FPN_V2_Weights,
    FasterRCNN_ResNet50_FPN_Weights,
)

from fastdet import weights as weight_files
from fastdet.interop.torchvision_objects import Weights, read_weights
from fastdet.models import backbones
from fastdet.models.backbones import NAMED
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.layers import FrozenBatchNorm2d
from fastdet.models.settings import DETECTRON2

# Also in detectron2, where the background is the last row.
_CLASS_SCORES = "roi_heads.box_predictor.cls_score.weight"
_COCO_CLASSES = 91


def fasterrcnn_vgg16(
    num_classes: int | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
    progress: bool = True,
    weights_backbone: Weights | None = None,
    trainable_backbone_layers: int | None = None,
    replace_predictor: bool = False,
    **overrides: Any,
) -> FasterRCNN:
    """The VGG16 detector of Ren et al. 2015: stride 16, RoI max-pooling, fc6 and fc7 from the classifier.

    Args:
        num_classes: with the background; None takes those of `weights`, or the 21 of PASCAL VOC.
        weights: a file with a state dict of this detector. The backbone's are not asked for then.
        progress: show the download of named weights.
        weights_backbone: torchvision's VGG16 weights, e.g. "IMAGENET1K_V1", or a file.
        trainable_backbone_layers: of the five blocks of convolutions, how many of the last train; 3 with pretrained
            weights (conv1 and conv2 frozen), else all.
        replace_predictor: load `weights` of another number of classes, all but the predictor.
        overrides: fields of `Settings`, and the modules that `FasterRCNN` takes.

    Raises:
        ValueError: a file that cannot be read, or whose names or shapes do not fit.
    """
    arguments = weights, progress, num_classes, weights_backbone, trainable_backbone_layers, replace_predictor
    return _build("vgg16", None, *arguments, default_classes=21, **overrides)[0]


def fasterrcnn_resnet50_fpn(
    *,
    weights: Weights | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: Weights | None = torchvision.models.ResNet50_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    replace_predictor: bool = False,
    **overrides: Any,
) -> FasterRCNN:
    """torchvision's detector of this name: ResNet-50 with a feature pyramid (Lin et al. 2017, arXiv:1612.03144).

    Args:
        weights: of the whole detector: "COCO_V1" (or torchvision's enum), which is fetched, or a file. The backbone's
            are not asked for then.
        progress: show the download.
        num_classes: with the background; None takes those of `weights`, or COCO's 91.
        weights_backbone: of the classifier: "IMAGENET1K_V1", an enum, a file, or None.
        trainable_backbone_layers: how many of the backbone's last blocks train; 3 with weights, else all.
        replace_predictor: load `weights` of another number of classes, all but the predictor.
        overrides: fields of `Settings`, and the modules that `FasterRCNN` takes.

    Raises:
        ValueError: a file that cannot be read, or whose names or shapes do not fit; another number of classes than
            `weights` has.
    """
    arguments = weights, progress, num_classes, weights_backbone, trainable_backbone_layers, replace_predictor
    model, member = _build("resnet50_fpn", FasterRCNN_ResNet50_FPN_Weights, *arguments, **overrides)
    if member is FasterRCNN_ResNet50_FPN_Weights.COCO_V1:
        # These were trained with an eps of 0.
        for layer in model.modules():
            if isinstance(layer, FrozenBatchNorm2d):
                layer.eps = 0.0
    return model


def fasterrcnn_resnet50_fpn_v2(
    *,
    weights: Weights | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: Weights | None = None,
    trainable_backbone_layers: int | None = None,
    replace_predictor: bool = False,
    **overrides: Any,
) -> FasterRCNN:
    """torchvision's detector of this name, after Li et al. 2021 (arXiv:2111.11429): BatchNorm that trains, two
    convolutions in the RPN and four in the box head. Arguments as of `fasterrcnn_resnet50_fpn`."""
    arguments = weights, progress, num_classes, weights_backbone, trainable_backbone_layers, replace_predictor
    return _build("resnet50_fpn_v2", FasterRCNN_ResNet50_FPN_V2_Weights, *arguments, **overrides)[0]


def fasterrcnn_mobilenet_v3_large_fpn(
    *,
    weights: Weights | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: Weights | None = torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    replace_predictor: bool = False,
    **overrides: Any,
) -> FasterRCNN:
    """torchvision's detector of this name, on MobileNetV3. Arguments as of `fasterrcnn_resnet50_fpn`."""
    arguments = weights, progress, num_classes, weights_backbone, trainable_backbone_layers, replace_predictor
    return _build("mobilenet_v3_large_fpn", FasterRCNN_MobileNet_V3_Large_FPN_Weights, *arguments, **overrides)[0]


def fasterrcnn_mobilenet_v3_large_320_fpn(
    *,
    weights: Weights | None = None,
    progress: bool = True,
    num_classes: int | None = None,
    weights_backbone: Weights | None = torchvision.models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
    trainable_backbone_layers: int | None = None,
    replace_predictor: bool = False,
    **overrides: Any,
) -> FasterRCNN:
    """torchvision's detector of this name: `fasterrcnn_mobilenet_v3_large_fpn` on images of 320 pixels."""
    sizes = {"min_size": 320, "max_size": 640, "rpn_pre_nms_top_n_test": 150, "rpn_post_nms_top_n_test": 150}
    arguments = weights, progress, num_classes, weights_backbone, trainable_backbone_layers, replace_predictor
    return _build(
        "mobilenet_v3_large_fpn", FasterRCNN_MobileNet_V3_Large_320_FPN_Weights, *arguments, **{**sizes, **overrides}
    )[0]


def fasterrcnn_resnet50_fpn_detectron2(
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    stride_in_1x1: bool = True,
    trainable_backbone_layers: int | None = None,
    replace_predictor: bool = False,
    **overrides: Any,
) -> FasterRCNN:
    """The Faster R-CNN R50-FPN of detectron2's model zoo, with its settings (`fastdet.DETECTRON2`).

    Args:
        weights: a checkpoint of detectron2, a .pth or a .pkl of its model zoo.
        num_classes: with the background, so 81 for COCO; None takes those of `weights`, or 81.
        stride_in_1x1: where the bottlenecks stride: the weights of the zoo are made for their first convolution.
        trainable_backbone_layers: how many of the backbone's last blocks train; 3 with weights, else all.
        replace_predictor: load `weights` of another number of classes, all but the predictor.
        overrides: fields of `Settings`, and the modules that `FasterRCNN` takes.

    Raises:
        ValueError: a file that cannot be read, or whose names or shapes do not fit.
    """
    _require_weights(weights, replace_predictor)
    state = None if weights is None else weight_files.read_state_dict(weights)
    model = FasterRCNN(
        "resnet50_fpn",
        _choose_num_classes(num_classes, state, 81),
        trainable_backbone_layers=NAMED["resnet50_fpn"].trainable_layers(trainable_backbone_layers, state is not None),
        **{"settings": DETECTRON2, "freeze_batchnorm": state is not None, **overrides},
    )
    if stride_in_1x1:
        backbones.move_stride_to_first_convolution(model.backbone)
    if weights is not None and state is not None:
        settings = model.settings
        with weight_files.prefix_errors(weights):
            converted = weight_files.from_detectron2(
                state,
                pixel_mean=settings.image_mean,
                pixel_std=settings.image_std,
                sizes_per_level=len(settings.rpn_anchor_generator.sizes[0]),
            )
        weight_files.load(model, converted, replace_predictor=replace_predictor, name=str(weights))
    return model


def _build(
    name: str,
    enum: type[WeightsEnum] | None,
    weights: Weights | None,
    progress: bool,
    num_classes: int | None,
    weights_backbone: Weights | None,
    trainable_backbone_layers: int | None,
    replace_predictor: bool,
    /,
    default_classes: int = _COCO_CLASSES,
    **overrides: Any,
) -> tuple[FasterRCNN, WeightsEnum | None]:
    """The detector of a named backbone with its weights; and their member of `enum`, None for a file's."""
    _require_weights(weights, replace_predictor)
    member, state = (None, None) if weights is None else read_weights("weights", enum, weights, progress)
    if state is not None:
        weights_backbone = None
    pretrained = state is not None or weights_backbone is not None
    model = FasterRCNN(
        name,
        _choose_num_classes(num_classes, state, default_classes),
        weights_backbone=weights_backbone,
        progress=progress,
        trainable_backbone_layers=NAMED[name].trainable_layers(trainable_backbone_layers, pretrained),
        **{"freeze_batchnorm": NAMED[name].freezes_batchnorm(pretrained), **overrides},
    )
    if state is not None:
        weight_files.load(model, state, replace_predictor=replace_predictor, name=str(weights))
    return model, member


def _require_weights(weights: Weights | None, replace_predictor: bool) -> None:
    if replace_predictor and weights is None:
        raise ValueError("replace_predictor is for weights to be loaded, but there are none")


def _choose_num_classes(given: int | None, state: Mapping[str, Tensor] | None, default: int) -> int:
    """As given, or of the weights, or the default."""
    if given is not None:
        return given
    scores = None if state is None else state.get(_CLASS_SCORES)
    return default if scores is None or scores.ndim == 0 else len(scores)
