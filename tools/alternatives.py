"""Two ways to compute the same on this GPU, timed beside each other: which of them is to be the default.

    python -m tools.alternatives --csv FILE [--cooperative]

The first n of many scores: `topk`, or a sort and a slice. With --cooperative, suppression: launch by launch, or in one
cooperative launch, whose programs may wait for each other without end. Each is timed inside a CUDA graph.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.calls import sorted_boxes
from bench.costs import Call
from fastdet.ops.nms import nms_cuda, nms_cuda_cooperative
from tools.tune_blocks import microseconds


class Choice(NamedTuple):
    """What is computed, of which size, and the ways to do it by name; all give the same."""

    what: str
    size: str
    ways: dict[str, Call]


class Row(NamedTuple):
    """One line of the CSV."""

    what: str
    size: str
    way: str
    us: str


# Images, candidates of each, and how many are wanted: VGG16 in training and evaluation, a level of a pyramid.
TOP_N = ((1, 18648, 12000), (1, 18648, 6000), (16, 18648, 6000), (1, 182400, 2000), (8, 45600, 1000))

# Groups, boxes of each, and how many are kept at most: VGG16 in training and evaluation, five levels of 8 images.
SUPPRESSED = ((1, 12000, 2000), (1, 6000, 300), (16, 6000, 300), (40, 2000, 1000))


def first_of_many(device: torch.device, images: int, count: int, wanted: int) -> Choice:
    """The `wanted` highest scores of each image and where they are, in descending order."""
    # All differ: which of equal scores stays is not specified.
    order = [torch.randperm(count, generator=torch.Generator().manual_seed(image)) for image in range(images)]
    scores = torch.stack(order).float().to(device)

    def by_topk() -> tuple[Tensor, Tensor]:
        values, index = scores.topk(wanted, dim=1)
        return values, index

    def by_sort() -> tuple[Tensor, Tensor]:
        values, index = scores.sort(dim=1, descending=True)
        return values[:, :wanted], index[:, :wanted]

    return Choice("first of many", f"{images} x {count} to {wanted}", {"topk": by_topk, "sort": by_sort})


def suppression(device: torch.device, groups: int, count: int, max_keep: int) -> Choice:
    boxes, _ = sorted_boxes(device, groups, count)
    arguments = boxes, torch.ones(groups, count, dtype=torch.bool, device=device), 0.7, max_keep
    return Choice(
        "suppression",
        f"{groups} x {count} to {max_keep}",
        {"launches": lambda: nms_cuda(*arguments), "one": lambda: nms_cuda_cooperative(*arguments)},
    )


def choices(device: torch.device, cooperative: bool) -> Iterator[Choice]:
    if cooperative:
        yield from (suppression(device, *size) for size in SUPPRESSED)
    else:
        yield from (first_of_many(device, *size) for size in TOP_N)


def measure(choice: Choice, clock: Callable[[Call], float]) -> list[Row]:
    """A row for each way. Raises ValueError where one gives another result than the first."""
    expected = next(iter(choice.ways.values()))()
    rows = []
    for way, call in choice.ways.items():
        if not all(map(torch.equal, call(), expected)):
            raise ValueError(f"{choice.what}, {choice.size}: {way} differs")
        rows.append(Row(choice.what, choice.size, way, f"{clock(call):.2f}"))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time alternatives beside each other on the GPU.")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--cooperative", action="store_true", help="suppression in one launch beside several")
    options = parser.parse_args(arguments)
    with options.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        for choice in choices(torch.device("cuda"), options.cooperative):
            for row in measure(choice, microseconds):
                writer.writerow(row)
                print(f"{row.us:>9} us  {row.way:<8} {row.what}, {row.size}", flush=True)
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
