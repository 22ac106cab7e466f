"""torchvision's objects in our terms: its modules as fields of `fastdet.Settings`, its enums of weights as tensors."""

import os
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn
from torchvision.models._api import WeightsEnum
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.rpn import AnchorGenerator as TheirAnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from fastdet.models.anchors import AnchorGenerator
from fastdet.weights import files

# A member of one of torchvision's enums of weights, its name ("COCO_V1"), or a file.
Weights: TypeAlias = WeightsEnum | str | os.PathLike[str]

# Fields for which torchvision's None stands for the default.
_NONE_IS_DEFAULT = ("rpn_anchor_generator", "image_mean", "image_std", "bbox_reg_weights")


def is_torchvisions(backbone: object, given: dict[str, Any], box_roi_pool: object) -> bool:
    """Whether a detector is asked for as torchvision's is: with its pyramid, its anchors or its pooling."""
    theirs = isinstance(backbone, BackboneWithFPN) or isinstance(
        given.get("rpn_anchor_generator"), TheirAnchorGenerator
    )
    return theirs or box_roi_pool is not None


def overrides(given: dict[str, Any], box_roi_pool: MultiScaleRoIAlign | None) -> dict[str, Any]:
    """The `given` changes of settings, torchvision's objects among them in our terms, and what `box_roi_pool` says."""
    given = {name: value for name, value in given.items() if value is not None or name not in _NONE_IS_DEFAULT}
    generator = given.get("rpn_anchor_generator")
    if isinstance(generator, TheirAnchorGenerator):
        given = {**given, "rpn_anchor_generator": anchors(generator)}
    return given if box_roi_pool is None else {**pooling(box_roi_pool), **given}


def anchors(theirs: TheirAnchorGenerator) -> AnchorGenerator:
    """The same anchors on each level. Raises ValueError for a subclass, whose anchors may be others."""
    if type(theirs) is not TheirAnchorGenerator:
        raise ValueError(f"rpn_anchor_generator must be torchvision's AnchorGenerator, got {type(theirs).__name__}")
    return AnchorGenerator(tuple(map(tuple, theirs.sizes)), tuple(map(tuple, theirs.aspect_ratios)))


def pooling(theirs: MultiScaleRoIAlign) -> dict[str, Any]:
    """The settings of pooling by name.

    Raises:
        ValueError: it is another class, or pools to what is not a square, or shares boxes out to levels otherwise.
    """
    if type(theirs) is not MultiScaleRoIAlign:
        raise ValueError(f"box_roi_pool must be torchvision's MultiScaleRoIAlign, got {type(theirs).__name__}")
    height, width = theirs.output_size
    canonical = theirs.canonical_scale, theirs.canonical_level
    if height != width or canonical != (224, 4):
        raise ValueError(
            "box_roi_pool must have as many rows as columns, and canonical_scale and canonical_level (224, 4), got "
            f"{height} x {width} and {canonical}"
        )
    return {
        "box_pooling": "align",
        "box_featmap_names": tuple(theirs.featmap_names),
        "box_pool_size": height,
        "box_sampling_ratio": max(theirs.sampling_ratio, 0),
    }


def count_classes(given: int | None, predictor: nn.Module | None) -> int:
    """How many a detector has, the background included: as it is told, or as its predictor has.

    Raises:
        ValueError: there are fewer than two, or the two disagree.
    """
    found = getattr(getattr(predictor, "cls_score", None), "out_features", None)
    number = found if given is None else given
    if not isinstance(number, int) or number < 2:
        raise ValueError(f"num_classes counts the background, so it is at least 2, got {given!r}")
    if found is not None and found != number:
        raise ValueError(f"num_classes is {number}, but box_predictor has {found}")
    return number


def read_weights(
    argument: str, enum: type[WeightsEnum] | None, weights: Weights, progress: bool
) -> tuple[WeightsEnum | None, dict[str, Tensor]]:
    """The member of `enum` that `weights` is or names, None for a file; and the state dict.

    Raises:
        ValueError: naming the `argument`; a member of another enum, a file that is not there or holds no state dict.
    """
    known = {} if enum is None else enum.__members__
    if isinstance(weights, WeightsEnum):
        if weights not in known.values():
            raise ValueError(f"{argument}: {weights} are weights of another network")
        member: WeightsEnum | None = weights
    else:
        member = known.get(str(weights).removeprefix("" if enum is None else f"{enum.__name__}."))
    if member is not None:
        return member, member.get_state_dict(progress=progress, check_hash=True)
    path: Any = weights
    if not Path(path).exists():
        raise ValueError(f"{argument}: no file {os.fspath(path)!r}, and not one of {', '.join(known) or 'none'}")
    try:
        return None, files.read_state_dict(path)
    except files.TensorFileError as error:
        raise ValueError(f"{argument}: {error}") from None
