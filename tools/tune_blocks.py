"""Block shapes and warps around those that `kernels/` chooses: which would be faster on this GPU, and still right.

    python -m tools.tune_blocks --csv FILE [--seconds N] [--only NAME ...]

For each operation the search begins at what the kernel's `config(...)` returns for the call, and at what a target lists
beside it: several fields that only help together. From the fastest it halves and doubles one field at a time, goes on
from the fastest of these if that gains enough, and ends where none does. Every result is
compared, bit for bit, with that of the default; one that differs is reported and never gone on from. Each operation
runs in a separate process, so that a launch that breaks the GPU's context ends that operation alone.
"""

import argparse
import csv
import functools
import importlib
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import calls
from bench.calls import OpCall, kernels_on, tensors

# A gain below this share of the time is noise.
_GAIN = 0.02

Config = Any  # the NamedTuple of a kernel's module: ints, bools


class Target(NamedTuple):
    """A choice to sweep: `function` of `fastdet.kernels.<module>`, as the operation called by `build` makes it.

    What does not `fits` is not tried: the kernels may never end with it. `beside` changes several fields at a time.
    """

    build: Callable[[torch.device, bool], OpCall]
    module: str
    function: str = "config"
    fits: Callable[[Config], bool] = lambda config: True
    beside: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.build.__name__}: {self.module}.{self.function}"

    def exists(self) -> bool:
        return hasattr(importlib.import_module(f"fastdet.kernels.{self.module}"), self.function)


def nms_fits(config: Config) -> bool:
    if config.finish_rows < 32:
        return False
    if not config.settled:
        return True
    whole = config.settled >= config.chunk >= config.overlap_rows >= 32 and config.step >= max(config.filter_rows, 32)
    return whole and config.filter_span >= config.filter_kept


# One program a group, from few rows at a time in few warps to many.
_ALONE = tuple(
    {"settled": 0, "chunk": 0, "finish_rows": rows, "finish_kept": kept, "finish_warps": warps}
    for rows, kept, warps in (
        (32, 16, 1), (32, 32, 2), (32, 32, 4), (64, 32, 4), (64, 32, 8), (128, 32, 8), (128, 64, 16), (128, 32, 16)
    )
)  # fmt: skip
_ONCE, _TWICE = {"at_once": True}, {"at_once": False, "overlap_rows": 128}


