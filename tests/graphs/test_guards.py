"""What a captured step depends on cannot be changed unnoticed."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastdet.graphs import GraphedDetector, GraphedTrainer
from fastdet.graphs.capture import FULL_CHECKS, Program, StaticStep, eager_program
from fastdet.graphs.guards import CaptureGuard
from fastdet.graphs.step import LossScale
from fastdet.preserve import preserve_rng, preserve_tensors
from tests.helpers.detectors import small_detector, small_scene
from tests.helpers.graphs import FIXED, SHAPE, adamw, assert_same, clone_state, detector, sgd, trainer


def replace_parameter(graphed: GraphedTrainer) -> None:
    layer = graphed.model.rpn.head.bbox_pred
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def replace_layer(graphed: GraphedTrainer) -> None:
    graphed.model.roi_heads.box_predictor = copy.deepcopy(graphed.model.roi_heads.box_predictor)


def move_data(graphed: GraphedTrainer) -> None:
    weight = graphed.model.backbone[0].weight
    weight.data = weight.data.clone()


def load_state(graphed: GraphedTrainer) -> None:
    graphed.optimizer.load_state_dict(copy.deepcopy(graphed.optimizer.state_dict()))


def change_settings(graphed: GraphedTrainer) -> None:
    graphed.model.settings = graphed.model.settings.override(rpn_nms_thresh=0.6)


def change_momentum(graphed: GraphedTrainer) -> None:
    graphed.optimizer.param_groups[0]["momentum"] = 0.5


def replace_momentum(graphed: GraphedTrainer) -> None:
    state = next(iter(graphed.optimizer.state.values()))
    state["momentum_buffer"] = state["momentum_buffer"].clone()


def exchange_parameter(graphed: GraphedTrainer) -> None:
    parameters = graphed.optimizer.param_groups[0]["params"]
    parameters[0], parameters[1] = parameters[1], parameters[0]


def replace_rate(graphed: GraphedTrainer) -> None:
    graphed.optimizer.param_groups[0]["lr"] = torch.tensor(0.02)


def assign_weights(graphed: GraphedTrainer) -> None:
    state = {name: tensor.clone() for name, tensor in graphed.model.state_dict().items()}
    graphed.model.load_state_dict(state, assign=True)


def unfreeze(graphed: GraphedTrainer) -> None:
    graphed.model.backbone[0].weight.requires_grad_(True)


FULL_ONLY = {
    "a parameter": (replace_parameter, "rpn.head.bbox_pred.weight was replaced"),
    "a layer": (replace_layer, "a layer of roi_heads was replaced"),
    "frozen": (lambda graphed: graphed.model.backbone[4].weight.requires_grad_(False), "backbone.4.weight was frozen"),
    "a layer's mode": (lambda graphed: graphed.model.backbone[1].eval(), "backbone.1 was put into evaluation mode"),
    "a state": (replace_momentum, "optimizer.momentum_buffer was replaced"),
    "a group's parameter": (exchange_parameter, "parameters of group 0 of the optimizer were changed"),
}
QUICK = {
    "the first parameter's data": (move_data, "backbone.0.weight was replaced"),
    "unfrozen": (unfreeze, "backbone.0.weight was unfrozen"),
    "weights assigned": (assign_weights, "backbone.0.weight was replaced"),
    "groups": (load_state, "groups of the optimizer were replaced"),
    "settings": (change_settings, "settings of the model"),
    "an option": (change_momentum, "momentum of group 0"),
    "a learning rate": (replace_rate, "lr of group 0"),
    "states": (lambda graphed: graphed.optimizer.state.clear(), "state of the optimizer was replaced"),
    "parameters": (lambda graphed: graphed.optimizer.param_groups[0]["params"].pop(), "parameters of group 0"),
    "compiled": (lambda graphed: graphed.model.compile(backend="eager"), "the model was compiled"),
}


def captured_trainer(steps: int, **options: Any) -> GraphedTrainer:
    """After so many steps, with its first layer frozen."""
    model = detector()
    model.backbone[0].weight.requires_grad_(False)
    graphed = trainer(model, **options)
    for _ in range(steps):
        graphed.step(*small_scene())
    return graphed


def assert_refused_until_recaptured(graphed: GraphedTrainer, change: Any, message: str) -> None:
    before, steps = clone_state(graphed), len(graphed.losses())
    change(graphed)
    # As often as the step is called.
    for _ in range(FULL_CHECKS + 2):
        with pytest.raises(RuntimeError, match=rf"since GraphedTrainer captured its step, .*{message}.*recapture\(\)"):
            graphed.step(*small_scene())
    after = clone_state(graphed)
    compared = min(len(after), len(before))
    assert_same(after[:compared], before[:compared])
    if change in (replace_parameter, replace_layer, assign_weights):
        with pytest.raises(ValueError, match="not the model's: make it anew"):
            graphed.recapture()
        graphed.optimizer = sgd(graphed.model)
    graphed.recapture()
    assert graphed.captured == ()
    graphed.step(*small_scene())
    assert [row["step"] for row in graphed.losses()] == [steps + 1]


@pytest.mark.parametrize(("change", "message"), FULL_ONLY.values(), ids=FULL_ONLY.keys())
@pytest.mark.parametrize(("steps", "options"), [(1, {}), (FULL_CHECKS + 2, {"check_every_step": True})])
def test_a_change_is_refused_soon_after_the_capture_and_wherever_everything_is_checked(change, message, steps, options):
    assert_refused_until_recaptured(captured_trainer(steps, **options), change, message)


@pytest.mark.parametrize(("change", "message"), QUICK.values(), ids=QUICK.keys())
def test_a_change_that_the_quick_check_detects_is_refused_at_any_step(change, message):
    assert_refused_until_recaptured(captured_trainer(FULL_CHECKS + 2), change, message)


@pytest.mark.parametrize(
    ("name", "value"),
    [("clip_norm", 2.0), ("amp", torch.bfloat16), ("max_boxes", 8), ("optimizer", None), ("loss_scale", None)],
)
def test_a_changed_argument_is_refused_at_any_step(name, value):
    graphed = captured_trainer(FULL_CHECKS + 2)
    made = {"optimizer": lambda: sgd(graphed.model), "loss_scale": lambda: LossScale.initial(None, graphed.device)}
    value = made[name]() if name in made else value
    assert_refused_until_recaptured(graphed, lambda each: setattr(each, name, value), f"its {name} was changed")


def test_everything_is_compared_at_the_first_replays_only(monkeypatch):
    full = []
    difference = CaptureGuard.difference
    monkeypatch.setattr(CaptureGuard, "difference", lambda self, each: full.append(each) or difference(self, each))
    small, images, targets = (1, 3, 96, 88), *small_scene()
    graphed = trainer(shape=[SHAPE, small])
    for _ in range(6):
        graphed.step(images, targets)
    assert full == [True] * FULL_CHECKS + [False, False]
    full.clear()
    for _ in range(5):
        graphed.step(images[:1], targets[:1])
    assert full == [True] * (1 + FULL_CHECKS) + [False], "a second bucket is captured of the same model as the first"
    full.clear()
    graphed.step(images, targets)
    graphed.recapture()
    graphed.step(images, targets)
    graphed.step(images, targets)
    assert full == [False, True]
    full.clear()
    checked = trainer(check_every_step=True)
    for _ in range(6):
        checked.step(images, targets)
    assert full == [True] * 5


def test_the_quick_check_visits_one_tensor_of_the_model(monkeypatch):
    """And none of the optimizer's state: what it costs does not depend on the size of the model."""
    graphed = captured_trainer(1)
    guard = CaptureGuard(graphed.model, graphed.optimizer)
    visited = []
    address = torch.Tensor.data_ptr
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda tensor: visited.append(tensor) or address(tensor))
    assert guard.difference(full=False) is None
    assert len(visited) == 1
    assert visited[0] is graphed.model.backbone[0].weight
    visited.clear()
    assert guard.difference(full=True) is None
    assert len(visited) > len(list(graphed.model.parameters())) + len(graphed.optimizer.state)


