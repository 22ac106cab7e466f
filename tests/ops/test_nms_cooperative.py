"""The programs of the cooperative launch side by side: each interpreted in a process, on memory that all of them share.

Programs that wait for each other cannot be interpreted one after another.
"""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from fastdet.kernels import nms, nms_cooperative
from fastdet.ops.cpu.nms import nms_cpu, round_threshold_down
from tests.helpers.checks import random_boxes
from tools import alternatives

SMALL = nms.Config(
    settled=64,
    chunk=32,
    overlap_rows=32,
    step=64,
    steps=0,
    filter_rows=16,
    filter_kept=8,
    filter_span=16,
    warps=1,
    at_once=True,
    finish_rows=32,
    finish_kept=8,
    finish_warps=1,
)


def run_program(number: int, programs: int, launches: int, together: Any, launch: Callable[[], None]) -> None:
    """Interpret one program of each launch, at a pace of its own between any two atomic operations."""
    from triton.runtime import interpreter

    pace, builder = random.Random(number), interpreter.interpreter_builder
    set_grid_dim, set_grid_idx, atomic = builder.set_grid_dim, builder.set_grid_idx, builder.create_atomic_rmw

    def slow_atomic(*args: Any) -> Any:
        time.sleep(pace.choice((0.0, 0.0, 0.002)))
        return atomic(*args)

    def dim_of_all(*_: int) -> None:
        set_grid_dim(programs, 1, 1)

    def idx_of_one(*_: int) -> None:
        set_grid_idx(number, 0, 0)

    with (
        mock.patch.multiple(builder, set_grid_dim=dim_of_all, set_grid_idx=idx_of_one, create_atomic_rmw=slow_atomic),
        # Else each would write back all memory as it was when it ended.
        mock.patch.object(interpreter.GridExecutor, "_restore_args_dev"),
    ):
        for _ in range(launches):
            together.wait(50)
            launch()


def shared(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Memory that holds what no kernel would write there."""
    return torch.full(shape, 77, dtype=dtype).share_memory_()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="is interpreted, by several processes")
@pytest.mark.kernel
@pytest.mark.parametrize("programs", [2, 5])
@pytest.mark.parametrize("max_keep", [150, 40])
def test_programs_side_by_side_equal_cpu(programs: int, max_keep: int) -> None:
    """Groups that end at once, early and late; launched twice on the same scratch."""
    groups, count, settled = 3, 150, SMALL.settled
    boxes = random_boxes(groups, count, side=60.0).share_memory_()
    left = torch.arange(count) * 0.2
    # A chain, in which each box overlaps the next.
    boxes[0] = torch.stack([left, left * 0, left + 1, left * 0 + 1], 1)
    valid = (torch.rand(groups, count) < 0.9).share_memory_()
    valid[1, 20:] = False
    tensors = {
        "survivors": shared(groups, settled),
        "overlap": shared(groups, settled // 32, settled),
        "removed": shared(groups, SMALL.step, dtype=torch.int8),
        "state": shared(5, groups),
        "kept": shared(groups, max_keep, 4, dtype=torch.float32),
        "index": shared(groups, max_keep, dtype=torch.int64),
        "count": shared(groups, dtype=torch.int64),
    }
    arrivals, _, _, barrier, needed = tensors["state"]
    for counter in (arrivals, barrier, needed):
        counter.zero_()

    def launch() -> None:
        threshold = round_threshold_down(0.5)
        nms_cooperative.launch(boxes, valid, **tensors, iou_threshold=threshold, config=SMALL)

    context = multiprocessing.get_context("fork")
    together = context.Barrier(programs)
    processes = [context.Process(target=run_program, args=(i, programs, 2, together, launch)) for i in range(programs)]
    for process in processes:
        process.start()
    end = time.monotonic() + 60
    for process in processes:
        process.join(max(end - time.monotonic(), 0.0))
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * programs
    index, number = nms_cpu(boxes, valid, 0.5, max_keep)
    assert torch.equal(tensors["index"], index)
    assert torch.equal(tensors["count"], number)
    assert (arrivals == 0).all()
    assert barrier[0] in (0, -(2**31))
    assert needed[0] == 0


@pytest.mark.kernel
def test_both_forms_are_timed_on_equal_results(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nms, "config", lambda *sizes: SMALL)
    for size in ((1, 100, 60), (2, 50, 50)):
        rows = alternatives.measure(alternatives.suppression(kernel_device, *size), lambda call: 1.0)
        assert [row.way for row in rows] == ["launches", "one"]


def test_programs_fit_the_device() -> None:
    """At most one a multiprocessor, and none that has no block."""
    for groups, num_boxes, max_keep, expected in ((1, 12000, 2000, 132), (1, 700, 200, 40), (5, 700, 200, 132)):
        config = nms_cooperative.config(groups, num_boxes, max_keep)
        assert nms_cooperative.num_programs(groups, max_keep, config, 132) == expected
