"""torchvision's modules in the terms of `fastdet.Settings`."""

from typing import Any

from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.rpn import AnchorGenerator as TheirAnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from .anchors import AnchorGenerator


def is_torchvisions(backbone: object, given: dict[str, Any], box_roi_pool: object) -> bool:
    """Whether a detector is asked for as torchvision's is: with its pyramid, its anchors or its pooling."""
    theirs = isinstance(backbone, BackboneWithFPN) or isinstance(
        given.get("rpn_anchor_generator"), TheirAnchorGenerator
    )
    return theirs or box_roi_pool is not None


def overrides(given: dict[str, Any], box_roi_pool: MultiScaleRoIAlign | None) -> dict[str, Any]:
    """The `given` changes of settings, torchvision's objects among them in our terms, and what `box_roi_pool` says."""
    generator = given.get("rpn_anchor_generator")
    if isinstance(generator, TheirAnchorGenerator):
        given = {**given, "rpn_anchor_generator": anchors(generator)}
    return given if box_roi_pool is None else {**pooling(box_roi_pool), **given}


def anchors(theirs: TheirAnchorGenerator) -> AnchorGenerator:
    """The same anchors on each level."""
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
