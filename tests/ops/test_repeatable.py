"""Each kernel gives the same bits on the same input, time after time: what a race between programs would change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from bench.calls import CALLS, OpCall, kernels_on, tensors

ON_A_GPU, INTERPRETED = 50, 1


@pytest.fixture
def _poisoned_memory() -> None:
    """Memory stays as earlier kernels left it, so that a cell read before it is written differs from time to time."""


@contextmanager
def disturbed(device: torch.device) -> Iterator[Callable[[], None]]:
    """A function that puts other work on a second stream, so that programs start in another order each time."""
    if device.type == "cpu":
        yield lambda: None
        return
    stream, matrix = torch.cuda.Stream(), torch.rand(2048, 2048, device=device)
    torch.cuda.synchronize()

    def disturb() -> None:
        with torch.cuda.stream(stream):
            torch.mm(matrix, matrix)

    yield disturb
    torch.cuda.synchronize()


@pytest.mark.kernel
@pytest.mark.parametrize("build", CALLS, ids=lambda build: build.__name__)
def test_same_bits_each_time(kernel_device: torch.device, build: Callable[[torch.device, bool], OpCall]) -> None:
    interpreted = kernel_device.type == "cpu"
    call = build(kernel_device, interpreted)
    with kernels_on(kernel_device), disturbed(kernel_device) as disturb:
        expected = tensors(call.run())
        for repetition in range(INTERPRETED if interpreted else ON_A_GPU):
            disturb()
            actual = tensors(call.run())
            differing = sum(int((found != wanted).sum()) for found, wanted in zip(actual, expected, strict=True))
            assert differing == 0, f"{differing} bytes differ in repetition {repetition} of {call.size}"


def test_bits_are_compared_as_they_are() -> None:
    zeros, nans = torch.tensor([0.0, -0.0]), torch.tensor([torch.nan] * 2)
    assert not torch.equal(*(row for row in zeros.view(2, 1).view(torch.uint8)))
    (flat,) = tensors(nans)
    assert torch.equal(flat, tensors((nans.clone(),))[0])
    first, second = tensors((zeros, [nans]))
    assert first.dtype == second.dtype == torch.uint8
    assert first[3] == 0
    assert first[7] == 128
