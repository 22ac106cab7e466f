"""The step itself: free of host syncs, under fp16 with a loss scale, with optimizers that a graph can hold."""

import pytest
import torch
from torch import nn

from fastdet.graphs import GraphedTrainer
from fastdet.graphs.step import INITIAL_SCALE, LossScale, prepare_optimizer, training_step
from tests.helpers.detectors import small_scene
from tests.helpers.graphs import MAX_BOXES, SHAPE, adamw, assert_same, clone_state, detector, differ, sgd, trainer
from tests.helpers.host_sync import RefuseHostSync

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
            training_step(model, optimizer, LossScale.initial(amp, CPU), batch, padded, amp=amp, clip_norm=1.0)


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


def test_fp16_names_a_loss_that_is_not_finite():
    graphed = trainer(amp=torch.float16)
    images, targets = small_scene()
    graphed.step([image * torch.nan for image in images], targets)
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
