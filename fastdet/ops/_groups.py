"""Groups of different sizes as padded rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Padded rows that take a moment, however few of them there are.
_LITTLE = 1 << 16


def padded_groups(order: Tensor, group: Tensor, sizes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The members of all groups, each in the order given; a host sync.

    Args:
        order: int64 [N], what is grouped.
        group: int64 [N], the group of each, from 0.
        sizes: int64 [groups], their numbers.

    Yields:
        rows int64 [M, size], the members of M groups, and valid bool [M, size], False for padding. All groups at once
        where padding them to the largest is little work, at most eight times that of many rows; else those of each
        power of two that their sizes are padded to.
    """
    by_group = group.argsort(stable=True)
    first = sizes.cumsum(0) - sizes
    on_host = sizes.tolist()
    padded = [1 << (size - 1).bit_length() for size in on_host]
    if len(on_host) * max(on_host) <= max(8 * len(order), _LITTLE):
        padded = [max(on_host)] * len(on_host)
    for size in sorted(set(padded)):
        members = torch.tensor([i for i, each in enumerate(padded) if each == size], device=order.device)
        slot = torch.arange(size, device=order.device)
        valid = slot < sizes[members, None]
        yield order[by_group[torch.where(valid, first[members, None] + slot, 0)]], valid
