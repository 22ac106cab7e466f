"""The processes of a run, one for each device, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastdet.models.losses import divisor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """How many processes share a run, and which of them this is. Each call is one of all of them, but of the first two.

    Attributes:
        rank: of this one, from 0.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """Those of `items` that are this one's."""
        return items[self.rank :: self.count]

    def divisors(self, learns: bool, counts: Tensor) -> Tensor:
        """What this one's losses are divided by, so that the mean of all gradients is that of the whole batch.

        Args:
            learns: False for one without images of the batch, whose losses count nothing.
            counts: fp32 [4], as of `fastdet.models.losses.count`.
        """
        total = counts.clone() if learns else torch.zeros_like(counts)
        dist.all_reduce(total)
        return divisor(total) / self.count if learns else torch.full_like(total, torch.inf)

    def mean(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The means of as many numbers of each."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        means: list[float] = (total / self.count).tolist()
        return means

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is True of one of them."""
        if self.count == 1:
            return flag
        found = torch.tensor(float(flag), device=device)
        dist.all_reduce(found)
        return bool(found > 0)

    def gather(self, value: Any) -> list[Any]:
        """The value of each, which can be pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


ALONE = Processes()


@contextmanager
def join(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that `torchrun` has started, this one among them, and the device of this one; else it alone.

    They talk through NCCL on GPUs, of which each has the one of its number on its machine, and through Gloo on CPUs.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()


def was_restarted() -> bool:
    """Whether `torchrun` has started the processes anew after one had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