def test_a_detector_refuses_a_change_after_the_capture():
    model = small_detector(**FIXED).eval()
    images, _ = small_scene()
    for options in ({}, {"check_every_step": True}):
        graphed = GraphedDetector(model, SHAPE, **options)
        for _ in range(FULL_CHECKS + 2):
            graphed(images)
        model.settings = model.settings.override(box_score_thresh=0.9)
        with pytest.raises(RuntimeError, match=r"since GraphedDetector .* settings .*recapture\(\)"):
            graphed(images)
        graphed.recapture()
        graphed(images)
    for _ in range(FULL_CHECKS + 2):
        graphed(images)
    model.roi_heads.box_predictor = copy.deepcopy(model.roi_heads.box_predictor)
    with pytest.raises(RuntimeError, match=r"since GraphedDetector .* a layer of roi_heads was replaced"):
        graphed(images)


def test_loading_weights_in_place_is_no_change():
    graphed, trained_elsewhere = trainer(), detector(seed=7)
    graphed.step(*small_scene())
    graphed.model.load_state_dict(trained_elsewhere.state_dict())
    graphed.step(*small_scene())


def load_fresh_state(graphed: GraphedTrainer) -> None:
    graphed.optimizer.load_state_dict(type(graphed.optimizer)(**optimizer_options(graphed)).state_dict())


