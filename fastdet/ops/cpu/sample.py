"""Sampling on the CPU: keys of the candidates, and the choice of the smallest."""

import torch
from torch import Tensor

KEY_BITS = 29
# Shifts and factors of the kernel's `_avalanche`.
_STEPS = ((16, 0x7FEB352D), (15, 0x846CA68B))


def sample_cpu(label: Tensor, seed: Tensor, num_samples: int, max_positive: int) -> tuple[Tensor, Tensor]:
    batch, num_candidates = label.shape
    index, weight = label.new_zeros(batch, num_samples), torch.zeros(batch, num_samples)
    words = _seed_words(int(seed))
    for image in range(batch):
        count = 0
        for wanted, quota in ((1, min(max_positive, num_samples)), (0, num_samples)):
            candidates = (label[image] == wanted).nonzero()[:, 0]
            chosen = _smallest(candidates, min(quota, num_samples - count), image * num_candidates, words)
            index[image, count : count + len(chosen)] = chosen
            count += len(chosen)
        weight[image, :count] = 1
    return index, weight


def _smallest(candidates: Tensor, count: int, offset: int, seed_words: tuple[int, int]) -> Tensor:
    """Those of `candidates` [N], ascending, that have the `count` smallest keys, the first of equal ones.

    The key of a candidate is that of its index plus `offset`.
    """
    if count >= len(candidates):
        return candidates
    keys = _keys(candidates + offset, seed_words)
    # Keys are uniform: hardly more than `count` of them lie below the share `count` / N of their range.
    below = (keys < int((1.2 * count + 50) / len(candidates) * (1 << KEY_BITS))).nonzero()[:, 0]
    if len(below) >= count:
        candidates, keys = candidates[below], keys[below]
    ranked = (keys.long() << 32) + candidates
    return (ranked.topk(count, largest=False, sorted=False).values & 0xFFFFFFFF).sort().values


def _keys(index: Tensor, seed_words: tuple[int, int]) -> Tensor:
    """int32 keys of KEY_BITS bits of `index` [N]: those of the kernel, in wrapping int32."""
    first, second = map(_signed, seed_words)
    mixed = index.int().bitwise_xor_(first).mul_(_signed(0x9E3779B1)).bitwise_xor_(second)
    for shift, factor in _STEPS:
        mixed ^= (mixed >> shift).bitwise_and_(0xFFFFFFFF >> shift)
        mixed *= _signed(factor)
    mixed ^= (mixed >> 16).bitwise_and_(0xFFFF)
    return (mixed >> (32 - KEY_BITS)).bitwise_and_((1 << KEY_BITS) - 1)


def _seed_words(seed: int) -> tuple[int, int]:
    """Two 32-bit words of the seed, mixed."""
    first = _avalanche(seed & 0xFFFFFFFF)
    return first, _avalanche((seed >> 32 & 0xFFFFFFFF) ^ first)


def _avalanche(word: int) -> int:
    """As `_keys` mixes, of one 32-bit word."""
    for shift, factor in _STEPS:
        word = (word ^ word >> shift) * factor & 0xFFFFFFFF
    return word ^ word >> 16


def _signed(word: int) -> int:
    """A 32-bit word as an int32."""
    return (word ^ 0x80000000) - 0x80000000
