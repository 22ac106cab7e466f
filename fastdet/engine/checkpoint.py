"""Checkpoints: files that are whole or not there, and that cannot run code when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch.optim import SGD, AdamW, Optimizer

from fastdet import weights
from fastdet.models.anchors import AnchorGenerator
from fastdet.models.backbones import NAMED
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.safe_files import FileError, printable
from fastdet.weights import files, torch_files
from fastdet.weights.files import TensorFileError, one_line


class CheckpointError(FileError):
    """A checkpoint cannot be read, written or used; the message is one line naming the file."""


def save(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that the file is either the old one or the new one, never a part.

    It is a file of `torch.save`, which `torch.load` reads, with a checksum of all its bytes at the end.

    Args:
        path: the file; its folder is made if it is not there.
        content: tensors, state dicts and plain Python values.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        files.write(path, partial(torch_files.save, dict(content)), kind="checkpoint")
    except TensorFileError as error:
        raise CheckpointError(str(error)) from error


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, as tensors and plain values only: it cannot run code.

    Raises:
        CheckpointError: the file is missing, cut short or changed, not a checkpoint, or holds other objects.
    """
    try:
        content = files.read(path, kind="checkpoint")
    except TensorFileError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(content).__name__}, not a dict")
    return content


def require(path: str | Path, content: Mapping[str, Any], names: Iterable[str], kind: str) -> None:
    """Check that a checkpoint has entries of these names, and that each is what belongs there.

    Raises:
        CheckpointError: naming the entries that are missing, or the first that is something else.
    """
    missing = [name for name in names if name not in content]
    if missing:
        raise CheckpointError(f"{path}: not the checkpoint {kind}: it has no {', '.join(missing)}")
    for name in names:
        wanted, accepts = _ENTRIES.get(name, ("", lambda _: True))
        if not accepts(content[name]):
            raise CheckpointError(f"{path}: {name} must be {wanted}, got {printable(repr(content[name]), 100)}")


def check_plain(name: str, value: Any) -> None:
    """Check that a checkpoint gives a value back as it is, and JSON takes it: numbers, texts, True, False and None, in
    lists, tuples, and dicts with texts as keys.

    Raises:
        ValueError: naming the first part of it that is something else, and its type.
    """
    if type(value) is dict and all(type(key) is str for key in value):
        for key, inner in value.items():
            check_plain(f"{name}[{key!r}]", inner)
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            check_plain(f"{name}[{index}]", inner)
    elif type(value) not in (int, float, str, bool, NoneType):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(f"{name} must be plain, of numbers, texts, lists, tuples and dicts by texts, got a {kind}")


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _is_dict(value: Any, *names: str) -> bool:
    """With strings as keys, these among them."""
    return isinstance(value, Mapping) and set(names) <= set(value) and all(isinstance(name, str) for name in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


# What belongs into the entries of a checkpoint that are read, in words and in code.
_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "architecture": (
        "a dict with a backbone and num_classes",
        lambda x: _is_dict(x, "backbone", "num_classes") and _is_count(x["num_classes"]),
    ),
    "class_names": ("a list of names", _is_names),
    "model": ("a state dict", lambda x: not files.describe_problem(x)),
    "optimizer": ("the state of an optimizer", lambda x: _is_dict(x, "state", "param_groups")),
    "loss_scale": ("a scale and a growth_tracker", lambda x: _is_dict(x, "scale", "growth_tracker")),
    "best": (
        "what the best evaluation was",
        lambda x: (
            _is_dict(x, "epoch", "AP", "evaluations_since") and all(isinstance(v, int | float) for v in x.values())
        ),
    ),
    "average": ("None or a state dict", lambda x: x is None or not files.describe_problem(x)),
    "random": ("the states of generators", lambda x: _is_dict(x, "cpu") and isinstance(x["cpu"], torch.Tensor)),
    **dict.fromkeys(
        ("epoch", "step", "epochs", "images", "workers", "log_every"),
        ("a whole number", _is_count),
    ),
}
# What torch's optimizers remember of a parameter: tensors of its shape, and numbers of steps.
_REMEMBERED: dict[type[Optimizer], set[str]] = {
    SGD: {"momentum_buffer"},
    AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Give an optimizer what a checkpoint has of each of its parameters. Its own hyperparameters stay.

    Raises:
        ValueError: it is not of this optimizer, or has values that no step gives.
    """
    own = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own["param_groups"]]:
        raise ValueError("its optimizer has other groups of parameters")
    for index, state in saved["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(f"its optimizer has a state of parameter {index!r:.40}, and there are {len(parameters)}")
        problem = files.describe_problem(state) or files.describe_values(state)
        if problem or set(state) != _REMEMBERED[type(optimizer)]:
            raise ValueError(f"its optimizer's state of parameter {index}: {problem or f'it has {list(state)}'}")
        for name, value in state.items():
            shape = () if name == "step" else parameters[index].shape
            # Of these the square root is taken, and a power one step later.
            is_negative = name in ("step", "exp_avg_sq") and bool((value < 0).any())
            if value.shape != shape or not value.is_floating_point() or is_negative:
                found = "values below 0" if is_negative else f"{value.dtype} {list(value.shape)}"
                raise ValueError(f"its optimizer's {name} of parameter {index} is {found}")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own["param_groups"]})


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
    if "rpn_anchor_generator" in settings:
        raise ValueError('an architecture has its anchors as "anchors", not in its settings')
    if "anchors" in architecture:
        settings["rpn_anchor_generator"] = AnchorGenerator(**architecture["anchors"])
    layers, freezes = architecture.get("trainable_backbone_layers"), architecture.get("freeze_batchnorm")
    if type(layers) not in (int, NoneType) or type(freezes) not in (bool, NoneType):
        raise ValueError("trainable_backbone_layers must be a whole number, and freeze_batchnorm True or False")
    return FasterRCNN(
        architecture["backbone"],
        architecture["num_classes"],
        weights_backbone=weights_backbone,
        trainable_backbone_layers=layers,
        freeze_batchnorm=freezes,
        **settings,
    )


def load_model(path: str | Path) -> tuple[FasterRCNN, tuple[str, ...]]:
    """Rebuild the detector of a training run from its checkpoint, on the CPU and in evaluation mode.

    Its weights are those that the run evaluates: their average, if it has one.

    Returns:
        The model, and the names of labels 1, 2, ...

    Raises:
        CheckpointError: the file cannot be read, or is not the checkpoint of a detector.
    """
    content = {"average": None, **load(path)}
    entries = ("architecture", "class_names", "model", "average")
    require(path, content, entries, "of a detector, as fastdet train writes it")
    architecture, names = content["architecture"], tuple(content["class_names"])
    state = content["average"] or content["model"]
    if architecture["num_classes"] != len(names) + 1:
        number = f"num_classes {architecture['num_classes']!r:.40}"
        raise CheckpointError(f"{path}: {number} does not fit the {len(names)} class_names")
    try:
        # First without memory for weights: the file's own may be fewer than the description would have.
        with torch.device("meta"):
            weights.fit(build_model(architecture), state, name=str(path))
        model = build_model(architecture)
        weights.load(model, state, name=str(path))
    except weights.WeightsError as error:
        raise CheckpointError(str(error)) from error
    # Whatever the file has in place of what belongs there.
    except Exception as error:
        raise CheckpointError(f"{path}: the checkpoint does not fit the model: {one_line(error)}") from error
    return model.eval(), names
