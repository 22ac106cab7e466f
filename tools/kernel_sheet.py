"""`python -m tools.kernel_sheet [FILE]`: every kernel, compiled ahead of time for devices that need not be present.

Each operation is called as the detector calls it, its launches are caught and compiled for every target, and the
machine code is read. Counted are: registers and spilled bytes of a thread; shared memory of a program; the warps that
fit a multiprocessor by either, as a share of those that it can hold; global loads and stores by bytes a thread, inside
and outside of loops; instructions of the longest innermost loop; and instructions per unit of work: those of that loop,
or of the whole kernel where it has none, times the threads, over the units of a tile. All counts are of the code as it
stands, not of a run; a loop that the compiler unrolled counts all its copies as one round. On gfx942 what is loaded
once for all threads goes through the scalar unit, as arguments do, and is not among the loads.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdet.ops.box_iou import box_iou_cuda
from fastdet.ops.decode import decode_cuda
from fastdet.ops.match import match_cuda
from fastdet.ops.nms import nms_cuda, nms_cuda_cooperative
from fastdet.ops.roi_align import roi_align_backward_cuda, roi_align_cuda
from fastdet.ops.roi_pool import roi_pool_backward_cuda, roi_pool_cuda
from fastdet.ops.sample import sample_cuda
from tools.disassembly import code_of, usage_of
from tools.launches import TARGETS, Launch, launches_of

FILE = Path(__file__).parents[1] / "bench" / "results" / "kernel_sheet.csv"


@dataclass(frozen=True)
class Device:
    """Registers, bytes of shared memory and warps of a multiprocessor; the most shared memory of a program."""

    registers: int
    shared: int
    warps: int
    program_shared: int
    threads_per_warp: int = 32
    reserved_shared: int = 1024


# CUDA C++ programming guide, "technical specifications per compute capability"; AMD CDNA 3 instruction set
# architecture, section 3 (a SIMD has 512 vector registers for each of 64 lanes, and takes 8 waves; a unit has 4 SIMDs).
DEVICES = {
    "sm_80": Device(65536, 164 << 10, 64, 163 << 10),
    "sm_90": Device(65536, 228 << 10, 64, 227 << 10),
    "sm_100": Device(65536, 228 << 10, 64, 227 << 10),
    "gfx942": Device(4 * 512 * 64, 64 << 10, 32, 64 << 10, threads_per_warp=64, reserved_shared=0),
}


def _boxes(*shape: int) -> Tensor:
    return torch.zeros(*shape, 4)


def _nms(groups: int, count: int, max_keep: int, suppress: Callable[..., object] = nms_cuda) -> None:
    valid = torch.ones(groups, count, dtype=torch.bool)
    suppress(_boxes(groups, count), valid, 0.7, max_keep)


def _match(batch: int, num_candidates: int, num_gt: int, masked: bool, allow_low_quality: bool) -> None:
    gt_valid = torch.ones(batch, num_gt, dtype=torch.bool)
    valid, gt_ignore = (torch.ones(batch, num_candidates, dtype=torch.bool), gt_valid) if masked else (None, None)
    masks = gt_valid, valid, gt_ignore
    match_cuda(_boxes(num_candidates), _boxes(batch, num_gt), *masks, 0.7, 0.3, allow_low_quality, 0.5, [1.0] * 4)


def _decode(batch: int, num_logits: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    deltas, logits = (
        torch.zeros(batch, channels, 37, 56, dtype=dtype).contiguous(memory_format=layout)
        for channels in (36, 9 * num_logits)
    )
    sizes = torch.zeros(batch, 2, dtype=torch.int64)
    decode_cuda(deltas, logits, _boxes(9), sizes, torch.zeros(batch), 16, 16, 4.0)


def _sample(batch: int, num_candidates: int, num_samples: int, max_positive: int) -> None:
    label = torch.zeros(batch, num_candidates, dtype=torch.int64)
    sample_cuda(label, torch.zeros(batch, dtype=torch.int64), num_samples, max_positive)


def _roi_pool(batch: int, channels: int, height: int, width: int, num_rois: int, dtype: torch.dtype) -> None:
    rois = torch.zeros(num_rois, 5)
    pooled, argmax = roi_pool_cuda(torch.zeros(batch, channels, height, width, dtype=dtype), rois, 1 / 16, 7, 7)
    roi_pool_backward_cuda(pooled, rois, argmax, 1 / 16, 7, 7, batch, channels, height, width)


def _roi_align(num_levels: int, channels: int, dtype: torch.dtype, sampling_ratio: int, aligned: bool) -> None:
    sides = [(200 >> level, 304 >> level) for level in range(num_levels)]
    levels = [torch.zeros(1, channels, *side, dtype=dtype) for side in sides]
    scales = [2.0 ** -(level + 2) for level in range(num_levels)]
    rules = (sampling_ratio, aligned, 224.0, 4)
    rois, sizes = torch.zeros(512, 5), [1, channels, *(length for side in sides for length in side)]
    pooled = roi_align_cuda(rois, levels, scales, 7, 7, *rules)
    roi_align_backward_cuda(pooled, rois, sizes, scales, *rules)


# Each calls an operation's launcher; the tensors lie on the CPU and nothing runs.
CALLS: dict[str, Callable[[], object]] = {
    "box_iou": lambda: box_iou_cuda(_boxes(1, 12000), _boxes(1, 12000), "iou", 1e-7),
    "box_iou, odd": lambda: box_iou_cuda(_boxes(2, 63), _boxes(2, 255), "iou", 1e-7),
    "generalized_box_iou": lambda: box_iou_cuda(_boxes(2, 64), _boxes(2, 256), "generalized", 1e-7),
    "distance_box_iou": lambda: box_iou_cuda(_boxes(2, 64), _boxes(2, 256), "distance", 1e-7),
    "complete_box_iou": lambda: box_iou_cuda(_boxes(2, 64), _boxes(2, 256), "complete", 1e-7),
    "nms 12000 to 2000": lambda: _nms(1, 12000, 2000),
    "nms 6000 to 300": lambda: _nms(16, 6000, 300),
    "nms of classes": lambda: _nms(16 * 90, 300, 300),
    "nms of few": lambda: _nms(3, 20, 20),
    "nms, cooperative": lambda: _nms(1, 12000, 2000, nms_cuda_cooperative),
    "match of anchors": lambda: _match(1, 18648, 50, True, True),
    "match of proposals": lambda: _match(2, 2008, 5, False, False),
    "decode": lambda: _decode(1, 2, torch.float32, torch.contiguous_format),
    "decode, bf16": lambda: _decode(16, 1, torch.bfloat16, torch.channels_last),
    "decode, fp16": lambda: _decode(2, 1, torch.float16, torch.channels_last),
    "sample of anchors": lambda: _sample(1, 18648, 256, 128),
    "sample of pyramids": lambda: _sample(1, 268_569, 256, 128),
    "sample of proposals": lambda: _sample(16, 2000, 128, 32),
    "sample of many": lambda: _sample(1, 30_000, 20_000, 10_000),
    "roi_pool": lambda: _roi_pool(1, 512, 37, 56, 128, torch.float32),
    "roi_pool, bf16": lambda: _roi_pool(16, 512, 37, 56, 2048, torch.bfloat16),
    "roi_pool, large": lambda: _roi_pool(1, 256, 200, 304, 128, torch.float16),
    "roi_pool, one channel": lambda: _roi_pool(1, 1, 1, 1, 1, torch.float16),
    "roi_align": lambda: _roi_align(4, 256, torch.float32, 2, False),
    "roi_align, bf16": lambda: _roi_align(5, 256, torch.bfloat16, 2, False),
    "roi_align, adaptive": lambda: _roi_align(1, 512, torch.float32, -1, True),
    "roi_align, one channel": lambda: _roi_align(1, 1, torch.float16, 1, False),
}

# What a round of the longest innermost loop does, or a program without loops, from the arguments of its launch; what is
# not here is small beside the others. With an adaptive number of samples, a round of RoI align is one sample of a cell.
UNITS: dict[str, tuple[str, Callable[[dict[str, Any]], int]]] = {
    "_box_iou_kernel": ("pair", lambda a: a["BLOCK_M"]),
    "_filter_kernel": ("pair", lambda a: a["BLOCK_ROWS"] * a["BLOCK_KEPT"]),
    "_best_kernel": ("pair", lambda a: a["BLOCK_K"] * a["BLOCK_G"]),
    "_match_kernel": ("pair", lambda a: a["BLOCK_K"] * a["BLOCK_G"]),
    "_decode_kernel": ("anchor", lambda a: a["BLOCK_N"]),
    "_sample_kernel": ("candidate", lambda a: a["BLOCK_K"]),
    "_roi_pool_kernel": ("cell and channel", lambda a: a["UNROLL"] * a["BLOCK_C"]),
    "_roi_pool_backward_kernel": ("bin and channel", lambda a: a["UNROLL"] * a["BLOCK_C"]),
    "_roi_align_kernel": ("pooled cell and channel", lambda a: a["BLOCK_C"]),
    "_roi_align_backward_kernel": ("bin and channel", lambda a: a["UNROLL"] * a["BLOCK_C"]),
}


@dataclass(frozen=True)
class Row:
    """A kernel as one call launches it on one target; loads and stores are written as "count x bytes"."""

    call: str
    kernel: str
    target: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    occupancy_by_registers: float
    occupancy_by_shared: float
    loads_in_loops: str
    loads_outside: str
    stores_in_loops: str
    stores_outside: str
    loop_instructions: int
    unit: str
    instructions_per_unit: float


def occupancy(device: Device, warps: int, registers: int, shared: int) -> tuple[float, float]:
    """The share of a multiprocessor's warps that programs of `warps` warps can hold, by registers and by shared memory.

    Registers are given to a warp by 8 for each thread, from one of the four quarters of a multiprocessor; a program
    takes `reserved_shared` bytes beside its own.
    """
    registers_of_warp = -(-max(registers, 1) // 8) * 8 * device.threads_per_warp
    by_registers = 4 * (device.registers // 4 // registers_of_warp) // warps
    by_shared = device.shared // max(shared + device.reserved_shared, 1)
    return min(by_registers * warps, device.warps) / device.warps, min(by_shared * warps, device.warps) / device.warps


def _format_widths(widths: Counter[int]) -> str:
    return " + ".join(f"{count} x {width}" for width, count in sorted(widths.items()))


def measure(call: str, launch: Launch, target: str, compiled: Any) -> Row:
    """Read the code of one launch, compiled for one target."""
    usage, code = usage_of(compiled.asm), code_of(compiled.asm)
    device, warps, shared = DEVICES[target], compiled.metadata.num_warps, compiled.metadata.shared
    (loads_in, stores_in), (loads_out, stores_out) = code.accesses(inside=True), code.accesses(inside=False)
    name = launch.kernel.fn.__name__
    unit, units_of = UNITS.get(name, ("", None))
    hot = code.longest_loop() or len(code.instructions)
    per_unit = hot * warps * device.threads_per_warp / units_of(launch.arguments) if units_of else float("nan")
    by_registers, by_shared = occupancy(device, warps, usage.registers, shared)
    return Row(
        call,
        name,
        target,
        warps,
        usage.registers,
        usage.spilled,
        shared,
        round(by_registers, 3),
        round(by_shared, 3),
        _format_widths(loads_in),
        _format_widths(loads_out),
        _format_widths(stores_in),
        _format_widths(stores_out),
        code.longest_loop(),
        unit,
        round(per_unit, 1),
    )


def rows(calls: dict[str, Callable[[], object]] = CALLS) -> Iterator[Row]:
    """The rows of the sheet, call by call; a launch that an earlier call made already is left out."""
    compiled: set[tuple[str, str]] = set()
    # Disassembling takes as long as compiling, and runs in a separate process.
    with ThreadPoolExecutor(2) as pool:
        for call, function in calls.items():
            jobs = []
            for launch in launches_of(function):
                key = launch.source().hash(), str(launch.options())
                if key not in compiled:
                    compiled.add(key)
                    jobs += [pool.submit(measure, call, launch, t, launch.compile(t)) for t in TARGETS]
            yield from (job.result() for job in jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for every target, and count what it takes.")
    parser.add_argument("path", nargs="?", type=Path, default=FILE, metavar="FILE", help=f"default: {FILE.name}")
    path = parser.parse_args().path
    line = "{:<24} {:<28} {:<7} {:>5} {:>4} {:>6} {:>7} {:>5} {:>6} {:>8}  {}"
    print(
        line.format("call", "kernel", "target", "warps", "regs", "spills", "shared", "occ", "loop", "per unit", "loads")
    )
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        for row in rows():
            writer.writerow(asdict(row))
            occupied = f"{min(row.occupancy_by_registers, row.occupancy_by_shared):.0%}"
            columns = row.warps, row.registers, row.spilled_bytes, row.shared_bytes, occupied, row.loop_instructions
            per_unit = "" if row.instructions_per_unit != row.instructions_per_unit else row.instructions_per_unit
            loads = f"in loops {row.loads_in_loops or 'none'}; outside {row.loads_outside or 'none'}"
            print(line.format(row.call, row.kernel, row.target, *columns, per_unit, loads))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
