"""Whole runs in graphs, without a GPU: recordings of the steps' operators stand in for the graphs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastdet import VGG16, FasterRCNN
from fastdet.data import Shapes
from fastdet.engine import checkpoint
from fastdet.engine.buckets import plan_graphs
from fastdet.engine.predict import detect_in_batch
from fastdet.engine.recipes import TrainSettings
from fastdet.engine.trainer import train
from fastdet.graphs.capture import Program, StaticStep
from tests.helpers.detectors import SMALL_SETTINGS, TinyBackbone
from tests.helpers.recorded_program import record_program

# Of seven images the last batch has one, and is taken without a graph.
DATA, BATCHES, EPOCHS = Shapes(7, size=64), 4, 3
SETTINGS = TrainSettings(
    epochs=EPOCHS, batch_size=2, lr=0.02, warmup_steps=3, ema=0.9, amp="bfloat16", clip_norm=0.5, log_every=3
)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("losses", "average_precision"):
        monkeypatch.setattr(f"fastdet.engine.trainer.plot_{name}", lambda *paths, **options: None)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Graphs are planned as on a GPU; the images of each replay."""
    found: list[torch.Tensor] = []

    def record(step: StaticStep) -> Program:
        program = record_program(step)
        return program._replace(run=lambda: (found.append(step.inputs[0].clone()), program.run())[1])

    def choose(model: FasterRCNN, dataset: Any, settings: TrainSettings, *_: object) -> Any:
        return plan_graphs(model.settings, settings, dataset) if settings.graphs else None

    monkeypatch.setattr("fastdet.graphs.capture.eager_program", record)
    monkeypatch.setattr("fastdet.engine.trainer.choose_graphs", choose)
    return found


def run(out: Path, settings: TrainSettings = SETTINGS, device: str = "cpu", **options: Any) -> dict[str, Any]:
    """The last checkpoint of a run, which is evaluated after each epoch."""

    def validate(model: nn.Module) -> dict[str, float]:
        detect_in_batch(model, [DATA[0][0]])
        return {"AP": 0.5, "AP50": 0.5, "AP75": 0.5}

    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 64, "size_buckets": ((80, 72),)}
    model = FasterRCNN(TinyBackbone(), 5, **{"settings": VGG16, **SMALL_SETTINGS, **sizes})
    # Without graphs the convolutions of a CPU would add up in another order.
    model.to(device, memory_format=torch.channels_last)
    train(model.eval(), DATA, out, settings, progress=False, validate=validate, **options)
    return checkpoint.load(out / "last.pth")


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("model", "average", "random", "loss_scale"):
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), f"{part} {name}"
    for index, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(found["optimizer"]["state"][index][name], value), f"{name} {index}"


@pytest.mark.parametrize(
    "changes",
    [{}, {"amp": "float16", "accumulate": 2, "optimizer_name": "adamw", "lr": 1e-3}, {"amp": "none", "clip_norm": 0.0}],
    ids=["bf16", "fp16", "fp32"],
)
def test_a_run_in_graphs_is_one_without(tmp_path, replays, changes):
    settings = replace(SETTINGS, **changes)
    expected = run(tmp_path / "plain", replace(settings, graphs=False))
    assert not replays
    assert_same(run(tmp_path / "graphed", settings), expected)
    assert len(replays) == EPOCHS * (BATCHES - 1)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_run_in_graphs_goes_on_with_or_without_them(tmp_path, replays, graphs):
    expected = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_after=1)
    replays.clear()
    assert_same(run(tmp_path / "parts", replace(SETTINGS, graphs=graphs), resume=True), expected)
    assert len(replays) == graphs * (EPOCHS - 1) * (BATCHES - 1)


@pytest.mark.cuda
def test_a_run_in_captured_graphs(tmp_path, monkeypatch):
    """On a GPU, with a worker and pinned images: as one without graphs, and as one that goes on."""
    pytest.importorskip("tqdm")
    # Some operators that repeat exactly are host syncs.
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings = replace(SETTINGS, amp="none", workers=1)
    expected = run(tmp_path / "plain", replace(settings, graphs=False), "cuda")
    whole = run(tmp_path / "whole", settings, "cuda")
    run(tmp_path / "parts", settings, "cuda", stop_after=1)
    parts = run(tmp_path / "parts", settings, "cuda", resume=True)
    for part in ("model", "average"):
        torch.testing.assert_close(whole[part], expected[part], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(parts[part], whole[part], rtol=1e-3, atol=1e-3)
