"""The calls of the benchmarks, value for value: what the kernels give beside what the CPU implementations give."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.calls import CALLS, OpCall, kernels_on, tensors_of
from tests.helpers.checks import assert_close

Build = Callable[[torch.device, bool], OpCall]

every_call = pytest.mark.parametrize("build", CALLS, ids=lambda build: build.__name__)

# Gradients that the kernels sum in another order than the CPU implementation.
SUMS_OF_MANY = {"roi_align_gradient"}
# Differences of coordinates of up to 1000 pixels, where fp32 rounds to 2**-14: small ones have the error of large ones.
DIFFERENCES = {"decode", "decode_batch"}


@pytest.fixture
def _poisoned_memory() -> None:
    """The CPU implementations at full size would be several times as slow with it."""


def assert_same(build: Build, found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.shape == wanted.shape
        assert actual.dtype == wanted.dtype
        if wanted.is_floating_point():
            scale = wanted.abs().max().clamp(min=1) if build.__name__ in SUMS_OF_MANY else 1.0
            atol = 2.0**-13 if build.__name__ in DIFFERENCES else None
            assert_close(actual.cpu().float() / scale, wanted.float() / scale, wanted.dtype, atol)
        else:
            assert torch.equal(actual.cpu(), wanted)


def compare(build: Build, device: torch.device, small: bool) -> None:
    expected = tensors_of(build(torch.device("cpu"), small).run())
    with kernels_on(device):
        found = tensors_of(build(device, small).run())
    assert_same(build, found, expected)


@pytest.mark.cuda
@every_call
def test_kernels_equal_cpu_at_full_size(build: Build) -> None:
    compare(build, torch.device("cuda"), small=False)


@pytest.mark.kernel
@every_call
def test_kernels_equal_cpu_on_small_calls(kernel_device: torch.device, build: Build) -> None:
    compare(build, kernel_device, small=True)


def test_a_value_that_differs_is_found() -> None:
    build, wanted = CALLS[0], [torch.arange(6), torch.ones(3)]
    assert_same(build, [tensor.clone() for tensor in wanted], wanted)
    for place in (0, 1):
        found = [tensor.clone() for tensor in wanted]
        found[place][2] += 1
        with pytest.raises(AssertionError):
            assert_same(build, found, wanted)
    with pytest.raises(AssertionError):
        assert_same(build, [wanted[0].int(), wanted[1]], wanted)
