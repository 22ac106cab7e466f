"""The detector that `fastdet train` builds: by its options, and where they give nothing by the objects to be found."""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from fastdet.cli.values import UserError, raise_user_errors
from fastdet.data import DetectionDataset
from fastdet.engine import TrainSettings, describe_anchors
from fastdet.engine.checkpoint import require
from fastdet.engine.defaults import (
    Objects,
    balance_classes,
    choose_anchors,
    choose_min_size,
    measure_reach,
    smallest_proposal,
)
from fastdet.models.anchors import AnchorGenerator
from fastdet.models.backbones import NAMED, NamedBackbone
from fastdet.models.settings import Settings
from fastdet.safe_files import printable
from fastdet.weights.files import read


@dataclass(frozen=True)
class DetectorOptions:
    """The options of a detector, by their names; None of what is not given."""

    backbone: str
    set: Sequence[tuple[str, Any]] = ()
    min_size: int | None = None
    max_size: int | None = None
    anchors: str | None = None
    anchor_sizes: Sequence[float] | None = None
    aspect_ratios: Sequence[float] | None = None
    class_weights: str | None = None
    trainable_backbone_layers: int | None = None
    weights_backbone: str | None = None
    weights: Path | None = None
    replace_predictor: bool = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> DetectorOptions:
        """Those that a command has."""
        given = vars(options)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


class Plan(NamedTuple):
    """A detector, and why it is so.

    Attributes:
        architecture: the model as plain values, from which `fastdet.engine.build_model` builds it.
        reasons: what was chosen for the data, lines for people.
        objects: those of the data.
        overlaps: the largest IoU of each object with an anchor, [N].
    """

    architecture: dict[str, Any]
    reasons: list[str]
    objects: Objects
    overlaps: NDArray[Any]


def plan_detector(options: DetectorOptions, objects: Objects, class_names: tuple[str, ...]) -> Plan:
    """The detector for the options and the objects of a data set, whose labels are of `class_names`.

    Raises:
        UserError: options that do not go together, or a checkpoint to start from of other classes or anchors.
    """
    settings: dict[str, Any] = dict(options.set)
    if "rpn_anchor_generator" in settings:
        raise UserError("--set rpn_anchor_generator: it is not a plain value; see --anchor-sizes, --aspect-ratios")
    if options.backbone not in NAMED:
        raise UserError(f"--backbone: {options.backbone!r} is none of {', '.join(NAMED)}")
    for name in ("min_size", "max_size", "class_weights"):
        if getattr(options, name) is not None and name in settings:
            raise UserError(f"--set {name}: it does not go with --{name.replace('_', '-')}")
    settings.update({n: getattr(options, n) for n in ("min_size", "max_size") if getattr(options, n) is not None})
    named, origin = NAMED[options.backbone], _read_origin(options)
    resizing = _choose_resizing(settings, named, objects)
    settings.update(resizing)
    if named.settings.rpn_min_size_in_original_pixels and "rpn_min_size" not in settings:
        settings["rpn_min_size"] = smallest_proposal(objects, named.settings.rpn_min_size)
    if options.class_weights == "balanced":
        settings["class_weights"] = balance_classes(objects, len(class_names) + 1)
    # Other names are refused when the model is built.
    known = {field.name for field in fields(Settings)}
    with raise_user_errors("--min-size, --max-size, --set"):
        detector = named.settings.override(**{name: value for name, value in settings.items() if name in known})
    anchors, how = _choose_anchors(options, objects, detector, origin)
    if origin is not None:
        _check_origin(options, origin, anchors, class_names)
    pretrained = bool(options.weights_backbone or options.weights)
    architecture = {
        "backbone": options.backbone,
        "num_classes": len(class_names) + 1,
        "anchors": anchors,
        "settings": settings,
        # Written even where it is the default of pretrained weights: a checkpoint is loaded without them.
        "trainable_backbone_layers": named.trainable_layers(options.trainable_backbone_layers, pretrained),
        "freeze_batchnorm": named.freezes_batchnorm(pretrained),
    }
    overlaps = measure_reach(objects, detector, anchors, named.strides)
    sides = f"shorter side {detector.min_size}, longer at most {detector.max_size} pixels"
    reasons = [
        f"resizing: {sides} ({'chosen for the objects' if resizing else 'given'})",
        f"anchors: {_describe_sizes(anchors)} ({how}), {_describe_reach(overlaps)}",
    ]
    return Plan(architecture, reasons, objects, overlaps)


