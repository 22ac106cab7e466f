"""The step itself: free of host syncs, under fp16 with a loss scale, with optimizers that a graph can hold."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastdet import TORCHVISION, AnchorGenerator, FasterRCNN, inputs
from fastdet.graphs import GraphedTrainer
from fastdet.graphs.batch_losses import PaddedLosses, batch_losses, cast_weights
from fastdet.graphs.optimizers import prepare_optimizer
from fastdet.graphs.step import INITIAL_SCALE, LossScale, training_step
from tests.helpers.detectors import NUM_CLASSES, SMALL_SETTINGS, Pyramid, small_scene
from tests.helpers.graphs import MAX_BOXES, SHAPE, adamw, assert_same, clone_state, detector, differ, sgd, trainer
from tests.helpers.host_sync import RefuseHostSync
from tests.helpers.weights import randomize_heads

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("make", "options", "made"),
    [
        (sgd, {"nesterov": True}, {"momentum_buffer"}),
        (sgd, {"momentum": 0.0}, set()),
        (adamw, {}, {"step", "exp_avg", "exp_avg_sq"}),
        (adamw, {"amsgrad": True}, {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    ],
)
def test_state_made_beforehand_changes_no_step(make, options, made):
    """Fused SGD's first step takes the gradient as its momentum: zeros that gradients are added to are the same."""
    models = [detector(), detector()]
    optimizers = [make(model, **options) for model in models]
    prepare_optimizer(optimizers[0], models[0])
    assert {name for state in optimizers[0].state.values() for name in state} == made
    assert all(not tensor.any() for state in optimizers[0].state.values() for tensor in state.values())
    assert not optimizers[1].state
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        assert_same(list(models[0].parameters()), list(models[1].parameters()))


def test_the_step_is_free_of_host_syncs():
    model = detector()
    optimizer = sgd(model)
    prepare_optimizer(optimizer, model)
    images, targets = small_scene()
    batch, padded, _ = model.preprocess(images, targets)
    for amp in (None, torch.bfloat16, torch.float16):
        with RefuseHostSync():
            losses = batch_losses(PaddedLosses(model), batch, padded, amp=amp, accumulate=2)
            training_step(model, optimizer, LossScale.initial(amp, CPU), losses, amp=amp, clip_norm=1.0)


def test_fp16_halves_its_scale_where_a_gradient_overflows():
    graphed = trainer(amp=torch.float16)
    overflowing = [True]
    weight = graphed.model.roi_heads.box_predictor.cls_score.weight
    weight.register_hook(lambda gradient: gradient + torch.inf if overflowing[0] else gradient)
    before = clone_state(graphed)
    graphed.step(*small_scene())
    assert_same(clone_state(graphed), before)
    assert float(graphed.loss_scale.scale) == INITIAL_SCALE / 2
    overflowing[0] = False
    graphed.step(*small_scene())
    assert differ(clone_state(graphed), before)
    assert float(graphed.loss_scale.scale) == INITIAL_SCALE / 2
    assert int(graphed.loss_scale.growth_tracker) == 1
    first, second = graphed.losses()
    assert (first["skipped"], first["loss_scale"]) == (1, INITIAL_SCALE), "an overflow is no error"
    assert (second["skipped"], second["loss_scale"]) == (0, INITIAL_SCALE / 2)


def test_fp16_grows_its_scale_after_good_steps():
    graphed = trainer(amp=torch.float16)
    graphed.loss_scale.scale.fill_(64.0)
    graphed.loss_scale.growth_tracker.fill_(1999)
    graphed.step(*small_scene())
    assert float(graphed.loss_scale.scale) == 128
    assert int(graphed.loss_scale.growth_tracker) == 0


def test_fp16_names_a_loss_that_is_not_finite(monkeypatch):
    monkeypatch.setattr(inputs, "_LARGEST", math.inf)
    graphed = trainer(amp=torch.float16)
    images, targets = small_scene()
    graphed.step([torch.full_like(image, 3e38) for image in images], targets)
    with pytest.raises(FloatingPointError, match="step 1"):
        graphed.losses()


