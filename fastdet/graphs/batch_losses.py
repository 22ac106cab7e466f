"""The losses of a padded batch, whole or in parts that go one after another, under autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.layers import ConvReLU2d
from fastdet.models.losses import NAMES, divisor
from fastdet.preserve import preserve_tensors
from fastdet.structures import Batch, Targets


def padded_losses(
    module: nn.Module,
    batch: Batch,
    targets: Targets,
    divisors: Callable[[Tensor], Tensor] | None = None,
    *,
    amp: torch.dtype | None,
) -> dict[str, Tensor]:
    """The losses of `PaddedLosses(model)`, or of a `DistributedDataParallel` of it, under autocast to `amp`."""
    # All in few launches; where another module is around it, autocast casts one after another.
    casts = cast_weights(module, amp) if amp is not None and isinstance(module, PaddedLosses) else {}
    with autocast(batch.images.device, amp):
        found: dict[str, Tensor] = torch.func.functional_call(module, casts, (batch, targets, divisors))
    return found


def batch_losses(
    module: nn.Module,
    batch: Batch,
    targets: Targets,
    *,
    amp: torch.dtype | None,
    accumulate: int = 1,
    total: Callable[[Tensor], Tensor] | None = None,
) -> list[Callable[[], dict[str, Tensor]]]:
    """The parts of a `training_step` on a batch, whose losses add up to those of the whole batch.

    What a loss is divided by is known when all parts are: with several, each goes forward once more beforehand, without
    gradients.

    Args:
        module: as of `padded_losses`.
        accumulate: how many parts, of equal numbers of images; fewer where there are fewer images.
        total: given the counts of this batch, as of `fastdet.models.losses.count`, what to divide by; None: the counts.
    """
    size = -(-len(batch.images) // accumulate)
    slices = [slice(start, start + size) for start in range(0, len(batch.images), size)]
    parts = [(Batch(*(tensor[rows] for tensor in batch)), targets.map(itemgetter(rows))) for rows in slices]
    # Processes that share a batch count at one time, also those that have less of it than there are parts.
    if len(parts) == 1 and (accumulate == 1 or total is None):
        return [partial(padded_losses, module, batch, targets, total, amp=amp)]
    counts = torch.zeros(len(NAMES), device=batch.images.device)

    def add(own: Tensor) -> Tensor:
        counts.add_(own)
        return divisor(own)

    with torch.no_grad(), preserve_tensors(running_statistics(module)):
        for part in parts:
            padded_losses(module, *part, add, amp=amp)
    divisors = divisor(counts) if total is None else total(counts)
    return [partial(padded_losses, module, *part, lambda _: divisors, amp=amp) for part in parts]


class PaddedLosses(nn.Module):
    """The losses of `model.forward_padded`, as a call of a module."""

    def __init__(self, model: FasterRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: Batch, targets: Targets, divisors: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        losses, _ = self.model.forward_padded(
            *batch[:2], targets, batch.scales, compute_losses=True, compute_detections=False, divisors=divisors
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
    named = {name: value for name, value in model.named_parameters() if id(value) in castable}
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
