"""The trainer does what a plain loop does. Without a GPU the same step runs eagerly through the same checks."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from fastdet import FasterRCNN, inputs
from fastdet.graphs import GraphedDetector, GraphedTrainer
from tests.helpers.detectors import small_scene
from tests.helpers.graphs import (
    EMPTY,
    MAX_BOXES,
    SHAPE,
    adamw,
    assert_same,
    clone_state,
    detector,
    differ,
    record_inputs,
    sgd,
    trainer,
)


def plain_loop(model: FasterRCNN, optimizer: torch.optim.Optimizer, steps: int, clip: float, amp: Any) -> list[float]:
    images, targets = small_scene()
    totals = []
    for _ in range(steps):
        with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
            loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.step()
        totals.append(float(loss.detach()))
    return totals


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_ten_steps_are_those_of_a_plain_loop(make, clip, amp):
    plain, graphed = detector(), trainer(make=make, clip_norm=clip, amp=amp)
    torch.manual_seed(3)
    totals = plain_loop(plain, make(plain, lr=float(graphed.optimizer.defaults["lr"])), 10, clip, amp)
    torch.manual_seed(3)
    for _ in range(10):
        assert graphed.step(*small_scene()) is None
    rows = graphed.losses()
    assert [row["loss"] for row in rows] == pytest.approx(totals, abs=1e-5)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert any(row["gradient_norm"] > 0.5 for row in rows), "the case clips nothing"
    for (name, a), b in zip(graphed.model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)


def test_runs_follow_the_seed():
    found = []
    for seed in (1, 1, 2):
        graphed = trainer()
        torch.manual_seed(seed)
        for _ in range(3):
            graphed.step(*small_scene())
        found.append(clone_state(graphed))
    assert_same(found[0], found[1])
    assert differ(found[0], found[2])


def test_each_step_draws_anew():
    graphed = trainer(detector(box_batch_size_per_image=8, rpn_batch_size_per_image=8))
    graphed.set_lr(0.0)
    for _ in range(4):
        graphed.step(*small_scene())
    assert len({row["loss_objectness"] for row in graphed.losses()}) == 4


@pytest.mark.parametrize("make", [sgd, adamw])
def test_what_is_not_finite_changes_nothing_and_is_named(make, monkeypatch):
    monkeypatch.setattr(inputs, "_LARGEST", math.inf)  # pixels that would be refused
    graphed = trainer(make=make, clip_norm=1.0)
    images, targets = small_scene()
    graphed.step(images, targets)
    before = clone_state(graphed)
    images[1] = torch.full_like(images[1], 3e38)  # overflows when it is normalized
    graphed.step(images, targets, ids=["a.jpg", "b.jpg", "c.jpg"])
    assert_same(clone_state(graphed), before)
    graphed.step(*small_scene())
    assert differ(clone_state(graphed), before)
    assert all(tensor.isfinite().all() for tensor in clone_state(graphed))
    with pytest.raises(FloatingPointError, match=r"^step 2: .*not finite .*loss_.* nan.*images a.jpg, b.jpg, c.jpg"):
        graphed.losses()
    rows = graphed.losses()
    assert [row["step"] for row in rows] == [1, 3], "the others are not lost"
    assert [row["skipped"] for row in rows] == [0, 0]
    assert graphed.losses() == []


def test_a_gradient_that_is_not_finite_is_named_too():
    graphed = trainer()
    weight = graphed.model.roi_heads.box_predictor.cls_score.weight
    handle = weight.register_hook(lambda gradient: gradient * torch.inf)
    before = clone_state(graphed)
    graphed.step(*small_scene())
    assert_same(clone_state(graphed), before)
    with pytest.raises(FloatingPointError, match=r"step 1: .*gradient_norm (nan|inf)"):
        graphed.losses()
    handle.remove()
    graphed.step(*small_scene())
    assert differ(clone_state(graphed), before)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_resumed_run_goes_on_as_the_first_would(make, tmp_path):
    first = trainer(make=make, amp=torch.float16)
    for _ in range(2):
        first.step(*small_scene())
    first.loss_scale.scale.fill_(2.0**9)
    states = [each.state_dict() for each in (first.model, first.optimizer, first)]
    torch.save([*states, torch.get_rng_state()], tmp_path / "state.pt")
    first.losses()
    for _ in range(2):
        first.step(*small_scene())

    *states, generator = torch.load(tmp_path / "state.pt", weights_only=True)
    model = detector(seed=7)
    model.load_state_dict(states[0])
    optimizer = make(model)
    optimizer.load_state_dict(states[1])
    second = GraphedTrainer(model, optimizer, SHAPE, MAX_BOXES, amp=torch.float16)
    second.load_state_dict(states[2])
    torch.set_rng_state(generator)
    for _ in range(2):
        second.step(*small_scene())
    assert second.losses() == first.losses()
    assert_same(clone_state(second), clone_state(first))
    assert_same(list(second.loss_scale), list(first.loss_scale))
    with pytest.raises(
        ValueError, match=r"must have the entries .*'growth_tracker', 'scale', 'steps'.*, got \['scale'\]"
    ):
        second.load_state_dict({"scale": 1.0})
    former = {name.replace("growth_tracker", "growth"): value for name, value in states[2].items()}
    with pytest.raises(ValueError, match=r"must have the entries .*, got \['amp', 'growth', 'scale', 'steps'\]"):
        second.load_state_dict(former)
    for amp, saved in ((None, torch.float16), (torch.float16, torch.bfloat16)):
        with pytest.raises(ValueError, match=f"with amp={saved}, and these have amp={amp}"):
            trainer(amp=amp).load_state_dict(trainer(amp=saved).state_dict())


def test_the_learning_rate_lies_in_a_tensor_of_each_group():
    model, shared = detector(), torch.tensor(0.5)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    weights = [parameter for name, parameter in model.named_parameters() if not name.endswith("bias")]
    groups = [{"params": weights}, {"params": biases, "lr_factor": 2.0}]
    graphed = GraphedTrainer(model, torch.optim.SGD(groups, lr=shared, fused=True), SHAPE, MAX_BOXES)
    scheduler = torch.optim.lr_scheduler.ConstantLR(graphed.optimizer, factor=0.5)
    assert [float(group["lr"]) for group in graphed.optimizer.param_groups] == [0.25, 0.25]
    graphed.step(*small_scene())
    graphed.set_lr(0.01)
    assert [float(group["lr"]) for group in graphed.optimizer.param_groups] == pytest.approx([0.01, 0.02])
    assert float(shared) == 0.5
    graphed.set_lr(0.0)
    before = [parameter.clone() for parameter in model.parameters()]
    graphed.step(*small_scene())
    assert_same(list(model.parameters()), before)
    scheduler.step()
    graphed.step(*small_scene())
    graphed.optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="lr of group 0"):
        graphed.step(*small_scene())


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
    ],
)
def test_schedulers_change_the_rate_of_a_captured_step(schedule):
    graphed = trainer()
    graphed.step(*small_scene())
    scheduler = schedule(graphed.optimizer)
    rates = []
    for _ in range(3):
        graphed.step(*small_scene())
        scheduler.step()
        rates.append(float(graphed.optimizer.param_groups[0]["lr"]))
    assert len(set(rates)) == 3
    assert graphed.captured == (SHAPE,)


def test_padded_tensors_are_taken_as_lists_are(monkeypatch):
    inputs = record_inputs(monkeypatch)
    by_lists, by_tensors = trainer(), trainer()
    images, targets = small_scene()
    batch, padded, _ = by_tensors.model.preprocess(images, targets)
    torch.manual_seed(1)
    by_lists.step(images, targets)
    torch.manual_seed(1)
    by_tensors.step_padded(batch.images, batch.sizes, padded._replace(seeds=None), batch.scales)
    assert_same(clone_state(by_lists), clone_state(by_tensors))
    # Without scales they are 1, also after others were given.
    by_tensors.step_padded(batch.images, batch.sizes, padded)
    assert torch.equal(inputs[-1][0].scales, torch.ones(3))
    with pytest.raises(ValueError, match=r"sizes must be \[3, 2\]"):
        by_tensors.step_padded(batch.images, batch.sizes[0], padded)
    with pytest.raises(ValueError, match=r"targets.boxes must be \[3, 4, 4\]"):
        by_tensors.step_padded(batch.images, batch.sizes, padded._replace(boxes=padded.boxes[:1]))


def test_evaluation_between_two_steps():
    graphed = trainer()
    graphed.step(*small_scene())
    graphed.model.eval()
    with pytest.raises(ValueError, match=r"model.train\(\)"):
        graphed.step(*small_scene())
    graphed.model.train()
    graphed.step(*small_scene())
    assert [row["step"] for row in graphed.losses()] == [1, 2]


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="multiples of 32"):
        trainer(detector(size_divisible=32, size_buckets=()))
    for options, message in (
        ({"amp": torch.float64}, "amp must be"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"max_boxes": 0}, "max_boxes"),
        ({"memory_limit": 0}, "memory_limit"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(**options)
    with pytest.raises(ValueError, match=r"model.train\(\)"):
        trainer(detector().eval())
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        GraphedDetector(detector(), SHAPE)
    with pytest.raises(ValueError, match="no trainable"):
        trainer(detector().requires_grad_(False), make=lambda model: sgd(detector()))
    with pytest.raises(RuntimeError, match="give amp"), torch.autocast("cpu", torch.bfloat16):
        trainer().step(*small_scene())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_casts_of_weights_do_not_outlive_a_step(device):
    """Inside any other autocast, even one that is switched off, torch keeps them."""
    options = {"make": lambda model: sgd(model, lr=torch.tensor(0.5)), "amp": torch.bfloat16}
    rows = []
    for outer in (nullcontext(), torch.autocast(device, enabled=False)):
        graphed = trainer(**options)
        torch.manual_seed(1)
        with outer:
            for _ in range(4):
                graphed.step(*small_scene())
        rows.append(graphed.losses())
    assert rows[0] == rows[1]


def test_a_trainer_made_in_inference_mode_trains_outside_it():
    model = detector()
    with torch.inference_mode():
        graphed = trainer(model, amp=torch.float16)
    graphed.step(*small_scene())
    assert len(graphed.losses()) == 1


def test_images_that_take_a_gradient_leave_none_behind(monkeypatch):
    inputs = record_inputs(monkeypatch)
    images, targets = small_scene()
    graphed = trainer()
    for _ in range(2):
        graphed.step([image.clone().requires_grad_() for image in images], targets)
    graphed.step(images, targets)
    assert not inputs[-1][0].images.requires_grad
    assert len(graphed.losses()) == 3


def test_a_batch_without_any_weight_teaches_nothing_and_is_not_skipped():
    weighted = detector(class_weights=(0.0, 1.0, 1.0, 1.0), loss_weights=(8.0, 1.0, 1.0, 1.0))
    graphed = trainer(weighted, amp=torch.float16)
    for _ in range(2):
        graphed.step(small_scene()[0], EMPTY)
    rows = graphed.losses()
    assert [row["skipped"] for row in rows] == [0, 0]
    assert [row["loss_classifier"] for row in rows] == [0, 0]
