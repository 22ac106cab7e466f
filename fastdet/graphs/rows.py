"""What training steps return, kept on the device until it is read in one piece."""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastdet.graphs.step import COLUMNS
from fastdet.models.losses import NAMES

# What is known of a step on the host, such as the names of its images.
About = TypeVar("About")


class StepRow(NamedTuple, Generic[About]):
    """A step, from 1, what is known of it, and its values by name: the "loss" and those of `COLUMNS`."""

    step: int
    about: About
    values: dict[str, float]


class UnreadRows(Generic[About]):
    """The rows of steps since they were read last."""

    def __init__(self) -> None:
        self._unread: list[tuple[int, About, Tensor]] = []

    def __len__(self) -> int:
        return len(self._unread)

    def add(self, step: int, about: About, row: Tensor) -> None:
        """Keep a row [len(COLUMNS)], which must not be written over."""
        self._unread.append((step, about, row))

    def read(self, checked: int) -> tuple[list[StepRow[About]], list[StepRow[About]]]:
        """All rows, those of which the first `checked` columns are finite and the others: a host sync. They are
        forgotten then."""
        if not self._unread:
            return [], []
        rows = torch.stack([row for _, _, row in self._unread]).tolist()
        finite, others = list[StepRow[About]](), list[StepRow[About]]()
        for (step, about, _), values in zip(self._unread, rows, strict=True):
            named = {"loss": sum(values[: len(NAMES)]), **dict(zip(COLUMNS, values, strict=True))}
            (finite if all(map(math.isfinite, values[:checked])) else others).append(StepRow(step, about, named))
        self._unread = []
        return finite, others


def describe(row: StepRow[About], checked: int, images: str) -> str:
    """That a step is not finite, with its first `checked` columns and the names of its images."""
    found = ", ".join(f"{name} {row.values[name]:.3g}" for name in COLUMNS[:checked])
    return f"step {row.step}: a loss or gradient is not finite ({found}), images {images}"
