"""torchvision's detectors on fastdet's operations: the steps between the layers, replaced in a model as it stands."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

from fastdet.interop import torchvision_steps as steps
from fastdet.interop.instead import Instead, own


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did to a model.

    replaced: the methods that are fastdet's now, such as "rpn.filter_proposals".
    kept: the methods that are as they were, and why.
    """

    replaced: tuple[str, ...]
    kept: dict[str, str]
    _placed: "tuple[Instead, ...]" = field(repr=False, compare=False)

    def undo(self) -> None:
        """Give the model its own methods back. Does nothing the second time."""
        for instead in self._placed:
            if vars(instead.owner).get(instead.name) is instead:
                del vars(instead.owner)[instead.name]

    def __str__(self) -> str:
        lines = [f"replaced: {', '.join(self.replaced) or 'nothing'}"]
        return "\n".join(lines + [f"kept: {name}: {reason}" for name, reason in self.kept.items()])


def accelerate(model: FasterRCNN) -> Acceleration:
    """Let a detector of torchvision compute with fastdet's operations, in place; weights and outputs stay.

    `model` is torchvision's `FasterRCNN`, `MaskRCNN` or `KeypointRCNN`, or a subclass. Replaced are the anchors (a grid
    is kept for the next image of its size), the decoding of boxes, the choice of proposals and of detections, the
    matching of anchors and of proposals to the ground truth, and the RoI align of boxes, masks and keypoints. A method
    that is not torchvision's own, because a subclass or the instance has another, is kept, and the result says so. The
    replacements stand in the instances' dictionaries: parameters, state dict, hooks, modes and classes stay, numbers
    such as `model.roi_heads.nms_thresh` are read at each call, and an accelerated model can be copied and pickled (to
    load it takes fastdet, to load its state dict does not). To accelerate a model again changes nothing, and returns
    what can undo it; so a copy can be undone too.

    Losses, gradients and detections are torchvision's, up to rounding. The samplers are torchvision's own, so the same
    seed draws the same samples. The differences that are meant:

    - Proposals of several levels, and on a GPU detections of several classes, are kept apart by number. torchvision
      shifts their coordinates where there are few, which rounds them and can move a decision at the threshold.
    - In half precision (autocast) overlaps are computed in fp32, some of which torchvision computes in half.
    - A ground-truth box that overlaps no anchor makes no anchor positive; in torchvision it makes all of them positive.
    - Of equal scores another may rank first where torchvision leaves that open.
    - The images of a batch share one tensor of anchors, which is used again: it must not be written to.

    Other inputs than fastdet's operations take (float64, thresholds outside [0, 1], a pyramid that does not fall by
    halves) go to torchvision's methods, as does all under `torch.jit.trace`. Undo before scripting or exporting.

    Raises:
        TypeError: `model` is something else, such as another detector, or scripted or compiled.
    """
    if not isinstance(model, FasterRCNN) or getattr(model, "_compiled_call_impl", None) is not None:
        raise TypeError(
            "model must be torchvision's FasterRCNN, MaskRCNN or KeypointRCNN, neither scripted, compiled nor wrapped, "
            f"got {_description(model)}"
        )
    placed, kept = [], {}
    for path, part in _PARTS.items():
        *owner_path, name = path.split(".")
        owner: Any = model
        for step in owner_path:
            owner = getattr(owner, step, None)
        if owner is None and part.optional:
            continue
        reason = _reason(owner, name, part)
        if reason:
            kept[path] = reason
            continue
        instead = vars(owner).get(name)
        if not isinstance(instead, Instead):
            instead = vars(owner)[name] = part.kind(owner, name, part.function)
        placed.append((path, instead))
    return Acceleration(tuple(path for path, _ in placed), kept, tuple(instead for _, instead in placed))


def _reason(owner: Any, name: str, part: "_Part") -> str | None:
    """Why the method cannot be replaced, or None."""
    if owner is None:
        return "the model has none"
    return own(owner, part.origin, name, *part.uses) or part.obstacle(owner)


def _description(model: object) -> str:
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return f"a compiled {name}" if isinstance(model, FasterRCNN) else name


def _nothing(owner: Any) -> str | None:
    return None


class _Part(NamedTuple):
    """A method that can be replaced: whose it is by right, what else of that class it uses, and what forbids it."""

    origin: type
    function: Callable[..., Any]
    uses: tuple[str, ...] = ()
    obstacle: Callable[[Any], str | None] = _nothing
    kind: type[Instead] = Instead
    optional: bool = False


_PARTS = {
    "rpn.anchor_generator.forward": _Part(
        AnchorGenerator, AnchorGenerator.forward, ("grid_anchors", "set_cell_anchors"), kind=steps.Anchors
    ),
    "rpn.box_coder.decode_single": _Part(BoxCoder, steps.decode_single),
    "rpn.filter_proposals": _Part(RegionProposalNetwork, steps.filter_proposals, ("_get_top_n_idx",)),
    "rpn.assign_targets_to_anchors": _Part(
        RegionProposalNetwork, steps.assign_targets_to_anchors, obstacle=steps.other_rpn_matching
    ),
    "roi_heads.box_coder.decode_single": _Part(BoxCoder, steps.decode_single),
    "roi_heads.assign_targets_to_proposals": _Part(
        RoIHeads, steps.assign_targets_to_proposals, obstacle=steps.other_matcher
    ),
    "roi_heads.box_roi_pool.forward": _Part(MultiScaleRoIAlign, steps.pool),
    "roi_heads.postprocess_detections": _Part(RoIHeads, steps.postprocess_detections, obstacle=steps.other_coder),
    "roi_heads.mask_roi_pool.forward": _Part(MultiScaleRoIAlign, steps.pool, optional=True),
    "roi_heads.keypoint_roi_pool.forward": _Part(MultiScaleRoIAlign, steps.pool, optional=True),
}
