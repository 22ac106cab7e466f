"""torchvision's objects in fastdet's terms: its modules as settings, its enums of weights as tensors."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor
from torchvision.models import WeightsEnum
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from fastdet.interop.accelerated_modules import AcceleratedMultiScaleRoIAlign
from fastdet.weights import files

# A member of one of torchvision's enums of weights, its name ("COCO_V1"), or a file.
Weights: TypeAlias = WeightsEnum | str | os.PathLike[str]

# Fields for which torchvision's None stands for the default.
_NONE_IS_DEFAULT = ("rpn_anchor_generator", "image_mean", "image_std", "bbox_reg_weights")


def settings_arguments(
    overrides: dict[str, Any], box_roi_pool: MultiScaleRoIAlign | None, make_anchors: Callable[..., Any]
) -> dict[str, Any]:
    """Settings by name: `overrides`, and before them those of `box_roi_pool`.

    torchvision's anchor generator becomes `make_anchors(sizes, aspect_ratios)`. Raises ValueError for a subclass of
    it, whose anchors may be others.
    """
    given = {name: value for name, value in overrides.items() if value is not None or name not in _NONE_IS_DEFAULT}
    anchors = given.get("rpn_anchor_generator")
    if isinstance(anchors, AnchorGenerator):
        if type(anchors) is not AnchorGenerator:
            raise ValueError(f"rpn_anchor_generator must be torchvision's own, got {type(anchors).__name__}")
        tuples = (tuple(map(tuple, levels)) for levels in (anchors.sizes, anchors.aspect_ratios))
        given = {**given, "rpn_anchor_generator": make_anchors(*tuples)}
    return given if box_roi_pool is None else {**_pooling_settings(box_roi_pool), **given}


def _pooling_settings(pool: MultiScaleRoIAlign) -> dict[str, Any]:
    """Raises ValueError for a subclass, for what does not pool to a square, and for another choice of levels."""
    if type(pool) not in (MultiScaleRoIAlign, AcceleratedMultiScaleRoIAlign):
        raise ValueError(f"box_roi_pool must be torchvision's MultiScaleRoIAlign, got {type(pool).__name__}")
    height, width = pool.output_size
    canonical = pool.canonical_scale, pool.canonical_level
    if height != width or canonical != (224, 4):
        raise ValueError(
            "box_roi_pool must have as many rows as columns, and canonical_scale and canonical_level (224, 4), got "
            f"{height} x {width} and {canonical}"
        )
    return {
        "box_pooling": "align",
        "box_featmap_names": tuple(pool.featmap_names),
        "box_pool_size": height,
        "box_sampling_ratio": max(pool.sampling_ratio, 0),
    }


def read_weights(
    argument: str, enum: type[WeightsEnum] | None, weights: Weights, progress: bool
) -> tuple[WeightsEnum | None, dict[str, Tensor]]:
    """The member of `enum` that `weights` is or names, None for a file; and the state dict.

    Raises:
        ValueError: naming the `argument`; a member of another enum, one that cannot be downloaded, a file that is not
            there or holds no state dict.
    """
    known = {} if enum is None else enum.__members__
    if isinstance(weights, WeightsEnum):
        if weights not in known.values():
            raise ValueError(f"{argument}: {weights} are weights of another network")
        member: WeightsEnum | None = weights
    else:
        member = known.get(str(weights).removeprefix("" if enum is None else f"{enum.__name__}."))
    if member is not None:
        try:
            return member, member.get_state_dict(progress=progress, check_hash=True)
        # Of the network (urllib's errors are OSErrors), or a hash of another file.
        except (OSError, RuntimeError) as error:
            problem = f"{member} cannot be downloaded from {member.url} ({error})"
            raise ValueError(
                f"{argument}: {problem}; a file of it, from anywhere, can be given in its place"
            ) from error
    path: Any = weights
    if not Path(path).exists():
        raise ValueError(f"{argument}: no file {os.fspath(path)!r}, and not one of {', '.join(known) or 'none'}")
    try:
        return None, files.read_state_dict(path)
    except files.TensorFileError as error:
        raise ValueError(f"{argument}: {error}") from None
