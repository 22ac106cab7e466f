"""Shared by the tests: where kernels run, poisoned memory, the seed, and what is skipped where something is missing."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# torch asks once a process whether cuBLAS sums in a fixed order: before the first test that needs it to.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cuda = torch.cuda.is_available()
    absent = {
        "kernel": None if cuda or INTERPRETED else "kernels run on a GPU, or with TRITON_INTERPRET=1",
        "cuda": None if cuda else "needs a GPU",
        "shared": None if SHARED.is_dir() else "the real data and weights are not beside the checkout",
    }
    for item in items:
        for marker, reason in absent.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Report which operations' kernels ran, and how."""
    ran = Counter(
        Path(report.location[0]).stem.removeprefix("test_")
        for report in terminalreporter.getreports("passed")
        if "kernel" in report.keywords
    )
    if ran:
        how = "interpreted on the CPU" if INTERPRETED else f"on {torch.cuda.get_device_name()}"
        counts = ", ".join(f"{name} ({count} tests)" for name, count in sorted(ran.items()))
        terminalreporter.write_line(f"kernels run {how} and compared with the CPU implementation: {counts}")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    return SHARED


@pytest.fixture
def kernel_device() -> torch.device:
    """The device of a launcher's tensors: the GPU, or the CPU where Triton interprets."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN and large numbers, so that an output left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
