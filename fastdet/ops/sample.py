"""Random choice of positives and negatives, fixed in shape: the candidates of the smallest random keys.

A key is computed from a seed and the candidate's number, in integers, so that the same seed chooses the same candidates
on every device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdet.ops import _checks
from fastdet.ops._library import define

KEY_BITS = 29
# Shifts and factors of the kernel's `_avalanche`.
_STEPS = ((16, 0x7FEB352D), (15, 0x846CA68B))


class Sampled(NamedTuple):
    """The S slots of each of B images: chosen positives, then chosen negatives, both ascending, then empty slots.

    index: int64 [B, S], the candidate; 0 in an empty slot.
    weight: fp32 [B, S], 1, or 0 in an empty slot.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    weight: Tensor


def sample_cpu(label: Tensor, seed: Tensor, num_samples: int, max_positive: int) -> tuple[Tensor, Tensor]:
    batch, num_candidates = label.shape
    index, weight = label.new_zeros(batch, num_samples), torch.zeros(batch, num_samples)
    number = int(seed)
    for image in range(batch):
        first, taken = image * num_candidates, 0
        for wanted, quota in ((1, min(max_positive, num_samples)), (0, num_samples)):
            candidates = (label[image] == wanted).nonzero()[:, 0]
            chosen = _smallest(candidates, min(quota, num_samples - taken), first, number)
            index[image, taken : taken + len(chosen)] = chosen
            taken += len(chosen)
        weight[image, :taken] = 1
    return index, weight


def keys(number: Tensor, seed: int) -> Tensor:
    """int32 keys of KEY_BITS bits of the candidates `number` [N]: what the kernel computes, in wrapping int32."""
    first, second = _seed_words(seed)
    mixed = number.int().bitwise_xor_(first).mul_(_signed(0x9E3779B1)).bitwise_xor_(second)
    for shift, factor in _STEPS:
        mixed ^= (mixed >> shift).bitwise_and_(0xFFFFFFFF >> shift)
        mixed *= _signed(factor)
    mixed ^= (mixed >> 16).bitwise_and_(0xFFFF)
    return (mixed >> (32 - KEY_BITS)).bitwise_and_((1 << KEY_BITS) - 1)


def _seed_words(seed: int) -> tuple[int, int]:
    """Two int32 of the seed, mixed."""
    first = _mixed(seed & 0xFFFFFFFF)
    return _signed(first), _signed(_mixed((seed >> 32 & 0xFFFFFFFF) ^ first))


def _mixed(word: int) -> int:
    """As the numbers are mixed above, in Python's integers."""
    for shift, factor in _STEPS:
        word = (word ^ word >> shift) * factor & 0xFFFFFFFF
    return word ^ word >> 16


def _signed(word: int) -> int:
    """The low 32 bits of `word` as an int32."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _smallest(candidates: Tensor, count: int, first: int, seed: int) -> Tensor:
    """Those of `candidates` [N] that have the `count` smallest keys, the first of equal ones; all are ascending.

    `first` is the number of candidate 0.
    """
    if count >= len(candidates):
        return candidates
    key = keys(candidates + first, seed)
    # Keys are uniform, so that hardly more than wanted lie below the share of them that is wanted.
    below = (key < int((1.2 * count + 50) / len(candidates) * (1 << KEY_BITS))).nonzero()[:, 0]
    if len(below) >= count:
        candidates, key = candidates[below], key[below]
    ranked = (key.long() << 32) + candidates
    return (ranked.topk(count, largest=False, sorted=False).values & 0xFFFFFFFF).sort().values


def sample_cuda(label: Tensor, seed: Tensor, num_samples: int, max_positive: int) -> tuple[Tensor, Tensor]:
    from fastdet.kernels import sample as kernel

    index, weight = sample_fake(label, seed, num_samples, max_positive)
    if index.numel():
        label = label.contiguous()
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
    """At most `max_positive` positives and as many negatives as still fit, `num_samples` in all, at random.

    `label` int64 [B, K] is 1 for a positive, 0 for a negative; others are never taken. Those of the smallest keys are,
    the lower index first among equal keys. The keys follow from `seed`, int64 [1] on the device of `label`, and are the
    same on every device; left out, it is drawn there from torch's generator, whose seed then fixes the choice.

    Raises:
        TypeError: `label` or `seed` is not an int64 tensor.
        ValueError: shapes or devices that differ; a number below 0.
    """
    if _checks.is_tensor("label", label).ndim != 2:
        raise ValueError(f"label must have the shape [B, K], got {list(label.shape)}")
    _checks.integers("label", label, tuple(label.shape))
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=label.device)
    _checks.integers("seed", seed, (1,))
    _checks.same_device(label=label, seed=seed)
    for name, value in (("num_samples", num_samples), ("max_positive", max_positive)):
        _checks.integer(name, value, least=0)
    return Sampled(*torch.ops.fastdet.sample(label, seed, num_samples, max_positive))
