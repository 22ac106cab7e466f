"""Hyperparameters of training and the functions of them: learning rate, parameter groups, optimizer, average."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from fastdet.data.augmentation import PRESETS, Preset

Precision = Literal["auto", "bfloat16", "float16", "none"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_finite(value: Any) -> bool:
    """Whether it is a finite number, at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


# What each field accepts, in words and in code. Every field has a rule: without, `TrainSettings()` fails.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("epochs", "warmup_steps", "workers", "aspect_groups", "patience", "save_every"),
        ("a whole number, at least 0", lambda value: _is_whole(value, 0)),
    ),
    # With the epochs added it is a seed of torch's generators, of 64 bits.
    "seed": ("a whole number from 0 to 2**63", lambda value: _is_whole(value, 0) and value <= 1 << 63),
    **dict.fromkeys(
        ("batch_size", "accumulate", "log_every", "eval_every"),
        ("a whole number, at least 1", lambda value: _is_whole(value, 1)),
    ),
    **dict.fromkeys(
        ("momentum", "weight_decay", "bias_lr_factor", "gamma", "clip_norm"), ("at least 0 and finite", _is_finite)
    ),
    "bias_weight_decay": ("None or at least 0 and finite", lambda value: value is None or _is_finite(value)),
    "ema": ("at least 0 and below 1", lambda value: _is_finite(value) and value < 1),
    "lr": ("above 0 and finite", lambda value: _is_finite(value) and value > 0),
    "milestones": (
        "a tuple of whole numbers, at least 1",
        lambda value: isinstance(value, (tuple, list)) and all(_is_whole(epoch, 1) for epoch in value),
    ),
    "augmentation": (f"one of {', '.join(PRESETS)}", lambda value: value in PRESETS),
    "optimizer_name": ("'sgd' or 'adamw'", lambda value: value in ("sgd", "adamw")),
    "schedule": ("'cosine' or 'step'", lambda value: value in ("cosine", "step")),
    "amp": (f"one of {', '.join(PRECISIONS)}", lambda value: value in PRECISIONS),
    "graphs": ("True or False", lambda value: isinstance(value, bool)),
}


@dataclass(frozen=True)
class TrainSettings:
    """An optimizer with warm-up and a schedule. The defaults suit a light pretrained backbone and some hundred images.

    Attributes:
        epochs: passes over the data set.
        batch_size: images a step, of all processes together; the last batch of an epoch may be smaller.
        accumulate: parts of a batch, at most `batch_size`, that go through the network one after another, for less
            memory. The step is that of the whole batch, but for BatchNorm that trains, and goes forward twice.
        optimizer_name: "sgd" or "adamw".
        lr: learning rate after the warm-up.
        momentum: of SGD.
        weight_decay: of all parameters except biases.
        bias_lr_factor: learning rate of biases, as a multiple of the others'.
        bias_weight_decay: None takes `weight_decay`.
        warmup_steps: steps over which the rate rises linearly to its full value; at most a fifth of all steps.
        schedule: "cosine" falls to zero over all epochs, "step" falls by `gamma` after each of the milestones.
        milestones: epochs after which "step" lowers the rate.
        gamma: factor of "step".
        clip_norm: largest norm of all gradients together; 0 does not clip.
        ema: decay of an exponential moving average of the weights, which is what is evaluated and kept as the best; 0
            has none. In step n the decay is at most (1 + n) / (10 + n), so that the first weights are soon forgotten.
        eval_every: epochs between two evaluations; there is one after the last epoch too.
        save_every: steps between two checkpoints within an epoch, each at the next reading of the losses; 0 has none.
        patience: evaluations without a better one after which the run ends; 0 never does.
        amp: "bfloat16" or "float16" for the networks in mixed precision, the latter with a loss scale; "none" for fp32.
            "auto" is the first of them that a GPU supports, and fp32 on a CPU.
        graphs: on a GPU take each step as one CUDA graph, of at most six padded shapes.
        augmentation: a preset of `fastdet.data.augmentation`; "flip" mirrors half the images left to right.
        aspect_groups: steps a doubling of width / height, by which images are grouped so that those of a batch need
            little padding; 0 does not group. Only for data sets with `sizes`.
        seed: of the order, the augmentation and the model's draws.
        workers: processes that load data; 0 loads in the main process. Their number does not change what is drawn.
        log_every: steps between two readings of the losses; each is a host sync.
    """

    epochs: int = 12
    batch_size: int = 4
    accumulate: int = 1
    optimizer_name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bias_lr_factor: float = 1.0
    bias_weight_decay: float | None = None
    warmup_steps: int = 60
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    clip_norm: float = 10.0
    ema: float = 0.0
    eval_every: int = 1
    save_every: int = 0
    patience: int = 0
    amp: Precision = "auto"
    graphs: bool = True
    augmentation: Preset = "flip"
    aspect_groups: int = 3
    seed: int = 0
    workers: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            expected, accepts = _RULES[field.name]
            if not accepts(value := getattr(self, field.name)):
                raise ValueError(f"{field.name} must be {expected}, not {value!r}")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate must be at most batch_size, {self.batch_size}, not {self.accumulate}")


