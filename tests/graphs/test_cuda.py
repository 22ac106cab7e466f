"""What only a capture on a GPU can show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdet.graphs import GraphedDetector, GraphedTrainer
from fastdet.graphs.batch_losses import PaddedLosses, batch_losses
from fastdet.graphs.step import COLUMNS, training_step
from tests.helpers.detectors import small_detector, small_scene
from tests.helpers.graphs import (
    FIXED,
    SHAPE,
    adamw,
    assert_same,
    clone_state,
    detector,
    differ,
    sgd,
    trainer,
)

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _poisoned_memory(_poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture takes the operators that the detector runs with: some deterministic ones make a host sync."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def on_the_gpu(make: Callable[..., Any] = sgd, **options: Any) -> GraphedTrainer:
    return trainer(detector().cuda(), make, **options)


def eager_steps(graphed: GraphedTrainer, steps: int) -> list[Tensor]:
    """The same function, not captured."""
    rows = []
    for _ in range(steps):
        batch, padded, _ = graphed.model.preprocess(*small_scene())
        losses = batch_losses(PaddedLosses(graphed.model), batch, padded, amp=graphed.amp)
        parts = graphed.model, graphed.optimizer, graphed.loss_scale, losses
        rows.append(training_step(*parts, amp=graphed.amp, clip_norm=graphed.clip_norm))
    return rows


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_replays_are_the_eager_steps(make, amp):
    graphed, twin = (on_the_gpu(make, amp=amp, clip_norm=1.0) for _ in range(2))
    torch.manual_seed(3)
    for _ in range(5):
        graphed.step(*small_scene())
    torch.manual_seed(3)
    expected = torch.stack(eager_steps(twin, 5))
    found = torch.tensor([[row[name] for name in COLUMNS] for row in graphed.losses()], device="cuda")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(clone_state(graphed), clone_state(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_capture_leaves_all_as_it_was(monkeypatch):
    graphed = on_the_gpu(amp=torch.float16)
    graphed.step(*small_scene())
    graphed.recapture()
    torch.cuda.synchronize()
    images, targets = small_scene()
    # Else the call would draw them, before the capture.
    targets = [{**target, "seed": torch.tensor(number)} for number, target in enumerate(targets)]
    before, generators = clone_state(graphed), (torch.get_rng_state(), torch.cuda.get_rng_state())
    scale = [tensor.clone() for tensor in graphed.loss_scale]
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)
    graphed.step(images, targets)
    assert_same(clone_state(graphed), before)
    assert_same(list(graphed.loss_scale), scale)
    assert_same([torch.get_rng_state(), torch.cuda.get_rng_state()], list(generators))


def test_replays_draw_anew_and_follow_the_seed():
    graphed = on_the_gpu()
    graphed.set_lr(0.0)
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        for _ in range(3):
            graphed.step(*small_scene())
        rows.append([row["loss_objectness"] for row in graphed.losses()])
    assert len(set(rows[0])) == 3
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    assert rows[0] != pytest.approx(rows[2], rel=1e-4)


def test_replays_are_free_of_host_syncs():
    graphed, found = on_the_gpu(), GraphedDetector(small_detector(**FIXED).cuda().eval(), SHAPE)
    images, targets = small_scene()
    batch, padded, _ = graphed.model.preprocess(images, targets)
    for _ in range(2):
        graphed.step_padded(batch.images, batch.sizes, padded, batch.scales)
        found.padded(*batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed.set_lr(0.01)
        for _ in range(3):
            graphed.step_padded(batch.images, batch.sizes, padded, batch.scales)
            found.padded(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(graphed.losses()) == 5


def test_a_replay_that_is_not_finite_changes_nothing():
    graphed = on_the_gpu()
    images, targets = small_scene()
    graphed.step(images, targets)
    before = clone_state(graphed)
    # On a GPU the values of images are not looked at, which would be a host sync.
    graphed.step([image.cuda() * torch.inf for image in images], targets)
    assert_same(clone_state(graphed), before)
    graphed.step(images, targets)
    assert differ(clone_state(graphed), before)
    with pytest.raises(FloatingPointError, match="step 2"):
        graphed.losses()


@pytest.mark.parametrize("limit", [None, 1])
def test_graphs_of_several_buckets_share_or_give_back_their_memory(limit):
    shapes = [(1, 3, 64, 80), (1, 3, 96, 96)]
    graphed = trainer(detector(size_buckets=()).cuda(), shape=shapes, memory_limit=limit)
    twin = trainer(detector(size_buckets=()).cuda(), shape=shapes)
    images, targets = small_scene()
    for step in range(6):
        torch.manual_seed(step)
        graphed.step(images[step % 2 : step % 2 + 1], targets[step % 2 : step % 2 + 1])
        torch.manual_seed(step)
        twin.step(images[step % 2 : step % 2 + 1], targets[step % 2 : step % 2 + 1])
        assert len(graphed.captured) == (1 if limit else min(step + 1, 2))
    torch.testing.assert_close(graphed.losses(), twin.losses(), rtol=1e-4, atol=1e-5)


def test_a_captured_detector_finds_what_the_model_finds():
    model = small_detector(**FIXED, box_score_thresh=0.01).cuda().eval()
    graphed = GraphedDetector(model, SHAPE)
    for seed in (1, 2, 3):
        images, _ = small_scene(seed)
        torch.testing.assert_close(graphed(images), model(images), rtol=1e-4, atol=1e-3)