def test_the_scale_leaves_the_gradients_as_they_are():
    """A power of two changes nothing but what would be lost: fp16 with a scale ends near fp32."""
    norms = []
    for amp in (None, torch.float16):
        graphed = trainer(amp=amp)
        torch.manual_seed(0)
        graphed.step(*small_scene())
        norms.append(graphed.losses()[0]["gradient_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (sgd, {"fused": False}, r"group 0 of SGD is not fused.*SGD\(..., fused=True"),
        (sgd, {"lr": 0.1}, r"the number 0.1 as its learning rate.*lr=torch.tensor"),
        (sgd, {"dampening": 0.1}, "dampening=0"),
        (adamw, {"capturable": False}, r"not capturable.*capturable=True"),
        (adamw, {"fused": False}, "not fused"),
        (lambda model: torch.optim.RMSprop(model.parameters()), {}, "RMSprop cannot be captured: take torch.optim.SGD"),
        (lambda model: torch.optim.Adam(model.parameters()), {}, "Adam cannot be captured"),
    ],
)
def test_optimizers_that_cannot_be_captured(make, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(make=lambda model: make(model, **options))


def test_an_optimizer_of_another_model_is_refused():
    model = detector()
    with pytest.raises(ValueError, match=r"(\d+) of the \1 parameters of the optimizer are not the model's"):
        GraphedTrainer(model, sgd(detector()), SHAPE, MAX_BOXES)
    foreign = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], torch.tensor(0.1), fused=True)
    with pytest.raises(ValueError, match=r"1 of the .* are not the model's"):
        GraphedTrainer(model, foreign, SHAPE, MAX_BOXES)
    frozen = model.backbone[0].requires_grad_(False)
    with pytest.raises(ValueError, match="none of the model's trainable"):
        GraphedTrainer(model, sgd(frozen), SHAPE, MAX_BOXES)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_weights_cast_in_one_call_are_those_of_autocast(amp, monkeypatch):
    """Bit for bit: losses, norms, and what is learned from them, with a layer that is frozen and one called twice."""
    found = []
    for casts in (cast_weights, lambda model, dtype: {}):
        monkeypatch.setattr("fastdet.graphs.batch_losses.cast_weights", casts)
        torch.manual_seed(0)
        model = FasterRCNN(Pyramid(), NUM_CLASSES, settings=TORCHVISION, **{**SMALL_SETTINGS, **LEVELS}).train()
        randomize_heads(model)
        model.backbone.fine.requires_grad_(False)
        graphed = trainer(model, amp=amp, clip_norm=1.0)
        torch.manual_seed(1)
        for _ in range(3):
            graphed.step(*small_scene())
        found.append((graphed.losses(), clone_state(graphed)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])


LEVELS: dict[str, Any] = {
    "size_buckets": (SHAPE[2:],),
    "size_divisible": 1,
    "rpn_anchor_generator": AnchorGenerator(((16,), (32,), (64,))),
    "box_featmap_names": ("0", "1"),
}


def test_which_weights_are_cast():
    class Scaled(nn.Linear):
        """Uses its weights in another way, which autocast may leave in fp32."""

    model = detector()
    model.roi_heads.box_head.fc7 = Scaled(16, 16)
    model.backbone[0].weight.requires_grad_(False)
    casts = cast_weights(model, torch.bfloat16)
    assert {value.dtype for value in casts.values()} == {torch.bfloat16}
    left = {name for name, _ in model.named_parameters() if name not in casts}
    assert left == {
        f"{layer}.{kind}" for layer in ("backbone.1", "roi_heads.box_head.fc7") for kind in ("weight", "bias")
    }
    for name, parameter in model.named_parameters():
        if name in casts:
            cast = casts[name]
            assert cast.requires_grad == parameter.requires_grad, name
            assert torch.equal(cast, parameter.to(torch.bfloat16))
            assert cast.stride() == parameter.stride()
    assert cast_weights(nn.BatchNorm2d(2), torch.bfloat16) == {}


