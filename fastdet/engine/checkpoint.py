"""Checkpoints: files that are whole or not there, and that cannot run code when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdet import weights
from fastdet.models.anchors import AnchorGenerator
from fastdet.models.backbones import NAMED
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.weights import files
from fastdet.weights.files import TensorFileError, one_line


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or used; the message is one line naming the file."""


def save(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that the file is either the old one or the new one, never a part.

    Args:
        path: the file; its folder is made if it is not there.
        content: tensors, state dicts and plain Python values.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        files.write(path, lambda file: torch.save(dict(content), file), kind="checkpoint")
    except TensorFileError as error:
        raise CheckpointError(str(error)) from error


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, as tensors and plain values only: it cannot run code.

    Raises:
        CheckpointError: the file is missing, cut short, not a checkpoint, or holds other objects.
    """
    try:
        content = files.read(path, kind="checkpoint")
    except TensorFileError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def describe_anchors(
    backbone: str, sizes: Sequence[float] | None = None, aspect_ratios: Sequence[float] | None = None
) -> dict[str, Any]:
    """The "anchors" of an architecture for a named backbone.

    Args:
        backbone: one of `fastdet.models.backbones.NAMED`.
        sizes: sides of the square anchors in pixels of the resized image, for each level of a feature pyramid equally
            many, the finest level's first; None takes the backbone's default.
        aspect_ratios: height over width; None takes 1:2, 1:1, 2:1.

    Raises:
        ValueError: an unknown backbone, or a number of sizes that is no multiple of its levels.
    """
    if backbone not in NAMED:
        raise ValueError(f"backbone must be one of {', '.join(NAMED)}, got {backbone!r}")
    strides, default = NAMED[backbone].strides, NAMED[backbone].settings.rpn_anchor_generator
    levels = len(strides)
    if sizes is not None and len(sizes) % levels:
        raise ValueError(
            f"{backbone} has {levels} feature levels: its anchors need {levels} sizes or a multiple, got {len(sizes)}"
        )
    per_level = len(sizes or ()) // levels
    return {
        "sizes": tuple(tuple(sizes[k * per_level :][:per_level]) for k in range(levels)) if sizes else default.sizes,
        "aspect_ratios": (tuple(aspect_ratios or (0.5, 1.0, 2.0)),),
        # On a single level they are centered on its cells, as in the paper.
        "offset": default.offset if levels > 1 else strides[0] / 2,
        "rounded": default.rounded,
    }


def build_model(architecture: Mapping[str, Any], *, weights_backbone: str | None = None) -> FasterRCNN:
    """Build a detector from its plain description.

    Args:
        architecture: "backbone", a name; "num_classes", the background included; and, where they are not the default
            ones, "anchors", the arguments of `fastdet.AnchorGenerator`, "settings", other fields of
            `fastdet.Settings`, "trainable_backbone_layers" and "freeze_batchnorm".
        weights_backbone: as in `fastdet.FasterRCNN`. It is no part of the description, because a checkpoint holds all
            weights itself.

    Raises:
        TypeError: a setting's name is unknown.
        ValueError: a value is out of its range, or the backbone's name is unknown.
    """
    settings = dict(architecture.get("settings", {}))
    # Checkpoints of earlier versions may hold this setting; False is what there is now.
    if settings.pop("mask_padding", False):
        raise ValueError("there is no mask_padding=True any more: use size_buckets, with a single size")
    if "anchors" in architecture:
        settings["rpn_anchor_generator"] = AnchorGenerator(**architecture["anchors"])
    return FasterRCNN(
        architecture["backbone"],
        architecture["num_classes"],
        weights_backbone=weights_backbone,
        trainable_backbone_layers=architecture.get("trainable_backbone_layers"),
        freeze_batchnorm=architecture.get("freeze_batchnorm"),
        **settings,
    )


def load_model(path: str | Path) -> tuple[FasterRCNN, tuple[str, ...]]:
    """Rebuild the detector of a training run from its checkpoint, on the CPU and in evaluation mode.

    Returns:
        The model, and the names of labels 1, 2, ...

    Raises:
        CheckpointError: the file cannot be read, or is not the checkpoint of a detector.
    """
    content = load(path)
    missing = [name for name in ("architecture", "class_names", "model") if name not in content]
    if missing:
        raise CheckpointError(f"{path}: not the checkpoint of a detector: it has no {', '.join(missing)}")
    try:
        model = build_model(content["architecture"])
        weights.load(model, content["model"], name=str(path))
    except weights.WeightsError as error:
        raise CheckpointError(str(error)) from error
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the checkpoint does not fit the model: {one_line(error)}") from error
    return model.eval(), tuple(content["class_names"])