def _wide(settled: int, chunk: int, steps: int, settle: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"settled": settled, "chunk": chunk, "warps": max(chunk // 128, 1), "steps": steps, **settle, **more}


NMS_LARGE = (
    _wide(2048, 1024, 3, _TWICE),
    _wide(2048, 1024, 3, _ONCE, warps=16),
    _wide(2048, 1024, 3, {"at_once": True, "overlap_rows": 128}),
    _wide(2048, 1024, 3, {"at_once": True, "overlap_rows": 512}),
    _wide(2048, 1024, 3, _ONCE, filter_span=512),
    _wide(2048, 1024, 3, _ONCE, filter_kept=32),
    _wide(2048, 1024, 3, _ONCE, filter_rows=128, filter_kept=32),
    _wide(1024, 1024, 5, _ONCE),
    _wide(1024, 1024, 5, _TWICE),
    _wide(2048, 512, 3, _ONCE, overlap_rows=256),
    _wide(1024, 512, 5, _ONCE, overlap_rows=128),
    _wide(2048, 1024, 3, _ONCE, step=8192),
    _wide(4096, 1024, 2, _ONCE),
)
NMS_FEW_KEPT = (
    _wide(512, 512, 2, _TWICE),
    _wide(1024, 512, 2, _ONCE),
    _wide(1024, 1024, 1, _ONCE, overlap_rows=256),
    _wide(512, 512, 2, _ONCE, warps=8),
    _wide(512, 256, 2, _ONCE),
    _wide(512, 512, 3, _ONCE, step=2048),
    _wide(512, 512, 1, _ONCE),
)
NMS_PYRAMID = (
    _wide(1024, 1024, 1, _TWICE),
    _wide(1024, 512, 1, _TWICE),
    _wide(2048, 1024, 0, _ONCE, overlap_rows=256),
    _wide(2048, 1024, 0, _TWICE, warps=16),
    _wide(2048, 1024, 0, {"at_once": False, "overlap_rows": 256}),
    *_ALONE,
)
NMS_CLASSES = (*_ALONE, _wide(512, 512, 0, _TWICE, step=32, filter_rows=32, filter_kept=64, filter_span=256))
NMS_SMALL = (
    _wide(1024, 1024, 0, _ONCE, warps=16),
    _wide(1024, 1024, 0, _TWICE),
    _wide(1024, 1024, 0, {"at_once": True, "overlap_rows": 128}),
    _wide(1024, 512, 0, _ONCE),
    *_ALONE,
)


def sample_fits(config: Config) -> bool:
    return config.block_k >= config.scan_k


MATCH = (
    {"block_g": 16, "num_warps": 2},
    {"block_g": 64, "num_warps": 8},
    {"block_g": 32, "num_warps": 2},
    {"block_g": 16, "num_warps": 1},
    {"best_block_g": 2, "best_block_k": 128},
    {"best_block_g": 8, "best_block_k": 32},
)
# Two channels per thread, in programs of more or fewer of them; four, and eight.
ROI_POOL_BACKWARD = (
    {"block_c": 64, "num_warps": 1},
    {"block_c": 128, "num_warps": 2},
    {"block_c": 512, "num_warps": 8},
    {"unroll": 4},
    {"unroll": 16},
    {"block_c": 128, "num_warps": 2, "unroll": 16},
    {"num_warps": 2},
    {"block_c": 128, "num_warps": 1},
    {"num_warps": 1},
)

TARGETS = (
    Target(calls.nms_untrained, "nms", fits=nms_fits, beside=NMS_LARGE),
    Target(calls.nms_classes, "nms", fits=nms_fits, beside=NMS_CLASSES),
    Target(calls.nms_pyramid, "nms", fits=nms_fits, beside=NMS_PYRAMID),
    Target(calls.nms_training, "nms", fits=nms_fits, beside=NMS_LARGE[:5]),
    Target(calls.nms_inference, "nms", fits=nms_fits, beside=NMS_FEW_KEPT),
    Target(calls.nms_classes_of_one, "nms", fits=nms_fits, beside=(_wide(512, 512, 1, _TWICE), *_ALONE)),
    Target(calls.nms_all, "nms", fits=nms_fits, beside=NMS_SMALL),
    Target(calls.match, "match", beside=MATCH),
    Target(calls.match_few, "match", beside=({"block_g": 16, "num_warps": 2}, {"best_block_g": 8})),
    Target(calls.match_many, "match", beside=MATCH),
    Target(calls.decode, "decode"),
    Target(calls.decode_batch, "decode"),
    Target(calls.sample_anchors, "sample", fits=sample_fits, beside=({"scan_k": 1024}, {"scan_k": 512})),
    Target(calls.sample_proposals, "sample", fits=sample_fits),
    Target(calls.roi_pool, "roi_pool"),
    Target(calls.roi_pool_gradient, "roi_pool", "config_backward", beside=ROI_POOL_BACKWARD),
    Target(calls.roi_pool_training, "roi_pool", "config_backward", beside=ROI_POOL_BACKWARD),
    Target(calls.roi_align, "roi_align"),
    Target(calls.roi_align_gradient, "roi_align_backward"),
    Target(calls.box_iou, "box_iou"),
)


class Measurement(NamedTuple):
    """One configuration: microseconds, None where `note` is the reason why it does not count."""

    us: float | None
    note: str = ""


class Row(NamedTuple):
    """One line of the CSV; `ratio` is the default's time over this one's: above 1 is faster."""

    op: str
    size: str
    config: str
    us: str
    ratio: str
    note: str


def describe(config: Config) -> str:
    return " ".join(f"{field}={value}" for field, value in config._asdict().items())


def neighbors(config: Config) -> list[Config]:
    """Those with one field halved or doubled; what compiles longest, the largest blocks, comes last."""
    values = {field: value for field, value in config._asdict().items() if type(value) is int and value > 0}
    halved = [config._replace(**{field: value // 2}) for field, value in values.items() if value > 1]
    return halved + [config._replace(**{field: value * 2}) for field, value in reversed(values.items())]


def climb(
    start: Config,
    measure: Callable[[Config], Measurement],
    fits: Callable[[Config], bool],
    beside: Iterable[Config] = (),
) -> Iterator[tuple[Config, Measurement]]:
    """Measure `start` and those `beside` it, the fastest's neighbors that fit, and so on while that gains."""
    best, tried = (start, measure(start)), {start}
    yield best
    for config in beside if best[1].us is not None else ():
        if config not in tried and fits(config):
            tried.add(config)
            measured = measure(config)
            yield config, measured
            best = min(best, (config, measured), key=lambda each: each[1].us or math.inf)
    while best[1].us is not None:
        center, limit = best[0], best[1].us * (1 - _GAIN)
        for config in neighbors(center):
            if config not in tried and fits(config):
                tried.add(config)
                measured = measure(config)
                yield config, measured
                if measured.us is not None and measured.us < min(limit, best[1].us):
                    best = config, measured
        if best[0] == center:
            return


@contextmanager
def intercept_choice(target: Target, change: Callable[[Config], Config]) -> Iterator[list[Config]]:
    """Pass the kernel's choice through `change`; yields the list of the original choices."""
    module = importlib.import_module(f"fastdet.kernels.{target.module}")
    original, choices = getattr(module, target.function), []

    def choose(*args: Any, **kwargs: Any) -> Config:
        choices.append(original(*args, **kwargs))
        return change(choices[-1])

    with mock.patch.object(module, target.function, choose):
        yield choices


def apply_difference(before: Config, after: Config, config: Config) -> Config:
    """`config` with the fields in which `before` and `after` differ: all the choices of one call change alike."""
    pairs = zip(before._fields, before, after, strict=True)
    return config._replace(**{field: new for field, old, new in pairs if old != new})


def microseconds(run: Callable[[], object]) -> float:
    """Median time of a call inside a CUDA graph; where it cannot be captured, of calls with the cache flushed."""
    from triton.testing import do_bench, do_bench_cudagraph

    try:
        return statistics.median(do_bench_cudagraph(run, rep=10, return_mode="all")) * 1e3
    except Exception as error:
        torch.cuda.synchronize()
        print(f"  timed without a CUDA graph: {one_line(error)}", flush=True)
        return do_bench(run, warmup=5, rep=20, return_mode="median") * 1e3


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def sweep(
    target: Target, device: torch.device, small: bool, clock: Callable[[Callable[[], object]], float]
) -> Iterator[Row]:
    """The rows of one target, the default's first. Raises where the default itself fails."""
    call = target.build(device, small)
    with intercept_choice(target, lambda config: config) as choices, kernels_on(device):
        expected = tensors(call.run())
    if not choices:
        raise LookupError(f"the call never runs {target.module}.{target.function}")
    default = choices[0]

    def measure(config: Config) -> Measurement:
        try:
            with intercept_choice(target, functools.partial(apply_difference, default, config)), kernels_on(device):
                if not all(map(torch.equal, tensors(call.run()), expected)):
                    return Measurement(None, "differs from the default's result")
                return Measurement(clock(call.run))
        except Exception as error:
            if config == default:
                raise
            return Measurement(None, one_line(error))

    reference: float | None = None
    beside = [default._replace(**changes) for changes in target.beside]
    for config, measured in climb(default, measure, target.fits, beside):
        reference = reference or measured.us
        us, ratio = "", ""
        if measured.us is not None and reference is not None:
            us, ratio = f"{measured.us:.2f}", f"{reference / measured.us:.3f}"
        yield Row(target.name, call.size, describe(config), us, ratio, measured.note)


def sweep_into(target: Target, path: Path) -> None:
    """Sweep on the GPU, each row written as it is found."""
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        for row in sweep(target, torch.device("cuda"), False, microseconds):
            writer.writerow(row)
            file.flush()
            print(f"  {row.us or '-':>9} us  {row.ratio or '-':>6}  {row.config}  {row.note}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sweep block shapes and warps on the GPU.")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0, help="for all together")
    parser.add_argument("--only", nargs="*", help="parts of the names of the targets wanted")
    options = parser.parse_args(arguments)
    wanted = [target for target in TARGETS if not options.only or any(part in target.name for part in options.only)]
    absent = [target for target in wanted if not target.exists()]
    for target in absent:
        print(f"cannot be swept: fastdet.kernels.{target.module} has no {target.function}", flush=True)
    present = [target for target in wanted if target not in absent]
    with options.csv.open("w", newline="") as file:
        csv.writer(file).writerow(Row._fields)
    end = time.monotonic() + options.seconds
    failed = list(absent)
    for number, target in enumerate(present):
        share = (end - time.monotonic()) / (len(present) - number)
        print(f"{target.name}, {share:.0f} s", flush=True)
        # CUDA is not initialized here, so that a fork may use it: that saves each process the imports.
        process = multiprocessing.get_context("fork").Process(target=sweep_into, args=(target, options.csv))
        process.start()
        process.join(max(share, 0.0))
        if process.is_alive():
            print("  stopped: its time is up", flush=True)
            process.kill()
            process.join()
        elif process.exitcode:
            failed.append(target)
    for target in failed:
        print(f"failed: {target.name}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
