"""What a training step of VGG16 launches."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tools import step_launches

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="catches launches of compiled kernels"
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/benchmarks.md"


@pytest.fixture(scope="module")
def launches() -> dict[str, int]:
    return step_launches.training_step()


def test_the_table_of_the_document_is_measured(launches):
    assert all(count > 0 for count in launches.values())
    rows = re.findall(r"^\| `?(\w+)`? \| \d+ \| (\d+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert dict(rows) == {name: str(count) for name, count in {**launches, "all": sum(launches.values())}.items()}


def test_a_training_step_launches_few_kernels(launches):
    assert sum(launches.values()) <= 20