def _choose_anchors(
    options: DetectorOptions, objects: Objects, detector: Settings, origin: Mapping[str, Any] | None
) -> tuple[dict[str, Any], str]:
    """The "anchors" of the architecture, and where they come from."""
    strides, is_given = NAMED[options.backbone].strides, bool(options.anchor_sizes or options.aspect_ratios)
    if options.anchors and (is_given or (options.weights and options.anchors == "auto")):
        raise UserError(
            f"--anchors {options.anchors}: it does not go with --anchor-sizes, --aspect-ratios or --weights"
        )
    with raise_user_errors("--anchor-sizes, --aspect-ratios"):
        anchors = describe_anchors(options.backbone, options.anchor_sizes, options.aspect_ratios)
        AnchorGenerator(**anchors)
    if is_given or options.anchors == "default":
        return anchors, "given" if is_given else "the backbone's"
    # Weights of a detector are for its anchors.
    if options.weights:
        return (origin or {}).get("architecture", {}).get("anchors", anchors), "those of --weights"
    return choose_anchors(objects, detector, anchors, strides), "chosen for the objects"


def _choose_resizing(settings: Mapping[str, Any], named: NamedBackbone, objects: Objects) -> dict[str, int]:
    """The sides that are not in the settings, unless the shorter is."""
    if "min_size" in settings:
        return {}
    least, longest = max(named.settings.min_sizes), named.settings.max_size
    min_size = choose_min_size(objects, named.strides[0], min(least, settings.get("max_size", longest)))
    return {"min_size": min_size, "max_size": settings.get("max_size", round(min_size * longest / least))}


def _describe_sizes(anchors: Mapping[str, Any]) -> str:
    sizes = " | ".join(", ".join(f"{size:g}" for size in level) for level in anchors["sizes"])
    ratios = ", ".join(f"{ratio:g}" for ratio in anchors["aspect_ratios"][0])
    return f"sides {sizes} with height / width {ratios}"


def _describe_reach(overlaps: NDArray[Any]) -> str:
    if not len(overlaps):
        return "no boxes"
    return f"reach {(overlaps >= 0.5).mean():.1%} of the boxes at IoU .5 and {(overlaps >= 0.7).mean():.1%} at .7"


def describe_run(
    options: argparse.Namespace,
    plan: Plan,
    settings: TrainSettings,
    steps: str,
    data: DetectionDataset,
    held_out: DetectionDataset,
) -> list[str]:
    """What is to be trained, for people; `steps` is how the steps are taken."""
    counts, ignored = Counter(plan.objects.labels.tolist()), plan.objects.ignored
    listed = ", ".join(f"{printable(name, 40)} {counts[label]}" for label, name in enumerate(data.class_names, start=1))
    widths, heights = sorted(width for _, width in data.sizes), sorted(height for height, _ in data.sizes)
    low, high = f"{widths[0]} x {heights[0]}", f"{widths[-1]} x {heights[-1]}"
    number = -(-len(data) // settings.batch_size)
    start = options.weights_backbone and f"the backbone's from {options.weights_backbone}"
    extent = low if low == high else f"{low} to {high}"
    return [
        f"data: {len(data)} images to train on, {len(held_out)} to evaluate on, {extent} pixels",
        printable(f"boxes: {listed}" + (f"; {ignored} more are to be ignored" if ignored else ""), 2000),
        *plan.reasons,
        printable(f"weights: {start or options.weights or 'random'}"),
        f"training: {options.backbone}, {settings.epochs} epochs of {number} steps of {settings.batch_size} images, "
        f"{settings.optimizer_name} with rate {settings.lr:g}, augmentation {settings.augmentation}",
        f"steps: {steps}",
    ]


def warn_of_random_weights(options: argparse.Namespace) -> None:
    """Warn of a run that starts from nothing, where the backbone could be pretrained."""
    network = NAMED[options.backbone].network
    if network and not (options.weights_backbone or options.weights or options.resume):
        warnings.warn(
            f"all weights start random, which needs many more images and epochs: --weights-backbone IMAGENET1K_V1 "
            f"downloads ImageNet's, or takes a file of torchvision's {network}; --weights FILE goes on from a detector",
            stacklevel=2,
        )


def _read_origin(options: DetectorOptions) -> Mapping[str, Any] | None:
    """The checkpoint of a run that is to be started from, if it is one."""
    if not options.weights:
        return None
    with raise_user_errors("--weights"):
        content = read(options.weights)
        if not isinstance(content, dict) or "architecture" not in content:
            return None
        names = [name for name in ("architecture", "class_names") if name in content]
        require(options.weights, content, names, "of a run")
    return content


def _check_origin(
    options: DetectorOptions, origin: Mapping[str, Any], anchors: Mapping[str, Any], class_names: tuple[str, ...]
) -> None:
    """Raises UserError if a checkpoint to start from is of other classes or anchors."""
    # A checkpoint without anchors has the backbone's.
    saved_anchors = origin["architecture"].get("anchors", describe_anchors(options.backbone))
    if anchors != saved_anchors:
        raise UserError(f"--weights: {options.weights} has the anchors {saved_anchors}, this run {anchors}")
    saved_names = tuple(origin.get("class_names", ()))
    if class_names != saved_names and not options.replace_predictor:
        names = f"has the classes {saved_names}, this run {class_names}"
        raise UserError(f"--weights: {options.weights} {names}; see --replace-predictor")
