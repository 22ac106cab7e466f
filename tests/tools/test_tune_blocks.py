"""The search over block shapes: what it tries, what it continues from, what it never chooses, and that it ends."""

import csv
import importlib
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from bench import calls
from bench.calls import OpCall
from tools import tune_blocks
from tools.tune_blocks import Measurement, Target


class Config(NamedTuple):
    block: int
    num_warps: int
    wide: bool = True


def climbed(
    start: Config, measure: Callable[[Config], Measurement], fits: Callable[[Config], bool] = lambda config: True
) -> dict[Config, Measurement]:
    found = list(tune_blocks.climb(start, measure, fits))
    assert len(dict(found)) == len(found), "each once"
    return dict(found)


def test_neighbors_halve_and_double_one_field() -> None:
    assert tune_blocks.neighbors(Config(64, 1)) == [Config(32, 1), Config(64, 2), Config(128, 1)]
    assert tune_blocks.describe(Config(64, 2)) == "block=64 num_warps=2 wide=True"


def test_climbs_to_the_fastest_and_ends() -> None:
    found = climbed(Config(16, 1), lambda config: Measurement(1 + abs(config.block - 128) + abs(config.num_warps - 4)))
    assert next(iter(found)) == Config(16, 1)
    assert min(found, key=lambda config: found[config].us or 0) == Config(128, 4)
    assert Config(256, 4) in found
    assert Config(512, 4) not in found


def test_does_not_go_on_from_what_is_wrong_nor_for_a_gain_within_noise() -> None:
    found = climbed(
        Config(16, 2), lambda config: Measurement(*((5.0,) if config == Config(16, 2) else (None, "differs")))
    )
    assert set(found) == {Config(16, 2), Config(8, 2), Config(32, 2), Config(16, 1), Config(16, 4)}
    assert set(climbed(Config(16, 2), lambda config: Measurement(100 - config.block / 100))) == set(found)


def test_what_does_not_fit_is_not_tried() -> None:
    found = climbed(Config(16, 1), lambda config: Measurement(1 / config.block), lambda config: config.block <= 64)
    assert max(config.block for config in found) == 64
    assert {target.module for target in tune_blocks.TARGETS if not target.fits(default_of(target))} == set()


def default_of(target: Target) -> NamedTuple:
    """What the kernel chooses for 100 boxes, candidates or channels."""
    module = importlib.import_module(f"fastdet.kernels.{target.module}")
    choose = getattr(module, target.function)
    return choose(*[100] * len(inspect.signature(choose).parameters))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Target:
    """An operation whose result is wrong in blocks of 64, that cannot be launched in blocks of 4."""
    module = SimpleNamespace(config=lambda size: Config(size, 1))
    monkeypatch.setitem(sys.modules, "fastdet.kernels.toy", module)

    def run() -> torch.Tensor:
        config = module.config(16)
        if config.block == 4:
            raise RuntimeError("out of\nresources")
        return torch.tensor([config.block == 64])

    return Target(lambda device, small: OpCall("one", run), "toy")


def blocks(run: Callable[[], torch.Tensor]) -> int:
    """The block size that `run` would be launched with."""
    return sys.modules["fastdet.kernels.toy"].config(16).block


@pytest.mark.parametrize(
    ("clock", "wrong"),
    [
        (lambda run: float(blocks(run)), {"4": "RuntimeError: out of resources"}),
        (lambda run: 160.0 / blocks(run), {"64": "differs from the default's result"}),
    ],
)
def test_rows_compare_with_the_default(toy: Target, clock: Callable[..., float], wrong: dict[str, str]) -> None:
    rows = list(tune_blocks.sweep(toy, torch.device("cpu"), True, clock))
    default = rows[0]
    assert default.size == "one"
    assert default.config == "block=16 num_warps=1 wide=True"
    assert default.ratio == "1.000"
    notes = {row.config.split()[0].removeprefix("block="): row.note for row in rows if row.note}
    assert notes == wrong
    assert all(row.us == row.ratio == "" for row in rows if row.note)
    assert max(float(row.ratio) for row in rows if row.ratio) == 2.0


def test_a_call_that_does_not_run_the_function_is_an_error(toy: Target) -> None:
    silent = toy._replace(build=lambda device, small: OpCall("none", lambda: torch.ones(1)))
    with pytest.raises(LookupError, match=r"never runs toy\.config"):
        list(tune_blocks.sweep(silent, torch.device("cpu"), True, lambda run: 1.0))


def test_what_fails_or_is_absent_or_late_does_not_stop_the_rest(
    toy: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(device: torch.device, small: bool) -> OpCall:
        raise RuntimeError("no such thing")

    def hangs(device: torch.device, small: bool) -> OpCall:
        time.sleep(100)
        raise AssertionError("was not stopped")

    targets = (toy._replace(function="shape"), toy._replace(build=fails), toy._replace(build=hangs), toy)
    monkeypatch.setattr(tune_blocks, "TARGETS", targets)
    monkeypatch.setattr(tune_blocks, "microseconds", lambda run: 7.0)
    assert tune_blocks.main(["--csv", str(tmp_path / "sweep.csv"), "--seconds", "3"]) == 1
    captured = capfd.readouterr()
    assert "cannot be swept: fastdet.kernels.toy has no shape" in captured.out
    assert "its time is up" in captured.out
    assert "RuntimeError: no such thing" in captured.err
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["ratio"] for row in rows] == ["1.000"] * 4
    assert set(rows[0]) == {"op", "size", "config", "us", "ratio", "note"}


@pytest.mark.kernel
@pytest.mark.parametrize(
    "target",
    [Target(calls.nms_inference, "nms", fits=tune_blocks.nms_fits), Target(calls.match, "match")],
    ids=lambda target: target.module,
)
def test_the_change_reaches_the_kernel(kernel_device: torch.device, target: Target) -> None:
    rows = list(tune_blocks.sweep(target, kernel_device, True, lambda run: 1.0))
    assert rows[0].ratio == "1.000"
    assert len({row.config for row in rows}) == len(rows) > 3
    assert sum(not row.note for row in rows) > 2, rows
    with (
        tune_blocks.intercept_choice(target, lambda config: config._replace(no_such_field=1)),
        calls.kernels_on(kernel_device),
        pytest.raises(ValueError, match="no_such_field"),
    ):
        target.build(kernel_device, True).run()
