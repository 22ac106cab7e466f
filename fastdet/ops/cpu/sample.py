"""Sampling on the CPU, in one thread: keys of the candidates, and the choice of the smallest."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEY_BITS = 29
# Above so many candidates it pays to leave out those with large keys first.
_MANY = 4096
# Shifts and factors of the kernel's `_avalanche`.
_STEPS = ((16, 0x7FEB352D), (15, 0x846CA68B))


def sample_cpu(label: Tensor, seed: Tensor, num_samples: int, max_positive: int) -> tuple[Tensor, Tensor]:
    batch, num_candidates = label.shape
    index, weight = np.zeros((batch, num_samples), np.int64), np.zeros((batch, num_samples), np.float32)
    for image, (labels, image_seed) in enumerate(zip(label.numpy(), seed.tolist(), strict=True)):
        keys = _keys(np.arange(num_candidates), _seed_words(image_seed))
        count = 0
        for wanted, quota in ((1, min(max_positive, num_samples)), (0, num_samples)):
            candidates = np.flatnonzero(labels == wanted)
            chosen = _smallest(candidates, keys, min(quota, num_samples - count))
            index[image, count : count + len(chosen)] = chosen
            count += len(chosen)
        weight[image, :count] = 1
    return torch.from_numpy(index), torch.from_numpy(weight)


def _smallest(candidates: NDArray[np.int64], keys: NDArray[np.uint32], count: int) -> NDArray[np.int64]:
    """Those of `candidates` [N], ascending indices of `keys`, that have the `count` smallest keys, the first of equal
    ones."""
    if count >= len(candidates):
        return candidates
    if not count:
        return candidates[:0]
    keys = keys.take(candidates)
    # Keys are uniform: hardly more than `count` of them lie below the share `count` / N of their range.
    share = (1.2 * count + 50) / len(candidates)
    if len(candidates) > _MANY and share < 0.5:
        below = np.flatnonzero(keys < np.uint32(share * (1 << KEY_BITS)))
        if len(below) >= count:
            candidates, keys = candidates.take(below), keys.take(below)
    # Two calls that do not sort: a sort of random keys would take a third of the time.
    largest = np.partition(keys, count - 1)[count - 1]
    chosen = np.flatnonzero(keys <= largest)
    if len(chosen) > count:
        equal = np.flatnonzero(keys.take(chosen) == largest)
        chosen = np.delete(chosen, equal[count - len(chosen) :])
    return candidates.take(chosen)


def _keys(index: NDArray[np.int64], seed_words: tuple[int, int]) -> NDArray[np.uint32]:
    """Keys of KEY_BITS bits of `index` [N]: those of the kernel, in wrapping arithmetic of 32 bits."""
    first, second = seed_words
    mixed = index.astype(np.uint32)
    mixed ^= first
    mixed *= 0x9E3779B1
    mixed ^= second
    for shift, factor in _STEPS:
        mixed ^= mixed >> shift
        mixed *= factor
    mixed ^= mixed >> 16
    mixed >>= 32 - KEY_BITS
    return mixed


def _seed_words(seed: int) -> tuple[int, int]:
    """Two 32-bit words of the seed, mixed."""
    first = _avalanche(seed & 0xFFFFFFFF)
    return first, _avalanche((seed >> 32 & 0xFFFFFFFF) ^ first)


def _avalanche(word: int) -> int:
    """As `_keys` mixes, of one 32-bit word."""
    for shift, factor in _STEPS:
        word = (word ^ word >> shift) * factor & 0xFFFFFFFF
    return word ^ word >> 16
