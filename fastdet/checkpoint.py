"""Checkpoints: files that are whole or not there, and that cannot run code when they are read."""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdet.anchors import AnchorGenerator
from fastdet.backbones import STRIDES
from fastdet.faster_rcnn import FasterRCNN


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or used; the message is one line naming the file."""


def save(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that the file is either the old one or the new one, never a part.

    The bytes go to a temporary file in the same folder, are forced to the disk, and then take the file's name in one
    move. A kill, a full disk or an error leaves the last good file as it was.

    Args:
        path: the file; its folder is made if it is not there.
        content: tensors, state dicts and plain Python values.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    # In the same folder, because a move between file systems is a copy; with the process's id, so that two writers
    # of the same name do not write into one file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # On a full disk torch's writer raises a RuntimeError of its own.
    except (OSError, RuntimeError) as error:
        # Interrupted, the writer cannot close its archive either, and says so in place of the interruption.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise CheckpointError(f"{path}: the checkpoint cannot be written: {one_line(error)}") from error
    finally:
        # Gone already after the move; what else is left here is a part. It must not hide the error.
        _remove(temporary)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, as tensors and plain values only (`weights_only=True`): it cannot run code.

    Raises:
        CheckpointError: the file is missing, cut short, not a checkpoint, or holds other objects.
    """
    try:
        with warnings.catch_warnings():
            # It warns of foreign files before it refuses them.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: the checkpoint cannot be read: {error.strerror or one_line(error)}") from error
    except pickle.UnpicklingError as error:
        refused = "global" in str(error).lower()
        reason = "it holds objects other than tensors and plain values, refused" if refused else "damaged or foreign"
        raise CheckpointError(f"{path}: not a checkpoint: {reason}") from error
    # The bytes of a damaged file can lead the unpickler into any exception.
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint, or cut short: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def describe_anchors(
    backbone: str, sizes: Sequence[float] | None = None, aspect_ratios: Sequence[float] | None = None
) -> dict[str, Any]:
    """The "anchors" of an architecture for a named backbone, centred on the cells of its one feature level.

    Args:
        backbone: a name that `fastdet.FasterRCNN` knows.
        sizes: sides of the square anchors in pixels of the resized image; None takes 128, 256, 512.
        aspect_ratios: height over width; None takes 1:2, 1:1, 2:1.
    """
    if backbone not in STRIDES:
        raise ValueError(f"backbone must be one of {', '.join(STRIDES)}, got {backbone!r}")
    return {
        "sizes": (tuple(sizes or (128.0, 256.0, 512.0)),),
        "aspect_ratios": (tuple(aspect_ratios or (0.5, 1.0, 2.0)),),
        "offset": STRIDES[backbone] / 2,
        "rounded": False,
    }


def build_model(
    architecture: Mapping[str, Any],
    *,
    weights_backbone: str | None = None,
) -> FasterRCNN:
    """Make a detector from its plain description.

    Args:
        architecture: "backbone", a name; "num_classes", the background included; and, where they are not the usual
            ones, "anchors", the arguments of `fastdet.AnchorGenerator`, "settings", other fields of
            `fastdet.Settings`, "trainable_backbone_layers" and "freeze_batchnorm".
        weights_backbone: as `fastdet.FasterRCNN` takes it. It is no part of the description, because a checkpoint
            brings all weights itself.

    Raises:
        TypeError: a setting's name is unknown.
        ValueError: a value is out of its range, or the backbone's name is unknown.
    """
    overrides = dict(architecture.get("settings", {}))
    if "anchors" in architecture:
        overrides["rpn_anchor_generator"] = AnchorGenerator(**architecture["anchors"])
    return FasterRCNN(
        architecture["backbone"],
        architecture["num_classes"],
        weights_backbone=weights_backbone,
        trainable_backbone_layers=architecture.get("trainable_backbone_layers"),
        freeze_batchnorm=architecture.get("freeze_batchnorm"),
        **overrides,
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
        model.load_state_dict(content["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the checkpoint does not fit the model: {one_line(error)}") from error
    return model.eval(), tuple(content["class_names"])


def one_line(error: Exception) -> str:
    """The message of an error with its line breaks and length taken out."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Force the move itself to the disk, where the system can: Windows cannot open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
