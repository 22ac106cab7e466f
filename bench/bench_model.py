"""The whole step in every way there is to run it, beside torchvision's detector with the same weights and settings."""

import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import costs, roofline, whole_step
from bench.between_networks import TimerOutsideNetworks
from bench.whole_step import Case

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# On a GPU the reference model at its own size; on a CPU the small backbone, which finishes.
NAME, HEIGHT, WIDTH, BATCHES = ("vgg16", 600, 901, (1, 4, 16)) if CUDA else ("mobilenet_v2", 320, 480, (1, 4))
DTYPES = (torch.bfloat16, torch.float32)
CASES = [
    Case(NAME, HEIGHT, WIDTH, batch, training, dtype, DEVICE)
    for batch in BATCHES
    for dtype in DTYPES
    for training in (True, False)
]
# Last what has to be compiled; that takes a minute for a case on two cores, so there one batch size has to do.
WAYS = [(case, way) for case in CASES for way in ("graphed", "eager", "fused") if way != "fused" or not case.training]
WAYS += [(case, "compiled") for case in CASES if CUDA or case.batch == BATCHES[-1]]
WAYS += [(case, "graphed, compiled") for case in CASES if CUDA]


def op_name(case: Case, way: str = "eager") -> str:
    mode = "train" if case.training else "infer"
    return f"model, {mode}" + ("" if way == "eager" else f", {way}")


def size(case: Case) -> str:
    return f"{case.name} {case.height} x {case.width}, batch {case.batch}"


def case_id(value: object) -> str:
    if isinstance(value, Case):
        mode, dtype = "train" if value.training else "infer", str(value.dtype).removeprefix("torch.")
        return f"{mode}-{value.batch}-{dtype}"
    return str(value)


@pytest.fixture(autouse=True)
def _fast_convolutions() -> Iterator[None]:
    """TF32 in fp32, and the fastest convolutions for shapes that do not change; for both detectors."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    switches: list[tuple[Any, str]] = [(matmul, "allow_tf32"), (cudnn, "allow_tf32"), (cudnn, "benchmark")]
    before = [getattr(backend, name) for backend, name in switches]
    for backend, name in switches:
        setattr(backend, name, True)
    yield
    for (backend, name), value in zip(switches, before, strict=True):
        setattr(backend, name, value)


def steady_state_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a step among others on a GPU, host time included: the mean of as many in a row as take 50 ms."""
    once = _in_a_row(call, 1)
    count = math.ceil(50 / once)
    return once if count == 1 else _in_a_row(call, count)


def _in_a_row(call: Callable[[], object], count: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count * 1e3


@functools.lru_cache(maxsize=1)
def measure_torchvision(case: Case) -> tuple[costs.Step, costs.Cost]:
    return costs.measure(lambda: whole_step.torchvision_step(case), DEVICE)


@pytest.mark.parametrize(("case", "way"), WAYS, ids=case_id)
def test_step(compare: Callable[..., None], case: Case, way: str) -> None:
    if "compiled" in way and not CUDA and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    theirs, their_cost = measure_torchvision(case)
    ours, our_cost = costs.measure(lambda: whole_step.WAYS[way](case), DEVICE)
    if not case.training:
        # Not just as many: torchvision's boxes are bf16 too under autocast, several pixels coarse.
        found, expected = (sum(len(each["scores"]) for each in step.run()) for step in (ours, theirs))
        assert min(found, expected) > 0.5 * max(found, expected, 1), f"{found} and {expected} detections"
    floor = roofline.vgg16_training if case.training else roofline.vgg16_inference
    compare(
        ours.run,
        theirs.run,
        op=op_name(case, way),
        size=size(case),
        dtype=str(case.dtype).removeprefix("torch."),
        rounds=7 if CUDA else 5,
        floor=floor(case.batch) if case.name == "vgg16" and case.dtype == torch.bfloat16 else (),
        images=case.batch,
        costs=(our_cost, their_cost),
        **({"clock": steady_state_ms} if CUDA else {}),
    )


@pytest.mark.skipif(CUDA, reason="a GPU's work is not done when its layer's call returns")
def test_between_the_networks(compare: Callable[..., None]) -> None:
    """All of a training step but the backbone, the box head and the optimizer."""
    case = Case(NAME, HEIGHT, WIDTH, 4, True, torch.float32, DEVICE)
    ours, theirs = (TimerOutsideNetworks(build(case)) for build in (whole_step.eager, whole_step.torchvision_step))
    compare(
        ours,
        theirs,
        op=f"{op_name(case)}, between networks",
        size=size(case),
        rounds=9,
        clock=lambda call: call(),
    )
