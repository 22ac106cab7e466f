"""What the GPU does in a training step, a detection and a suppression, kernel by kernel, from torch's profiler.

    python -m tools.kernel_times --csv FILE

The steps are those of the VGG16 detector at 600 x 901 pixels, one image, bf16, each one CUDA graph; the suppression is
12000 boxes to 2000, launched kernel by kernel. Where the profiler records nothing the columns of times are empty.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import calls, whole_step
from bench.costs import Call
from bench.whole_step import Case

# Calls that are profiled together; times are their means.
REPEATS = 5


class Row(NamedTuple):
    """One kernel of one call: how often it runs in a call, its microseconds in a call, and its share of all kernels'.

    The first row of a call is the whole of it, timed without the profiler.
    """

    call: str
    kernel: str
    count: str
    us: str
    share: str


def workloads(device: torch.device, small: bool) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Names of calls and what builds them; `small` ones run on a CPU."""
    name, height, width = ("mobilenet_v2", 64, 96) if small else ("vgg16", 600, 901)
    for title, training in (("training step", True), ("detection", False)):
        case = Case(name, height, width, 1, training, torch.bfloat16, device)
        yield f"{title}, {name}, graphed", lambda case=case: whole_step.graphed(case).padded
    yield "nms", lambda: calls.nms_training(device, small).run


def microseconds(call: Call, device: torch.device) -> float:
    """The mean time of a call among others, of the host and the device together."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / REPEATS * 1e6


def device_events(call: Call, device: torch.device) -> list[tuple[str, float]]:
    """(name, microseconds) of all that ran on the device in `REPEATS` calls; on a CPU of the operators."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as profiled:
        for _ in range(REPEATS):
            call()
        _synchronize(device)
    events = (event for event in profiled.events() if event.device_type == kind)
    return [(event.name, _self_us(event)) for event in events if kind == DeviceType.CUDA or event.cpu_parent is None]


def _self_us(event: Any) -> float:
    return event.time_range.end - event.time_range.start


def table(call: str, whole_us: float, events: Iterable[tuple[str, float]]) -> list[Row]:
    """The rows of a call, what takes longest first."""
    sums: dict[str, tuple[int, float]] = {}
    for name, us in events:
        count, total = sums.get(name, (0, 0.0))
        sums[name] = count + 1, total + us
    everything = sum(total for _, total in sums.values())
    rows = [Row(call, "the whole call", "1", f"{whole_us:.2f}", "")]
    for name, (count, total) in sorted(sums.items(), key=lambda item: -item[1][1]):
        share = f"{total / everything:.3f}" if everything else ""
        rows.append(Row(call, name, f"{count / REPEATS:g}", f"{total / REPEATS:.2f}", share))
    if not sums:
        rows.append(Row(call, "the profiler recorded nothing", "", "", ""))
    return rows


def lines(rows: Sequence[Row]) -> list[str]:
    return [f"{row.us:>10} us  {row.count:>5} x  {row.share:>6}  {row.kernel[:90]}" for row in rows]


def measure(device: torch.device, small: bool) -> Iterator[list[Row]]:
    """The rows of each call."""
    for name, build in workloads(device, small):
        call = build()
        with calls.kernels_on(device):
            for _ in range(3):
                call()
            yield table(name, microseconds(call, device), device_events(call, device))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times of every kernel in a step.")
    parser.add_argument("--csv", type=Path, required=True)
    options = parser.parse_args(arguments)
    with options.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        for rows in measure(torch.device("cuda"), small=False):
            writer.writerows(rows)
            file.flush()
            print(f"==== {rows[0].call}", *lines(rows), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
