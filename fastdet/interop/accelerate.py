"""torchvision's detectors on fastdet's operations: the parts between the layers, replaced in a model as it stands."""

import functools
from dataclasses import dataclass, field
from typing import Any

from torchvision.models.detection.faster_rcnn import FasterRCNN

from fastdet.interop.accelerated_modules import ACCELERATED, PARTS, difference


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did to a model.

    replaced: the parts whose class is fastdet's now, such as "rpn" or "roi_heads.box_roi_pool".
    kept: the parts that are not torchvision's own, and why; these, and the methods that use them, are as they were.
    """

    replaced: tuple[str, ...]
    kept: dict[str, str]
    _origins: list[tuple[Any, type]] = field(repr=False, compare=False)

    def undo(self) -> None:
        """Give the model's parts torchvision's classes back. Does nothing the second time."""
        while self._origins:
            part, origin = self._origins.pop()
            if type(part) is ACCELERATED[origin]:
                part.__class__ = origin

    def __str__(self) -> str:
        kept = [f"kept: {path}: {reason}" for path, reason in self.kept.items()]
        return "\n".join([f"replaced: {', '.join(self.replaced) or 'nothing'}", *kept])


def accelerate(model: FasterRCNN) -> Acceleration:
    """Let a detector of torchvision compute with fastdet's operations, in place; weights and outputs stay.

    `model` is torchvision's `FasterRCNN`, `MaskRCNN` or `KeypointRCNN`, or a subclass. Its RPN, RoI heads and RoI align
    modules become instances of subclasses (`fastdet.interop.accelerated_modules`) that replace the choice of proposals
    and of detections, the matching to the ground truth, and the RoI align of boxes, masks and keypoints. A part that is
    not exactly torchvision's, because it is of another class or has a method set on the instance, is kept. Parameters,
    state dict, hooks and modes stay, hyperparameters such as `model.roi_heads.nms_thresh` are read at each call, and an
    accelerated model can be copied and pickled (to load it takes fastdet, to load its state dict does not). To
    accelerate a model again changes nothing, and returns what can undo it; so a copy can be undone too.

    Losses, gradients and detections are torchvision's, up to rounding. The samplers are torchvision's own, so the same
    seed draws the same samples. The intended differences:

    - Proposals of several levels and detections of several classes are kept apart by index. torchvision shifts their
      coordinates where there are few, which rounds them and can move a decision at the threshold.
    - In half precision (autocast) overlaps are computed in fp32, some of which torchvision computes in half.
    - A ground-truth box that overlaps no anchor makes no anchor positive; in torchvision it makes all of them positive.
    - Of equal scores another may rank first where torchvision leaves that open.

    Inputs that fastdet's operations do not take (float64, thresholds outside [0, 1], a pyramid that does not fall by
    halves) go to torchvision's methods, as does all under `torch.jit.trace`. Undo before scripting or exporting.

    Raises:
        TypeError: `model` is something else, such as another detector, or scripted or compiled.
    """
    if not isinstance(model, FasterRCNN) or getattr(model, "_compiled_call_impl", None) is not None:
        raise TypeError(
            "model must be torchvision's FasterRCNN, MaskRCNN or KeypointRCNN, not scripted, compiled or wrapped, got "
            f"{'compiled ' if isinstance(model, FasterRCNN) else ''}{type(model).__module__}.{type(model).__qualname__}"
        )
    replaced, kept, origins = [], {}, []
    for path, origin in PARTS.items():
        part: Any = functools.reduce(lambda owner, name: getattr(owner, name, None), path.split("."), model)
        if part is None and path.endswith(("mask_roi_pool", "keypoint_roi_pool")):
            continue
        reason = "the model has none" if part is None else difference(part, origin)
        if reason is not None:
            kept[path] = reason
        elif origin in ACCELERATED:
            part.__class__ = ACCELERATED[origin]
            replaced.append(path)
            origins.append((part, origin))
    return Acceleration(tuple(replaced), kept, origins)
