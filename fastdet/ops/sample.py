"""Random choice of positives and negatives, fixed in shape: the candidates of the smallest random keys.

A key is computed from the image's seed and the candidate's index, in integers, so that the same seed chooses the same
candidates on every device and in every batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdet.ops import _checks
from fastdet.ops._library import define
from fastdet.ops.cpu.sample import sample_cpu


class Sampled(NamedTuple):
    """The S slots of each of B images: chosen positives, then chosen negatives, both ascending, then empty slots.

    index: int64 [B, S], the candidate; 0 in an empty slot.
    weight: fp32 [B, S], 1, or 0 in an empty slot.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    weight: Tensor


def sample_cuda(label: Tensor, seed: Tensor, num_samples: int, max_positive: int) -> tuple[Tensor, Tensor]:
    from fastdet.kernels import sample as kernel

    index, weight = sample_fake(label, seed, num_samples, max_positive)
    if index.numel():
        label, seed = label.contiguous(), seed.contiguous()
        batch, num_candidates = label.shape
        max_positive = min(max_positive, num_samples)
        code = position = None
        # Of a span only its own samples may still be chosen: the image has no fewer positives than the span, so that
        # no fewer positives and no more negatives of it are chosen.
        span = kernel.thinning(num_candidates, num_samples)
        if span:
            shape = (batch, -(-num_candidates // span), num_samples)
            code = torch.empty(shape, dtype=torch.int32, device=label.device)
            position = torch.empty_like(code)
            kernel.launch_thin(label, seed, code, position, span=span, max_positive=max_positive)
        kernel.launch(label, seed, code, position, index, weight, max_positive=max_positive)
    return index, weight


def sample_fake(label: Tensor, seed: Tensor, num_samples: int, max_positive: int) -> tuple[Tensor, Tensor]:
    shape = (label.shape[0], num_samples)
    return label.new_empty(shape), label.new_empty(shape, dtype=torch.float32)


define(
    "sample(Tensor label, Tensor seed, SymInt num_samples, SymInt max_positive) -> (Tensor index, Tensor weight)",
    cpu=sample_cpu,
    cuda=sample_cuda,
    fake=sample_fake,
)


def sample(label: Tensor, num_samples: int, max_positive: int, seed: Tensor | None = None) -> Sampled:
    """At most `max_positive` positives, and negatives up to `num_samples` in all, at random.

    Those of the smallest keys are chosen, the lower index first among equal keys; the same seed chooses the same on
    every device and in every batch. Source of the quotas: Ren et al. 2015 (arXiv:1506.01497), section 3.1.3.

    Args:
        label: int64 [B, K]: 1 for a positive, 0 for a negative; candidates of other labels are never chosen.
        num_samples: S, the slots of each image, 0 or more.
        max_positive: positives at most, 0 or more.
        seed: int64 [B] on the device of `label`, of each image; None: drawn there from torch's generator, whose seed
            then fixes the choice.

    Returns:
        Sampled: index int64 [B, S] and weight fp32 [B, S].

    Raises:
        TypeError: `label` or `seed` is not an int64 tensor, or a count no int.
        ValueError: shapes or devices that differ; a count below 0.
    """
    if _checks.tensor("label", label, dtype=torch.int64).ndim != 2:
        raise ValueError(f"label must have the shape [B, K], got {list(label.shape)}")
    if seed is None:
        seed = torch.randint(2**63 - 1, (label.shape[0],), device=label.device)
    _checks.tensor("seed", seed, (label.shape[0],), torch.int64)
    _checks.same_device(label=label, seed=seed)
    for name, value in (("num_samples", num_samples), ("max_positive", max_positive)):
        _checks.integer(name, value, least=0)
    # Of one image torch's dispatcher would take a third of the time.
    if label.is_cpu and type(label) is type(seed) is Tensor and not _checks.is_recording():
        return Sampled(*sample_cpu(label, seed, num_samples, max_positive))
    return Sampled(*torch.ops.fastdet.sample(label, seed, num_samples, max_positive))