def ancestors(event: Any) -> set[str]:
    return set() if event.cpu_parent is None else {event.cpu_parent.name} | ancestors(event.cpu_parent)


def test_weights_are_cast_in_one_call():
    model = detector()
    optimizer = sgd(model)
    prepare_optimizer(optimizer, model)
    batch, padded, _ = model.preprocess(*small_scene())
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiled:
        losses = batch_losses(PaddedLosses(model), batch, padded, amp=torch.bfloat16)
        training_step(model, optimizer, LossScale.initial(None, CPU), losses, amp=torch.bfloat16, clip_norm=0.0)
    shapes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim > 1}
    events = profiled.events()
    casts = [event for event in events if event.name == "aten::_to_copy" and tuple(event.input_shapes[0]) in shapes]
    # The gradient of a convolution on the CPU casts its own result.
    inside = {"aten::_foreach_copy_", "aten::convolution_backward"}
    assert [event.input_shapes[0] for event in casts if not inside & ancestors(event)] == []
    assert sum(event.name == "aten::_foreach_copy_" for event in events) == 2, "there and, of the gradients, back"


@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ({"check_gradients": False}, False),
        ({}, True),
        ({"check_gradients": False, "clip_norm": 1.0}, True),
        ({"check_gradients": False, "amp": torch.float16}, True),
        ({"check_gradients": False, "amp": torch.bfloat16}, False),
    ],
)
def test_the_norm_is_computed_where_it_is_used_or_asked_for(options, computed, monkeypatch):
    monkeypatch.setattr(inputs, "_LARGEST", math.inf)
    calls, get_total_norm = [], nn.utils.get_total_norm
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda gradients: calls.append(1) or get_total_norm(gradients))
    graphed = trainer(**options)
    images, targets = small_scene()
    graphed.step(images, targets)
    assert len(calls) == computed
    (row,) = graphed.losses()
    assert math.isfinite(row["gradient_norm"]) == computed
    before = clone_state(graphed)
    graphed.step([torch.full_like(image, 3e38) for image in images], targets)
    assert_same(clone_state(graphed), before)
    with pytest.raises(FloatingPointError, match="step 2"):
        graphed.losses()


def test_the_norm_changes_no_step():
    found = []
    for check in (True, False):
        graphed = trainer(check_gradients=check)
        torch.manual_seed(1)
        for _ in range(3):
            graphed.step(*small_scene())
        found.append(clone_state(graphed))
    assert_same(*found)
    graphed.check_gradients = True
    with pytest.raises(RuntimeError, match="its check_gradients was changed"):
        graphed.step(*small_scene())


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_parts_of_a_batch_give_the_losses_of_the_whole(amp):
    """Also where they have different numbers of samples: the second image has no boxes."""
    scene = small_scene()
    targets = [{**target, "seed": torch.tensor(number)} for number, target in enumerate(scene[1])]
    found = []
    for accumulate in (1, 2, 3):
        model = detector(box_bg_iou_thresh_low=0.1)
        model.backbone.eval()
        graphed = trainer(model, amp=amp, accumulate=accumulate)
        for _ in range(3):
            graphed.step(scene[0], targets)
        found.append((torch.tensor([list(row.values()) for row in graphed.losses()]), clone_state(graphed)))
    tolerance = 1e-5 if amp is None else 2e-2
    for rows, state in found[1:]:
        torch.testing.assert_close(rows, found[0][0], rtol=tolerance, atol=tolerance)
        for actual, expected in zip(state, found[0][1], strict=True):
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_running_statistics_take_each_image_once():
    """The pass that counts leaves them as they were."""
    model, again = detector(), detector()
    for each, accumulate in ((model, 3), (again, 1)):
        each.backbone[1].momentum = None
        trainer(each, accumulate=accumulate).step(*small_scene())
    assert int(model.backbone[1].num_batches_tracked) == 3
    torch.testing.assert_close(model.backbone[1].running_mean, again.backbone[1].running_mean)
