"""Optimizers whose step a CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer


def prepare_optimizer(optimizer: Optimizer, model: nn.Module, rates: Sequence[Tensor] = ()) -> list[Tensor]:
    """Bring an optimizer to where its first step does what all others do, in place.

    Each group gets a learning rate of its own, fp32 on the model's device. State that the first step would make is
    made, of zeros: fused SGD takes the gradient itself as its first momentum, and captured so would do it at every
    replay.

    Args:
        rates: what an earlier call returned; a group that still has the rate that it got then keeps it.

    Returns:
        The groups' learning rates.

    Raises:
        ValueError: an optimizer that cannot be captured, or is not of the model's parameters alone; the message gives
            one that can.
    """
    _check_parameters(optimizer, model)
    _check_capturable(optimizer)
    device = next(model.parameters()).device
    for group, rate in zip_longest(optimizer.param_groups, rates[: len(optimizer.param_groups)]):
        if group["lr"] is not rate:
            group["lr"] = group["lr"].detach().to(device, torch.float32, copy=True)
        names = ["momentum_buffer"] if group.get("momentum") else []
        if isinstance(optimizer, AdamW):
            names = ["step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        for parameter in group["params"]:
            for name in names if parameter.requires_grad else ():
                if optimizer.state[parameter].get(name) is None:
                    zeros = torch.zeros((), device=device) if name == "step" else torch.zeros_like(parameter)
                    optimizer.state[parameter][name] = zeros
            for name, value in optimizer.state.get(parameter, {}).items():
                # Fused steps go through memory, so state lies as its parameter.
                if value is not None and value.shape == parameter.shape and value.stride() != parameter.stride():
                    optimizer.state[parameter][name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return [group["lr"] for group in optimizer.param_groups]


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """The rate of an optimizer that is prepared, times the "lr_factor" of a group that has one; no host sync."""
    for group in optimizer.param_groups:
        group["lr"].fill_(rate * group.get("lr_factor", 1.0))


def _check_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    of_model = {id(parameter) for parameter in model.parameters()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in of_model for parameter in given)
    if foreign:
        raise ValueError(
            f"{foreign} of the {len(given)} parameters of the optimizer are not the model's: make it anew, of the "
            "parameters that the model has now"
        )
    if not any(parameter.requires_grad for parameter in given):
        raise ValueError("the optimizer has none of the model's trainable parameters")


def _check_capturable(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, (SGD, AdamW)):
        raise ValueError(f"{name} cannot be captured: take torch.optim.SGD or torch.optim.AdamW, with fused=True")
    expected = "capturable=True" if isinstance(optimizer, AdamW) else "dampening=0"
    for index, group in enumerate(optimizer.param_groups):
        lr, dampening = group["lr"], group.get("dampening", 0)
        for wrong, reason in (
            (not group["fused"], "is not fused"),
            (not isinstance(lr, Tensor), f"has the number {lr} as its learning rate"),
            (not group.get("capturable", True), "is not capturable"),
            (dampening != 0, f"has dampening {dampening}, which the first step alone leaves out"),
        ):
            if wrong:
                call = f"{name}(..., fused=True, lr=torch.tensor(...), {expected})"
                raise ValueError(f"group {index} of {name} {reason}, so no graph can hold its step: {call}")
