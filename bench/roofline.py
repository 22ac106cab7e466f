"""The least an operation has to move and to compute, and how long a device takes for that: its floor.

Work is counted in phases, each of which needs the whole of the one before. A phase takes as long as the slowest of its
parts, and no less than one kernel in a CUDA graph.
"""

import statistics
import time
from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import torch

# fp32 instructions that decide whether the IoU of two boxes is above a threshold, without a division.
PAIR_INSTRUCTIONS = 17


class Work(NamedTuple):
    """One phase: bytes to and from memory, fp32 instructions (one each lane), floating-point operations in bf16."""

    bytes: float = 0.0
    instructions: float = 0.0
    flops: float = 0.0


class Device(NamedTuple):
    """What a device does in a microsecond, None where that is not known, and the microseconds of a graph's node."""

    bytes: float
    instructions: float | None = None
    flops: float | None = None
    node_us: float = 0.0


# 132 multiprocessors of 128 lanes. Rates are those that a large copy, a long kernel and a large product reach, below
# the data sheets' 3.35 and 4.8 TB/s, 1.98 GHz and 989 TFLOP/s. The names are CUDA's, of the SXM parts.
DEVICES = {
    "NVIDIA H100 80GB HBM3": Device(bytes=3.0e6, instructions=132 * 128 * 1725, flops=790e6, node_us=1.5),
    "NVIDIA H200": Device(bytes=4.2e6, instructions=132 * 128 * 1725, flops=790e6, node_us=1.5),
}


def this_cpu(num_bytes: int = 1 << 28) -> Device:
    """Memory bandwidth alone, measured: the median of copies of `num_bytes`, each byte read and written."""
    source, target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
    microseconds = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        microseconds.append((time.perf_counter() - start) * 1e6)
    return Device(bytes=2 * num_bytes / statistics.median(microseconds))


def floor_us(device: Device, phases: Sequence[Work]) -> float | None:
    """Microseconds of all phases, None where the device's rate for one of their parts is not known."""
    total = 0.0
    for phase in phases:
        rates = device.bytes, device.instructions, device.flops
        needed = [(amount, rate) for amount, rate in zip(phase, rates, strict=True) if amount]
        if any(rate is None for _, rate in needed):
            return None
        total += max(device.node_us, *(amount / rate for amount, rate in needed if rate))
    return total


def box_iou(num_first: int, num_second: int) -> tuple[Work]:
    return (Work(bytes=4 * num_first * num_second + 16 * (num_first + num_second)),)


def decode(num_anchors: int, num_logits: int, itemsize: int) -> tuple[Work]:
    """Read 4 deltas and the logits of each anchor, write its box and score."""
    return (Work(bytes=num_anchors * ((4 + num_logits) * itemsize + 20)),)


def match(num_candidates: int, num_gt: int) -> tuple[Work, Work]:
    """The best of each side; then labels, indices, IoUs and deltas, for which every pair is computed again."""
    pairs = PAIR_INSTRUCTIONS * num_candidates * num_gt
    return (
        Work(bytes=16 * (num_candidates + num_gt), instructions=pairs),
        Work(bytes=(16 + 8 + 4 + 8 + 16) * num_candidates + 16 * num_gt, instructions=pairs),
    )


def nms(groups: int, count: int) -> tuple[Work]:
    """All pairs of each group. What stops once enough are kept need not look at all, and may go below."""
    return (Work(bytes=16 * groups * count, instructions=PAIR_INSTRUCTIONS * groups * comb(count, 2)),)


def sample(num_candidates: int, num_samples: int) -> tuple[Work]:
    """Read a label of 8 bytes a candidate, write an index and a weight a sample."""
    return (Work(bytes=8 * num_candidates + 12 * num_samples),)


def roi_pool(num_inputs: int, num_outputs: int, itemsize: int) -> tuple[Work]:
    """Read the features once, write each maximum and where it was (2 bytes). Its gradient moves as much."""
    return (Work(bytes=itemsize * num_inputs + (itemsize + 2) * num_outputs),)


def roi_align(num_inputs: int, num_outputs: int, itemsize: int) -> tuple[Work]:
    """Read the features of all levels once, write each mean. Its gradient moves as much."""
    return (Work(bytes=itemsize * (num_inputs + num_outputs)),)


def vgg16_training(batch: int) -> tuple[Work, Work]:
    """Forward and backward at 600 x 901; then SGD: gradient read, weight and momentum read and written."""
    return Work(flops=887e9 * batch), Work(bytes=137e6 * 5 * 4)


def vgg16_inference(batch: int) -> tuple[Work]:
    return (Work(flops=411e9 * batch),)
