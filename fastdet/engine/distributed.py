"""The processes of a run, one for each device, as `torchrun` starts them."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fastdet.models.losses import divisor

T = TypeVar("T")

# How long the processes wait for one another at the start.
_TIMEOUT = timedelta(minutes=10)


class OtherFailedError(Exception):
    """Another process of the run failed before this one did, and gives the reason."""


@dataclass(frozen=True)
class Processes:
    """How many processes share a run, and which of them this is.

    Each method from `divisors` on is a call of all of them, and fails where another process is gone. Numbers of the
    host are exchanged by the hosts: no call is a host sync.

    Attributes:
        rank: of this one, from 0.
        count: of all.
        store: of `torchrun`, which lasts as long as its command.
    """

    rank: int = 0
    count: int = 1
    store: dist.Store | None = None

    @property
    def writes(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def mark_begun(self) -> None:
        """Note that the run has begun, for processes that `torchrun` starts in place of these."""
        if self.store is not None and self.writes:
            self.store.set("begun", "")

    def has_begun(self) -> bool:
        """Whether processes in place of which `torchrun` has started these had noted so."""
        return self.store is not None and bool(self.store.check(["begun"]))

    def check_batch_size(self, batch_size: int) -> None:
        """Raises ValueError if a batch has fewer images than there are processes."""
        if batch_size < self.count:
            raise ValueError(f"batch_size {batch_size} is less than one image for each of {self.count} processes")

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

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum of all processes' tensors in the place of each of these, of floating point on one device."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def largest(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """The largest of all processes' numbers, place by place."""
        found = torch.tensor(numbers, device="cpu")
        if self.count > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return tuple(found.tolist())

    def any(self, flag: bool) -> bool:
        """Whether it is True of one of them."""
        return bool(self.largest([flag])[0]) if self.count > 1 else flag

    def gather(self, value: Any) -> list[Any]:
        """The value of each, which can be pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, compute: Callable[[], T]) -> T:
        """What `compute` returns in the first of them, where alone it is called; it can be pickled."""
        values = [compute() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        return values[0]  # type: ignore[return-value]


ALONE = Processes()


@contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """The processes that `torchrun` has started, this one among them; else it alone.

    They talk through NCCL on GPUs, and through Gloo on CPUs.

    Args:
        device: of this one, as of `local_device`.

    Raises:
        OtherFailedError: in place of any exception, if another process has raised one before.
        ConnectionError: another process was killed, or cannot be reached.
    """
    if not _is_launched():
        yield ALONE
        return
    store, rank, count = next(rendezvous("env://"))
    start = dist.PrefixStore(_agree_on_start(store, rank, count), store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=start, rank=rank, world_size=count
    )
    try:
        yield Processes(rank, count, store)
    except BaseException as error:
        if not _is_first_to_fail(start):
            raise OtherFailedError from error
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            reason = re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0].splitlines()[0]
            raise ConnectionError(f"the connection to another process of the run is lost: {reason}") from error
        raise
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The device of this process, torch's current one then: of those that `torchrun` has started each has the GPU of
    its number on its machine.

    Raises:
        ValueError: there is none.
    """
    if device.type != "cuda":
        return device
    if _is_launched():
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(f"more processes than the {count} GPUs of this machine")
        device = torch.device("cuda", number)
    if device.index is not None:
        # The current one: pinned memory and what is supported are asked of it, and its context takes memory.
        torch.cuda.set_device(device)
    return device


def count_on_machine() -> int:
    """How many of the processes of the run this machine has."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _is_launched() else 1


def _is_launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def _agree_on_start(store: dist.Store, rank: int, count: int) -> str:
    """A name that the processes of one start share, and those of no other.

    The store of `torchrun` still has what the processes before a restart have left in it, such as addresses. How often
    it was restarted may differ between nodes.
    """
    if rank == 0:
        name = secrets.token_hex(8)
        store.set("start", name)
        store.wait([f"{name}/{other}" for other in range(1, count)], _TIMEOUT)
        # No later process is to take this one for its own.
        store.set("start", "")
        store.set(f"{name}/complete", "")
        return name
    name, deadline = "", time.monotonic() + _TIMEOUT.total_seconds()
    while not (name and store.check([f"{name}/complete"])):
        name = store.get("start").decode() or name
        store.set(f"{name}/{rank}", "")
        if time.monotonic() > deadline:
            raise ConnectionError("the first process of the run does not come")
        time.sleep(0.05)
    return name


def _is_first_to_fail(start: dist.Store) -> bool:
    try:
        return start.add("failed", 1) == 1
    except RuntimeError:
        # The store is gone, with what the others have noted.
        return True
