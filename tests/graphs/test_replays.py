"""Replays without a GPU: a recording of the step's operators stands in for the graph."""

from typing import Any

import pytest
import torch

from fastdet.graphs import GraphedDetector
from fastdet.graphs.step import GROWTH_INTERVAL
from tests.helpers.detectors import small_detector, small_scene
from tests.helpers.graphs import FIXED, SHAPE, adamw, assert_same, clone_state, detector, sgd, trainer
from tests.helpers.recorded_program import record_program


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdet.graphs.capture.eager_program", record_program)


def steps_of(make: Any, shape: Any = SHAPE, left_out: int = 0, **options: Any) -> tuple[Any, list[torch.Tensor]]:
    """The rows of six steps with other images, rates and draws each, and all that they changed; every other step
    without the first images."""
    graphed = trainer(detector(size_buckets=()), make, shape, clip_norm=1.0, **options)
    # The scale of fp16 doubles on the way.
    graphed.loss_scale.growth_tracker.fill_(GROWTH_INTERVAL - 3)
    torch.manual_seed(3)
    for step in range(6):
        graphed.set_lr(0.02 / (step + 1))
        images, targets = small_scene(step)
        first = left_out * (step % 2)
        graphed.step(images[first:], targets[first:])
    return graphed.losses(), [*clone_state(graphed), *(each.clone() for each in graphed.loss_scale)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_replays_are_the_eager_steps(make, amp, accumulate, request):
    expected = steps_of(make, amp=amp, accumulate=accumulate)
    request.getfixturevalue("recorded")
    found = steps_of(make, amp=amp, accumulate=accumulate)
    assert found[0] == expected[0]
    assert_same(found[1], expected[1])


def test_graphs_of_several_buckets_in_turn(request):
    shapes = [SHAPE, (2, 3, 96, 80)]
    expected = steps_of(sgd, shapes, left_out=1)
    request.getfixturevalue("recorded")
    found = steps_of(sgd, shapes, left_out=1)
    assert found[0] == expected[0]
    assert_same(found[1], expected[1])


@pytest.mark.usefixtures("recorded")
def test_a_recorded_detection_follows_images_and_weights():
    model = small_detector(**FIXED, box_score_thresh=0.01).eval()
    graphed = GraphedDetector(model, SHAPE)
    for seed in (1, 2, 3):
        images, _ = small_scene(seed)
        torch.testing.assert_close(graphed(images), model(images), rtol=1e-4, atol=1e-3)
        with torch.no_grad():
            model.roi_heads.box_predictor.bbox_pred.weight.mul_(0.9)
