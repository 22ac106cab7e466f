"""Stable sorts on the CPU by radix, in one thread: NumPy sorts 16-bit keys in linear time, torch compares."""

import math

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]

# Below it a sort by comparison is faster.
_FEW = 1024


def radix_argsort(keys: NDArray[np.uint32]) -> Index:
    """The stable order of `keys` [N], ascending: by their low halves, then by their high ones."""
    low = np.argsort(keys.astype(np.uint16), kind="stable")
    high = (keys >> 16).astype(np.uint16).take(low)
    return low.take(np.argsort(high, kind="stable"))


def argsort_descending(values: NDArray[np.floating]) -> Index:
    """The order of `torch.argsort(values, descending=True, stable=True)` for fp32 [N]: NaN first, -0 equal to 0."""
    if len(values) < _FEW:
        order = np.argsort(-values, kind="stable")
        # NumPy puts NaN last.
        return np.roll(order, np.isnan(values).sum()) if len(order) and math.isnan(values[order[-1]]) else order
    bits = (values + np.float32(0.0)).view(np.uint32)
    # A number above another has the larger bits, where positive, and the smaller ones, where negative.
    keys = np.where(bits >> 31, bits, ~bits & 0x7FFFFFFF)
    keys[np.isnan(values)] = 0
    return radix_argsort(keys)
