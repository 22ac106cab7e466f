"""Training by several processes is that by one, and ends as a whole."""

import contextlib
import csv
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastdet.cli.main import main
from fastdet.engine import checkpoint
from fastdet.graphs.step import COLUMNS
from fastdet.models.losses import NAMES as LOSSES
from tests.helpers import processes
from tests.helpers.voc import SMALL, write_voc

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


def rows_of(path: Path) -> torch.Tensor:
    with path.open() as file:
        return torch.tensor([[float(value or "nan") for value in row.values()] for row in csv.DictReader(file)])


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
            summary, predictions, losses = found["evaluations"][number]
            assert (summary, losses) == (expected.summary(), expected.losses)
            torch.testing.assert_close(predictions, expected.predictions, rtol=0, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set "voc"; "start", with whose weights BatchNorm is frozen; "alone", the run of one process."""
    place = tmp_path_factory.mktemp("commands")
    write_voc(place / "voc", {"trainval": 7, "test": 3})
    data = ["train", "--data", f"voc:{place / 'voc'}", *SMALL]
    assert main([*data, "--epochs", "1", "--out", str(place / "start")]) == 0
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*arguments(place), str(place / "alone")]) == 0
    (place / "printed").write_text(printed.getvalue())
    return place


def arguments(place: Path, voc: Path | None = None) -> list[str]:
    """Of a training run, up to its folder."""
    data = ["train", "--data", f"voc:{voc or place / 'voc'}", "--weights", str(place / "start" / "last.pth")]
    return [*data, *SMALL, "--epochs", "6", "--out"]


class Torchrun:
    """A command of fastdet in processes of this machine, as one node of a run; what it prints goes to files."""

    def __init__(self, log: Path, *command: object, launch: tuple[str, ...] = ("--standalone", "--nproc-per-node=2")):
        self._logs = [log.with_suffix(suffix) for suffix in (".out", ".err")]
        with self._logs[0].open("w") as out, self._logs[1].open("w") as err:
            self._agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "fastdet", *map(str, command)],
                stdout=out,
                stderr=err,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def send(self, kind: signal.Signals, rank: int | None = None) -> None:
        """A signal, to the process of a rank on this node or to `torchrun`."""
        found = self._agent.pid if rank is None else self.ranks()[rank]
        os.kill(found, kind)

    def ranks(self) -> dict[int, int]:
        children = Path(f"/proc/{self._agent.pid}/task/{self._agent.pid}/children").read_text().split()
        found = {}
        for child in children:
            environment = Path(f"/proc/{child}/environ").read_text().split("\0")
            found.update({int(entry[5:]): int(child) for entry in environment if entry.startswith("RANK=")})
        return found

    def ends_with(self, code: int) -> tuple[list[str], list[str]]:
        """The lines on stdout, and those of fastdet on stderr."""
        found = self._agent.wait(timeout=60)
        out, err = (log.read_text() for log in self._logs)
        assert found == code, err
        return out.splitlines(), [line for line in err.splitlines() if line.startswith(("fastdet: ", "epoch "))]

    def kill(self) -> None:
        """All that is left, which torch starts in sessions of their own."""
        if self._agent.poll() is None:
            for process in (self._agent.pid, *self.ranks().values()):
                os.kill(process, signal.SIGKILL)
            self._agent.wait()


@pytest.fixture
def torchrun(tmp_path) -> Iterator[Callable[..., Torchrun]]:
    """`Torchrun` of a test, at whose end none of its processes is left."""
    started = list[Torchrun]()

    def start(*command: object, **how: Any) -> Torchrun:
        started.append(Torchrun(tmp_path / str(len(started)), *command, **how))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_validated(out: Path) -> Callable[[], bool]:
    return lambda: (out / "validation.csv").exists()


def assert_is_run_of_one(out: Path, alone: Path) -> None:
    torch.testing.assert_close(torch.tensor(losses_of(out)), torch.tensor(losses_of(alone)), rtol=0, atol=1e-5)
    one, two = (checkpoint.load(place / "last.pth")["model"] for place in (alone, out))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    first, second = (rows_of(place / "validation.csv") for place in (alone, out))
    torch.testing.assert_close(second, first, rtol=0, atol=1e-5, equal_nan=True)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in alone.iterdir())


def test_a_command_in_two_processes_is_that_in_one(tmp_path, folder, torchrun):
    out = tmp_path / "run"
    printed, shown = torchrun(*arguments(folder), out, "--workers", "2").ends_with(0)
    expected = (folder / "printed").read_text().splitlines()
    differ = [line for line, other in zip(printed, expected, strict=True) if line != other]
    assert differ[0] == "steps: on cpu, float32, 2 processes, 2 processes load images"
    assert [line.split()[0] for line in differ[1:]] == ["trained"]
    # Progress is shown now and then, and each evaluation once.
    assert [line for line in shown if "images/s" not in line] == [line for line in shown if ": AP " in line]
    assert len([line for line in shown if ": AP " in line]) == 6
    assert_is_run_of_one(out, folder / "alone")
    written = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    _, shown = torchrun(*arguments(folder), out).ends_with(1)
    assert len(shown) == 1
    assert "the folder has a run already" in shown[0]
    assert written == {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}


def test_a_killed_process_is_started_again_and_the_run_goes_on(tmp_path, folder, torchrun):
    out = tmp_path / "run"
    launch = "--standalone", "--nproc-per-node=2", "--max-restarts=1"
    running = torchrun(*arguments(folder), out, launch=launch)
    until(has_validated(out))
    running.send(signal.SIGKILL, rank=1)
    _, shown = running.ends_with(0)
    assert len([line for line in shown if "the connection to another process of the run is lost" in line]) == 1
    assert_is_run_of_one(out, folder / "alone")


def test_a_run_that_is_asked_to_end_saves_its_state(tmp_path, folder, torchrun):
    """The agent of torch asks all processes of a rank, those that load images among them."""
    out = tmp_path / "run"
    running = torchrun(*arguments(folder), out, "--workers", "2")
    until(has_validated(out))
    running.send(signal.SIGTERM)
    _, shown = running.ends_with(1)
    assert len([line for line in shown if line.startswith("fastdet: ")]) == 1
    assert "terminated; " in shown[-1]
    assert main([*arguments(folder), str(out), "--resume"]) == 0
    assert_is_run_of_one(out, folder / "alone")


def test_an_image_that_cannot_be_read_by_one_process_ends_all(tmp_path, folder, torchrun):
    damaged = Path(shutil.copytree(folder / "voc", tmp_path / "voc"))
    image = damaged / "JPEGImages" / "trainval_3.jpg"
    image.write_bytes(image.read_bytes()[:500])
    start = time.monotonic()
    _, shown = torchrun(*arguments(folder, damaged), tmp_path / "run").ends_with(1)
    assert time.monotonic() - start < 40
    errors = [line for line in shown if line.startswith("fastdet: ")]
    assert len(errors) == 1
    assert "trainval_3.jpg: the image cannot be decoded" in errors[0]


def test_two_nodes_go_on_after_one_has_lost_a_process(tmp_path, folder, torchrun):
    out, port = tmp_path / "run", free_port()
    launch = "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-id=1", "--rdzv-backend=c10d"
    launch = *launch, f"--rdzv-endpoint=localhost:{port}"
    nodes = [torchrun(*arguments(folder), out, launch=launch) for _ in range(2)]
    until(has_validated(out))
    # Which node is the first is not decided by the order in which they came.
    node = next(each for each in nodes if 1 in each.ranks())
    node.send(signal.SIGKILL, rank=1)
    printed = [lines for each in nodes for lines in each.ends_with(0)[0]]
    assert len([line for line in printed if line.startswith("trained in")]) == 1
    assert_is_run_of_one(out, folder / "alone")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])
