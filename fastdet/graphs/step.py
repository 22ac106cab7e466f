"""A whole training step on tensors of fixed shape, free of host syncs.

The same function runs eagerly and is captured as a CUDA graph, so what it depends on lies on the device: the learning
rate and the loss scale are tensors, and a step that must not count is undone by a tensor that marks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdet.graphs.batch_losses import running_statistics
from fastdet.models.losses import NAMES

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
    model: nn.Module,
    optimizer: Optimizer,
    loss_scale: LossScale,
    parts: Sequence[Callable[[], Mapping[str, Tensor]]],
    *,
    amp: torch.dtype | None,
    clip_norm: float,
    check_gradients: bool = True,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    combine: Callable[[Tensor, list[Tensor]], None] | None = None,
) -> Tensor:
    """Forward, losses, backward, clipping, update. If a loss or gradient is not finite, all stays as it was.

    All is: the parameters, the optimizer's state, and the running statistics of BatchNorm. Under fp16 the loss scale
    is halved then, and doubled after `GROWTH_INTERVAL` good steps. Gradients are not kept.

    Args:
        optimizer: as `fastdet.graphs.optimizers.prepare_optimizer` leaves it.
        parts: each computes the losses of a part of the batch, under autocast; the step is that of their sum. One part
            after another goes forward and backward, so that the memory is that of the largest.
        amp: the dtype of that autocast; None: none.
        clip_norm: largest norm of all gradients together; 0 does not clip.
        check_gradients: compute the norm also where it is not needed to clip or to find the loss scale of fp16. Without
            it only losses are checked.
        no_sync: around all parts but the last, as of `DistributedDataParallel`.
        combine: brings the losses, fp32 [4], and the running statistics of BatchNorm, in place, to those of all
            processes that take the step together.

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
    each = torch.zeros(len(NAMES), device=scale.device)
    for number, part in enumerate(parts, start=1):
        with torch.enable_grad(), nullcontext() if number == len(parts) else no_sync():
            losses = part()
            values = torch.stack([losses[name] for name in NAMES])
            total = values.sum()
            (total * scale if amp == torch.float16 else total).backward()
            each += values.detach()
    with torch.no_grad():
        if combine is not None:
            combine(each, [statistic for statistic in statistics if statistic.is_floating_point()])
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
        return torch.cat([each, torch.stack([norm, skipped, scale])])


def checked_columns(amp: torch.dtype | None, clip_norm: float, check_gradients: bool = True) -> int:
    """How many of `COLUMNS` must be finite: the losses, and the norm but under fp16, whose scale depends on it."""
    return len(NAMES) + (amp is not torch.float16 and computes_norm(amp, clip_norm, check_gradients))


def computes_norm(amp: torch.dtype | None, clip_norm: float, check_gradients: bool) -> bool:
    """Whether a step computes the norm of its gradients."""
    return bool(clip_norm) or amp == torch.float16 or check_gradients
