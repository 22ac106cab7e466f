"""A whole training step on tensors of fixed shape, free of host syncs.

The same function runs eagerly and is captured as a CUDA graph, so what it depends on lies on the device: the learning
rate and the loss scale are tensors, and a step that must not count is undone by a tensor that marks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.layers import ConvReLU2d
from fastdet.models.losses import NAMES
from fastdet.structures import Batch, Targets

# What a step returns.
COLUMNS = (*NAMES, "gradient_norm", "skipped", "loss_scale")

# Those of torch's GradScaler.
INITIAL_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000


class LossScale(NamedTuple):
    """The dynamic loss scale of fp16, as torch's GradScaler keeps it: scale fp32 [], the factor of the loss, and
    growth_tracker int32 [], the steps since the factor last changed."""

    scale: Tensor
    growth_tracker: Tensor

    @classmethod
    def initial(cls, amp: torch.dtype | None, device: torch.device) -> LossScale:
        """1 but under fp16, whose small gradients would be zero."""
        scale = torch.full((), INITIAL_SCALE if amp == torch.float16 else 1.0, device=device)
        return cls(scale, torch.zeros((), dtype=torch.int32, device=device))


def training_step(
    model: FasterRCNN,
    optimizer: Optimizer,
    loss_scale: LossScale,
    batch: Batch,
    targets: Targets,
    *,
    amp: torch.dtype | None,
    clip_norm: float,
    check_gradients: bool = True,
) -> Tensor:
    """Forward, losses, backward, clipping, update. If a loss or gradient is not finite, all stays as it was.

    All is: the parameters, the optimizer's state, and the running statistics of BatchNorm. Under fp16 the loss scale
    is halved then, and doubled after `GROWTH_INTERVAL` good steps. Gradients are not kept.

    Args:
        optimizer: as `prepare_optimizer` leaves it.
        amp: dtype of autocast; None: none.
        clip_norm: largest norm of all gradients together; 0 does not clip.
        check_gradients: compute the norm also where it is not needed to clip or to find the loss scale of fp16. Without
            it only losses are checked.

    Returns:
        fp32 [len(COLUMNS)]: the losses, the gradients' norm before clipping (NaN if it is not computed), whether the
        step was skipped, and the loss scale that it was taken with.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    statistics = running_statistics(model)
    before = [statistic.clone() for statistic in statistics]
    scale = loss_scale.scale.clone()
    for parameter in trained:
        parameter.grad = None
    with torch.enable_grad():
        weights = {} if amp is None else cast_weights(model, amp)
        with autocast(batch.images.device, amp):
            losses = torch.func.functional_call(_PaddedLosses(model), weights, (batch, targets))
        each = torch.stack([losses[name] for name in NAMES])
        total = each.sum()
        (total * scale if amp == torch.float16 else total).backward()
    with torch.no_grad():
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        if amp == torch.float16:
            torch._foreach_mul_(gradients, scale.reciprocal())
        finite = each.isfinite().all()
        norm = torch.full_like(scale, torch.nan)
        if computes_norm(amp, clip_norm, check_gradients):
            norm = nn.utils.get_total_norm(gradients)
            finite &= norm.isfinite()
        skipped = (~finite).float()
        if clip_norm:
            nn.utils.clip_grads_with_norm_(trained, clip_norm, norm)
        # Torch's contract with fused optimizers: where this is 1 they change nothing, their own state included.
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        for statistic, old in zip(statistics, before, strict=True):
            statistic.copy_(torch.where(skipped > 0, old, statistic))
        if amp == torch.float16:
            torch._amp_update_scale_(*loss_scale, skipped, GROWTH, BACKOFF, GROWTH_INTERVAL)
        for parameter in trained:
            # A graph's gradients lie in memory that the next graph uses too.
            parameter.grad = None
        return torch.cat([each.detach(), torch.stack([norm, skipped, scale])])


def computes_norm(amp: torch.dtype | None, clip_norm: float, check_gradients: bool) -> bool:
    """Whether a step computes the norm of its gradients."""
    return bool(clip_norm) or amp == torch.float16 or check_gradients


class _PaddedLosses(nn.Module):
    """The losses of `model.forward_padded`, as a call of a module."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        losses, _ = self.model.forward_padded(
            batch.images, batch.sizes, targets, batch.scales, compute_losses=True, compute_detections=False
        )
        assert losses is not None
        return losses


class _CastAll(torch.autograd.Function):
    """Tensors in another dtype, and their gradients back, in one call each that takes few launches for all of them."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        casts = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(casts, list(tensors))
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(cast for cast, needs in zip(casts, needed, strict=True) if not needs))
        return tuple(casts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        wide = [
            torch.empty_like(grad, dtype=dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
            if grad is not None
        ]
        torch._foreach_copy_(wide, given)
        remaining = iter(wide)
        return None, *(None if grad is None else next(remaining) for grad in grads)


def castable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose parameters autocast casts and nothing else uses: convolutions and linear layers as they are."""
    return [layer for layer in model.modules() if type(layer) in (nn.Conv2d, ConvReLU2d, nn.Linear)]


def cast_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """By name, in `dtype`, the parameters that autocast would cast one by one; gradients reach the model's own."""
    castable = {id(parameter) for layer in castable_layers(model) for parameter in layer.parameters(recurse=False)}
    named = {name: value for name, value in model.named_parameters(prefix="model") if id(value) in castable}
    casts = _CastAll.apply(dtype, *named.values()) if named else ()
    return dict(zip(named, casts, strict=True))


@contextmanager
def autocast(device: torch.device, amp: torch.dtype | None) -> Iterator[None]:
    """torch's autocast to `amp`, or none, with casts of weights that are made in it and kept no longer.

    Inside another autocast, even one that is switched off, torch would keep them past the weights' next update.
    """
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            yield
    finally:
        torch.clear_autocast_cache()


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that normalization layers change in training."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]
    return [buffer for layer in layers if layer.training for buffer in layer.buffers(recurse=False)]


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
