"""Training by several processes is that by one, and ends as a whole."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastdet.engine import checkpoint
from fastdet.graphs.step import COLUMNS
from fastdet.models.losses import NAMES as LOSSES
from tests.helpers import processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of what two processes did together, and what each of them found."""
    folder = tmp_path_factory.mktemp("two")
    return folder, processes.run_all(folder)


def losses_of(folder: Path) -> list[list[float]]:
    with (folder / "metrics.csv").open() as file:
        return [[float(row[name]) for name in LOSSES] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", processes.RUNS)
def test_the_same_batch_gives_the_same_losses_and_weights(tmp_path, by_two, name):
    processes.run(name, tmp_path)
    expected, found = losses_of(tmp_path), losses_of(by_two[0] / name)
    assert len(found) >= 20
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)
    one, two = (checkpoint.load(folder / "last.pth") for folder in (tmp_path, by_two[0] / name))
    for part in ("model", "average"):
        torch.testing.assert_close(two[part], one[part], rtol=0, atol=1e-5)


def test_running_statistics_are_of_all_images(tmp_path, by_two):
    ranks = [found["batchnorm"] for found in by_two[1]]
    assert all(map(torch.equal, *ranks))
    # The first layer's means of the pixels are linear in them; those of one process, of all three images.
    alone = processes.run_with_batchnorm(tmp_path, processes.ALONE)
    torch.testing.assert_close(ranks[0][0], alone[0], rtol=0, atol=1e-5)


def test_a_loss_of_one_process_that_is_not_finite_ends_all(by_two):
    (message, weights), other = (found["infinity"] for found in by_two[1])
    assert message == other[0]
    assert message.startswith("step 5: a loss or gradient is not finite")
    assert "loss_objectness inf" in message
    assert (by_two[0] / "infinity" / "failure.json").exists()
    assert all(map(torch.equal, weights.values(), other[1].values()))
    assert all(bool(values.isfinite().all()) for values in weights.values())


def test_a_process_without_boxes_takes_two_hundred_steps(by_two):
    rows, others = (found["without boxes"] for found in by_two[1])
    assert torch.equal(rows, others)
    assert rows.shape == (200, len(COLUMNS))
    assert bool(rows.isfinite().all())
    assert rows[:, 0].mean() > 0
    assert rows[-20:, : len(LOSSES)].sum() < 0.8 * rows[:20, : len(LOSSES)].sum()


def test_evaluation_by_two_processes_is_that_by_one(by_two):
    for number, expected in enumerate(processes.evaluations()):
        assert expected.summary()["VOC12"] > 0
        for found in by_two[1]:
            summary, predictions = found["evaluations"][number]
            assert summary == expected.summary()
            torch.testing.assert_close(predictions, expected.predictions, rtol=0, atol=0)