# By backbone: VGG16 trained in one stage on VOC 2007 (Ren et al., arXiv:1506.01497, section 3.1.3, for momentum and
# decay), and a light backbone on some hundred images.
RECIPES = {
    "vgg16": TrainSettings(
        epochs=14,
        batch_size=1,
        lr=1e-3,
        weight_decay=5e-4,
        bias_lr_factor=2.0,
        bias_weight_decay=0.0,
        warmup_steps=0,
        schedule="step",
        milestones=(10,),
        clip_norm=0.0,
    ),
    "mobilenet_v2": TrainSettings(),
    "mobilenet_v2_fpn": TrainSettings(epochs=8),
}


# Of AdamW, for batches of four images.
_ADAMW_RATE = 2e-4


def default_rate(recipe: TrainSettings, optimizer_name: str, batch_size: int) -> float:
    """The learning rate of a recipe for another optimizer or batch size, to which it is proportional.

    Goyal et al. 2017 (arXiv:1706.02677), section 2.1.
    """
    if optimizer_name == recipe.optimizer_name:
        return recipe.lr * batch_size / recipe.batch_size
    return _ADAMW_RATE * batch_size / 4


def learning_rate(settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """The rate of a step, counted from 0: the schedule times the warm-up."""
    steps = settings.epochs * steps_per_epoch
    if settings.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / steps))
    else:
        factor = settings.gamma ** sum(step >= epochs * steps_per_epoch for epochs in settings.milestones)
    # A run of a few pictures would end before it has reached the rate.
    warmup_steps = max(min(settings.warmup_steps, steps // 5), 1)
    return settings.lr * factor * min(1.0, (step + 1) / warmup_steps)


def parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """The trainable parameters of a model for an optimizer: biases apart, each group with its "lr_factor".

    Raises:
        ValueError: no parameter is trainable.
    """
    bias_decay = settings.weight_decay if settings.bias_weight_decay is None else settings.bias_weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [], "lr_factor": 1.0, "weight_decay": settings.weight_decay},
        {"params": [], "lr_factor": settings.bias_lr_factor, "weight_decay": bias_decay},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.rpartition(".")[2] == "bias"]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameters")
    return groups


def amp_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on a device; None for none."""
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    if settings.amp != "auto" or device.type != "cuda":
        return named.get(settings.amp)
    return named["bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"]


def build_optimizer(model: nn.Module, settings: TrainSettings) -> Optimizer:
    """torch's optimizer over the trainable parameters of a model on its final device, of a kind that a CUDA graph can
    hold: fused, with tensors as learning rates."""
    groups, lr = parameter_groups(model, settings), torch.tensor(settings.lr)
    if settings.optimizer_name == "adamw":
        return AdamW(groups, lr=lr, fused=True, capturable=True)
    return SGD(groups, lr=lr, momentum=settings.momentum, fused=True)


def build_average(model: nn.Module) -> AveragedModel:
    """A copy of a model, which `update_average` moves towards it."""
    return AveragedModel(model, use_buffers=True)


@torch.no_grad()
def update_average(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """Move the average's parameters and buffers towards the model's, by the rule of `TrainSettings.ema`; no host sync,
    which the average's own `update_parameters` would be on a GPU."""
    count = int(average.n_averaged)
    share = 1 - min(decay, (1 + count) / (10 + count)) if count else 1.0
    old, new = ([*each.parameters(), *each.buffers()] for each in (average.module, model))
    pairs = list(zip(old, new, strict=True))
    moved = [pair for pair in pairs if pair[0].is_floating_point()]
    if moved:
        torch._foreach_lerp_([pair[0] for pair in moved], [pair[1] for pair in moved], share)
    for value, latest in pairs:
        if not value.is_floating_point():
            value.copy_(latest)
    average.n_averaged += 1