def optimizer_options(graphed: GraphedTrainer) -> dict[str, Any]:
    names = ("fused", "capturable") if isinstance(graphed.optimizer, torch.optim.AdamW) else ("fused", "momentum")
    group = graphed.optimizer.param_groups[0]
    return {"params": group["params"], "lr": torch.tensor(0.02), **{name: group[name] for name in names}}


def warm_up_before_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a capture does before its graph: three steps, after which what they changed is restored."""

    def warm_up(step: StaticStep) -> Program:
        with preserve_rng(torch.device("cpu")), preserve_tensors(step.changed):
            for _ in range(3):
                step.function(*step.inputs)
        return eager_program(step)

    monkeypatch.setattr("fastdet.graphs.capture.eager_program", warm_up)


@pytest.mark.parametrize("change", [unfreeze, load_fresh_state])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_change_before_the_first_step_is_taken_over(make, change, monkeypatch):
    states = []
    for warm in (False, True):
        model = detector()
        model.backbone[0].weight.requires_grad_(change is not unfreeze)
        graphed = trainer(model, make)
        change(graphed)
        if warm:
            warm_up_before_steps(monkeypatch)
        torch.manual_seed(1)
        for _ in range(3):
            graphed.step(*small_scene())
        states.append(clone_state(graphed))
    assert_same(states[1], states[0])


def test_an_optimizer_that_cannot_be_captured_again_is_refused_again():
    graphed = trainer()
    graphed.step(*small_scene())
    graphed.optimizer.param_groups[0]["lr"] = 0.1
    for again in (graphed.recapture, lambda: graphed.step(*small_scene())):
        with pytest.raises(ValueError, match=r"has the number 0.1 as its learning rate"):
            again()


def test_a_rate_stays_the_tensor_that_it_was_made():
    graphed = trainer(make=lambda model: sgd(model, momentum=0.0, weight_decay=0.0))
    rate = graphed.optimizer.param_groups[0]["lr"]
    graphed.step(*small_scene())
    graphed.recapture()
    rate.fill_(0.0)
    before = [parameter.clone() for parameter in graphed.model.parameters()]
    graphed.step(*small_scene())
    assert graphed.optimizer.param_groups[0]["lr"] is rate
    assert_same(list(graphed.model.parameters()), before)
