"""Random choice of positives and negatives, fixed in shape: the candidates of the smallest random keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._library import define

LARGEST_KEY_BITS = 0x3F7FFFFF  # of the fp32 number before 1
NOTHING = torch.iinfo(torch.int64).max


class Sampled(NamedTuple):
    """The S slots of each of B images: chosen positives, then chosen negatives, both ascending, then empty slots.

    index: int64 [B, S], the candidate; 0 in an empty slot.
    weight: fp32 [B, S], 1, or 0 in an empty slot.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    weight: Tensor


def sample_cpu(label: Tensor, key: Tensor, num_samples: int, max_positive: int) -> tuple[Tensor, Tensor]:
    batch, num_candidates = label.shape
    column = torch.arange(num_candidates)
    # Key, then index: unique integers, so that which of several equal keys is taken is fixed.
    ranked = (key.contiguous().view(torch.int32).clamp(0, LARGEST_KEY_BITS).long() << 32) + column
    positive = _smallest(ranked, label == 1, min(max_positive, num_samples))
    negative = _smallest(ranked, label == 0, num_samples)
    room = num_samples - (positive != NOTHING).sum(1, keepdim=True)
    negative = negative.masked_fill(torch.arange(negative.shape[1]) >= room, NOTHING)

    # Slots in order: class, then index.
    low = 0xFFFFFFFF
    slots = torch.cat(
        (
            torch.where(positive == NOTHING, NOTHING, positive & low),
            torch.where(negative == NOTHING, NOTHING, (negative & low) + (1 << 32)),
            label.new_full((batch, num_samples), NOTHING),
        ),
        dim=1,
    )
    slots = slots.sort(1).values[:, :num_samples]
    chosen = slots != NOTHING
    return torch.where(chosen, slots & low, 0), chosen.float()


def _smallest(ranked: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The `count` smallest of those allowed, ascending, NOTHING after them: [B, min(count, K)]."""
    ranked = torch.where(allowed, ranked, NOTHING)
    return ranked.topk(min(count, ranked.shape[1]), largest=False, sorted=True).values


def sample_cuda(label: Tensor, key: Tensor, num_samples: int, max_positive: int) -> tuple[Tensor, Tensor]:
    from fastdet.kernels import sample as kernel

    index, weight = sample_fake(label, key, num_samples, max_positive)
    if index.numel():
        label, key = label.contiguous(), key.contiguous()
        batch, num_candidates = label.shape
        max_positive = min(max_positive, num_samples)
        code = position = None
        # What may still be chosen of a span are its own samples: the image has no fewer positives than the span, so
        # that it takes no fewer positives and no more negatives.
        span = kernel.thinning(num_candidates, num_samples)
        if span:
            shape = (batch, -(-num_candidates // span), num_samples)
            code = torch.empty(shape, dtype=torch.int32, device=label.device)
            position = torch.empty_like(code)
            kernel.launch_thin(label, key, code, position, span=span, max_positive=max_positive)
        kernel.launch(label, key, code, position, index, weight, max_positive=max_positive)
    return index, weight


def sample_fake(label: Tensor, key: Tensor, num_samples: int, max_positive: int) -> tuple[Tensor, Tensor]:
    shape = (label.shape[0], num_samples)
    return label.new_empty(shape), key.new_empty(shape)


define(
    "sample(Tensor label, Tensor key, SymInt num_samples, SymInt max_positive) -> (Tensor index, Tensor weight)",
    cpu=sample_cpu,
    cuda=sample_cuda,
    fake=sample_fake,
)


def sample(label: Tensor, num_samples: int, max_positive: int, key: Tensor | None = None) -> Sampled:
    """At most `max_positive` positives and as many negatives as still fit, `num_samples` in all, at random.

    `label` int64 [B, K] is 1 for a positive, 0 for a negative; others are never taken. Those of the smallest `key`
    [B, K] are, the lower index first among equal keys; keys are fp32 in [0, 1) and held to that range. Left out, they
    are drawn from torch's generator, so that a seed fixes the choice.

    Raises:
        TypeError: `label` is not an int64 tensor, `key` not a floating-point one.
        ValueError: shapes or devices that differ; a number below 0.
    """
    if _checks.is_tensor("label", label).ndim != 2:
        raise ValueError(f"label must have the shape [B, K], got {list(label.shape)}")
    _checks.integers("label", label, tuple(label.shape))
    if key is None:
        key = torch.rand(label.shape, dtype=torch.float32, device=label.device)
    else:
        key = _checks.shape("key", _checks.floats("key", key), tuple(label.shape)).detach()
    _checks.same_device(label=label, key=key)
    for name, value in (("num_samples", num_samples), ("max_positive", max_positive)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    return Sampled(*torch.ops.fastdet.sample(label, key, num_samples, max_positive))
