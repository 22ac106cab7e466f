"""The graphed step does what a plain loop does; what it has baked in cannot be changed behind its back.

Without a GPU the same step runs eagerly through the same checks; what only a capture can show is marked `cuda`.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdet import FasterRCNN
from fastdet.graphs.capture import Program, Recent, captured, eager
from fastdet.graphs.step import FIRST_SCALE, LossScale, prepare, training_step
from fastdet.graphs.trainer import GraphedDetector, GraphedTrainer
from fastdet.models.preserve import preserve_rng, preserve_tensors
from fastdet.structures import Batch
from tests.helpers.detectors import NUM_CLASSES, small_detector, small_scene
from tests.helpers.host_sync import RefuseHostSync

# What the scene is padded to, and the rows that its ground truth is padded to: then all draws are the model's own.
SHAPE, MAX_BOXES = (3, 3, 96, 88), 4
FIXED = {"size_buckets": (SHAPE[2:],)}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _poisoned_memory(_poisoned_memory: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture takes the operators that the detector runs with: some of their deterministic stand-ins wait."""
    if request.node.get_closest_marker("cuda"):
        torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    options = {"lr": torch.tensor(0.02), "momentum": 0.9, "weight_decay": 1e-3, "fused": True, **options}
    return torch.optim.SGD(model.parameters(), **options)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    options = {"lr": torch.tensor(1e-3), "fused": True, "capturable": True, **options}
    return torch.optim.AdamW(model.parameters(), **options)


def detector(**overrides: Any) -> FasterRCNN:
    return small_detector(**{**FIXED, **overrides}).train()


def trainer(
    model: FasterRCNN | None = None, make: Callable[..., Any] = sgd, shape: Any = SHAPE, **options: Any
) -> GraphedTrainer:
    model = detector() if model is None else model
    return GraphedTrainer(model, make(model), shape, options.pop("max_boxes", MAX_BOXES), **options)


def state_of(trainer: GraphedTrainer) -> list[Tensor]:
    """Clones of all that a step changes but the loss scale."""
    state = [value for each in trainer.optimizer.state.values() for value in each.values()]
    return [tensor.detach().clone() for tensor in (*trainer.model.parameters(), *trainer.model.buffers(), *state)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def differ(found: list[Tensor], expected: list[Tensor]) -> bool:
    return any(not torch.equal(one, other) for one, other in zip(found, expected, strict=True))


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
    for (name, one), other in zip(graphed.model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=name)


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
    prepare(optimizers[0], CPU)
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


def test_runs_follow_the_seed():
    found = []
    for seed in (1, 1, 2):
        graphed = trainer()
        torch.manual_seed(seed)
        for _ in range(3):
            graphed.step(*small_scene())
        found.append(state_of(graphed))
    assert_same(found[0], found[1])
    assert differ(found[0], found[2])


def test_each_step_draws_anew():
    graphed = trainer(detector(box_batch_size_per_image=8, rpn_batch_size_per_image=8))
    graphed.set_lr(0.0)
    for _ in range(4):
        graphed.step(*small_scene())
    assert len({row["loss_objectness"] for row in graphed.losses()}) == 4


def test_the_step_waits_nowhere():
    model = detector()
    optimizer = sgd(model)
    prepare(optimizer, CPU)
    images, targets = small_scene()
    batch, padded, _ = model.preprocess(images, targets)
    for amp in (None, torch.bfloat16, torch.float16):
        with RefuseHostSync():
            training_step(model, optimizer, LossScale.start(amp, CPU), batch, padded, amp=amp, clip_norm=1.0)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_what_is_not_finite_changes_nothing_and_is_named(make):
    graphed = trainer(make=make, clip_norm=1.0)
    images, targets = small_scene()
    graphed.step(images, targets)
    before = state_of(graphed)
    images[1] = torch.full_like(images[1], torch.inf)
    graphed.step(images, targets, ids=["a.jpg", "b.jpg", "c.jpg"])
    assert_same(state_of(graphed), before)
    graphed.step(*small_scene())
    assert differ(state_of(graphed), before)
    assert all(tensor.isfinite().all() for tensor in state_of(graphed))
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
    before = state_of(graphed)
    graphed.step(*small_scene())
    assert_same(state_of(graphed), before)
    with pytest.raises(FloatingPointError, match=r"step 1: .*gradient_norm (nan|inf)"):
        graphed.losses()
    handle.remove()
    graphed.step(*small_scene())
    assert differ(state_of(graphed), before)


def test_fp16_halves_its_scale_where_a_gradient_overflows():
    graphed = trainer(amp=torch.float16)
    overflowing = [True]
    weight = graphed.model.roi_heads.box_predictor.cls_score.weight
    weight.register_hook(lambda gradient: gradient + torch.inf if overflowing[0] else gradient)
    before = state_of(graphed)
    graphed.step(*small_scene())
    assert_same(state_of(graphed), before)
    assert float(graphed.loss_scale.scale) == FIRST_SCALE / 2
    overflowing[0] = False
    graphed.step(*small_scene())
    assert differ(state_of(graphed), before)
    assert float(graphed.loss_scale.scale) == FIRST_SCALE / 2
    assert int(graphed.loss_scale.streak) == 1
    first, second = graphed.losses()
    assert (first["skipped"], first["loss_scale"]) == (1, FIRST_SCALE), "an overflow is no error"
    assert (second["skipped"], second["loss_scale"]) == (0, FIRST_SCALE / 2)


def test_fp16_grows_its_scale_after_good_steps():
    graphed = trainer(amp=torch.float16)
    graphed.loss_scale.scale.fill_(64.0)
    graphed.loss_scale.streak.fill_(1999)
    graphed.step(*small_scene())
    assert float(graphed.loss_scale.scale) == 128
    assert int(graphed.loss_scale.streak) == 0


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
    assert_same(state_of(second), state_of(first))
    assert_same(list(second.loss_scale), list(first.loss_scale))
    with pytest.raises(ValueError, match=r"must have the entries .*'scale', 'steps', 'streak'.*, got \['scale'\]"):
        second.load_state_dict({"scale": 1.0})
    for one, other in ((None, torch.float16), (torch.float16, torch.bfloat16)):
        with pytest.raises(ValueError, match=f"with amp={other}, and these have amp={one}"):
            trainer(amp=one).load_state_dict(trainer(amp=other).state_dict())


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


def test_padded_tensors_are_taken_as_lists_are():
    one, other = trainer(), trainer()
    images, targets = small_scene()
    batch, padded, _ = other.model.preprocess(images, targets)
    torch.manual_seed(1)
    one.step(images, targets)
    torch.manual_seed(1)
    other.step_padded(batch.images, batch.sizes, padded, batch.scales)
    assert_same(state_of(one), state_of(other))
    # Without scales they are 1, also after others were given.
    other.step_padded(batch.images, batch.sizes, padded)
    assert torch.equal(other._programs[SHAPE].inputs[2], torch.ones(3))
    with pytest.raises(ValueError, match=r"sizes must be \[3, 2\]"):
        other.step_padded(batch.images, batch.sizes[0], padded)
    with pytest.raises(ValueError, match=r"targets.boxes must be \[3, 4, 4\]"):
        other.step_padded(batch.images, batch.sizes, padded._replace(boxes=padded.boxes[:1]))


def test_a_smaller_batch_leaves_nothing_of_the_last():
    """Images padded further and fewer boxes: the model's losses on the same canvas."""
    graphed, plain = trainer(max_boxes=8), detector()
    graphed.set_lr(0.0)
    images, targets = small_scene()
    graphed.step([image + 1 for image in images], targets)
    images = [image[:, :60, :60] for image in images]
    targets = [{"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0]]), "labels": torch.tensor([1])}] * 3
    graphed.step_padded(*padded_for(graphed.model, images, targets))
    inputs = graphed._programs[SHAPE].inputs
    expected, padded, _ = plain.preprocess(images, targets)
    assert torch.equal(inputs[0], expected.images)
    assert torch.equal(inputs[3][:, :1], padded.boxes)
    assert not inputs[4][:, 1:].any()


def padded_for(model: FasterRCNN, images: Any, targets: Any) -> tuple[Any, ...]:
    batch, padded, _ = model.preprocess(images, targets)
    height, width = batch.sizes.amax(0).tolist()
    return batch.images[:, :, :height, :width], batch.sizes, padded, batch.scales


def test_a_batch_that_fits_no_bucket_is_refused():
    images, targets = small_scene()
    graphed = trainer(shape=[SHAPE, (1, 3, 64, 64)])
    with pytest.raises(ValueError, match=r"4 images, but at most 3 .*batch_shape \(4"):
        graphed.step([*images, images[0]], [*targets, targets[0]])
    with pytest.raises(ValueError, match=r"2 images, but steps are of \[1, 3\].*batch_shape \(2.*drop_last"):
        graphed.step(images[:2], targets[:2])
    with pytest.raises(ValueError, match=r"1 images padded to 96 x 88 .*batch_shape \(1, 3, 96, 88\).*max_size"):
        graphed.step(images[1:2], targets[1:2])
    with pytest.raises(ValueError, match=r"3 boxes, but .* max_boxes=2: .*max_boxes=3"):
        trainer(max_boxes=2).step(images, targets)
    with pytest.raises(ValueError, match="3 images, but 2 ids"):
        graphed.step(images, targets, ids=[1, 2])
    padded = padded_for(trainer().model, images, targets)
    with pytest.raises(ValueError, match=r"sizes must be \[3, 2\] for 3 images, got None"):
        graphed.step_padded(padded[0], None, padded[2])
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\], got torch.uint8"):
        graphed.step_padded(*(torch.zeros(SHAPE, dtype=torch.uint8), None, None))
    assert graphed.captured == ()
    assert graphed.losses() == []


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 96, 88), "batch_shape must be"),
        ((3, 3, 96, 0), "batch_shape must be"),
        ((3.0, 3, 96, 88), "batch_shape must be"),
        ([SHAPE, 5], "batch_shape must be"),
        (None, "batch_shape must be"),
        ((3, 1, 96, 88), "1 channels, but image_mean has 3"),
        ([], "empty"),
    ],
)
def test_shapes_that_are_none(shape, message):
    with pytest.raises(ValueError, match=message):
        trainer(shape=shape)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_parameter, "rpn.head.bbox_pred.weight was replaced"),
        (replace_layer, "a layer of roi_heads was replaced"),
        (move_data, "backbone.0.weight was replaced"),
        (lambda graphed: graphed.model.backbone[4].weight.requires_grad_(False), "backbone.4.weight was frozen"),
        (lambda graphed: graphed.model.backbone[0].weight.requires_grad_(True), "backbone.0.weight was unfrozen"),
        (lambda graphed: graphed.model.backbone[1].eval(), "backbone.1 was put into evaluation mode"),
        (load_state, "optimizer"),
        (change_settings, "settings of the model"),
        (change_momentum, "momentum of group 0"),
        (lambda graphed: graphed.optimizer.state.clear(), "state of the optimizer was replaced"),
        (lambda graphed: graphed.optimizer.param_groups[0]["params"].pop(), "parameters of group 0"),
        (lambda graphed: graphed.model.compile(backend="eager"), "the model was compiled"),
    ],
)
def test_a_change_after_the_capture_is_refused_until_it_is_captured_again(change, message):
    model = detector()
    model.backbone[0].weight.requires_grad_(False)
    graphed = trainer(model)
    graphed.step(*small_scene())
    before = state_of(graphed)
    change(graphed)
    with pytest.raises(RuntimeError, match=rf"since GraphedTrainer captured its step, .*{message}.*recapture\(\)"):
        graphed.step(*small_scene())
    after = state_of(graphed)
    number = min(len(after), len(before))
    assert_same(after[:number], before[:number])
    if change in (replace_parameter, replace_layer):
        with pytest.raises(ValueError, match="not the model's: make it anew"):
            graphed.recapture()
        graphed.optimizer = sgd(model)
    graphed.recapture()
    assert graphed.captured == ()
    graphed.step(*small_scene())
    assert [row["step"] for row in graphed.losses()] == [1, 2]


def test_loading_weights_in_place_is_no_change():
    graphed, other = trainer(), detector()
    graphed.step(*small_scene())
    graphed.model.load_state_dict(other.state_dict())
    graphed.step(*small_scene())


def test_evaluation_between_two_steps():
    graphed = trainer()
    graphed.step(*small_scene())
    graphed.model.eval()
    with pytest.raises(ValueError, match=r"model.train\(\)"):
        graphed.step(*small_scene())
    graphed.model.train()
    graphed.step(*small_scene())
    assert [row["step"] for row in graphed.losses()] == [1, 2]


def test_the_program_not_used_for_longest_goes_first():
    made, dropped = [], []

    def make(key: str) -> Program:
        made.append(key)
        return Program((), lambda: key, {"large": 100}.get(key, 10), lambda: dropped.append(key))

    recent = Recent(make, limit=25)
    assert [recent[key].run() for key in "abab"] == list("abab")
    assert made == ["a", "b"]
    recent["a"]
    recent["c"]
    assert (dropped, list(recent), recent.nbytes) == (["b"], ["a", "c"], 20)
    recent["b"]
    assert (made, dropped) == (["a", "b", "c", "b"], ["b", "a"])
    recent["large"]
    assert list(recent) == ["large"], "kept although it is above the limit alone"
    recent.clear()
    assert list(recent) == []
    assert sorted(dropped) == ["a", "b", "b", "c", "large"]
    unlimited = Recent(make)
    assert [unlimited[str(key)].run() for key in range(50)] == list(map(str, range(50)))
    assert len(list(unlimited)) == 50


def test_buckets_are_captured_when_used_and_dropped_over_the_limit():
    small, large = (1, 3, 64, 80), (1, 3, 96, 96)
    images, targets = small_scene()
    model = detector(size_buckets=())
    graphed = trainer(model, shape=[large, small])
    for index in (0, 1, 0):
        graphed.step(images[index : index + 1], targets[index : index + 1])
    assert graphed.captured == (large, small)
    limited = trainer(detector(size_buckets=()), shape=[large, small], memory_limit=130_000)
    for index, kept in ((0, small), (1, large), (0, small)):
        limited.step(images[index : index + 1], targets[index : index + 1])
        assert limited.captured == (kept,)
    assert len(limited.losses()) == 3


@pytest.fixture(scope="module")
def evaluated() -> FasterRCNN:
    return small_detector(**FIXED, box_score_thresh=0.01).eval()


def test_detections_are_those_of_the_model(evaluated):
    images, _ = small_scene()
    graphed = GraphedDetector(evaluated, SHAPE)
    for _ in range(2):
        expected, found = evaluated(images), graphed(images)
        assert sum(len(each["boxes"]) for each in expected) > 3
        for one, other in zip(found, expected, strict=True):
            assert sorted(one) == sorted(other)
            assert all(torch.equal(one[name], other[name]) for name in one)
    batch, _, _ = evaluated.preprocess(images)
    with torch.no_grad():
        _, wanted = evaluated.forward_padded(*batch[:2], None, batch.scales)
    assert all(map(torch.equal, graphed.padded(*batch), wanted))
    assert not graphed.padded(*batch).boxes.requires_grad


def test_fewer_images_than_the_bucket_holds(evaluated):
    images, _ = small_scene()
    graphed = GraphedDetector(evaluated, [SHAPE])
    graphed(images)
    expected, found = evaluated(images[1:2]), graphed(images[1:2])
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected[0])
    with pytest.raises(ValueError, match="4 images, but at most 3"):
        graphed([*images, images[0]])
    with pytest.raises(ValueError, match=r"sizes must be \[3, 2\]"):
        graphed.padded(torch.zeros(SHAPE), torch.ones(2, 2))


def test_a_detector_says_what_was_changed():
    model = small_detector(**FIXED).eval()
    graphed = GraphedDetector(model, SHAPE)
    images, _ = small_scene()
    graphed(images)
    model.settings = model.settings.override(box_score_thresh=0.9)
    with pytest.raises(RuntimeError, match=r"since GraphedDetector .* settings .*recapture\(\)"):
        graphed(images)
    graphed.recapture()
    graphed(images)


def test_bf16_detections_are_those_under_autocast(evaluated):
    images, _ = small_scene()
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluated(images)
    found = GraphedDetector(evaluated, SHAPE, amp=torch.bfloat16)(images)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_results_outlive_the_next_call(evaluated):
    """A graph's outputs lie where they lay, so that the next replay writes over them."""
    graphed = GraphedDetector(evaluated, SHAPE)
    images, _ = small_scene()
    program = graphed._program(SHAPE)
    static = program.run()
    graphed._programs._programs[SHAPE] = program._replace(run=lambda: static)
    for tensor in static:
        tensor.fill_(1)
    found = graphed(images)
    for tensor in static:
        tensor.fill_(2)
    assert [each["labels"].tolist() for each in found] == [[1]] * 3
    assert [each["scores"].tolist() for each in found] == [[1.0]] * 3

    training = trainer()
    training.step(*small_scene())
    program = training._programs[SHAPE]
    row = program.run()
    training._programs._programs[SHAPE] = program._replace(run=lambda: row)
    for number in (1, 2):
        row.fill_(number)
        training.step(*small_scene())
    assert [row["gradient_norm"] for row in training.losses()[1:]] == [1, 2]


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_warm_up_leaves_all_as_it_was(make):
    graphed = trainer(make=make, amp=torch.float16)
    graphed.step(*small_scene())
    before, generator = state_of(graphed), torch.get_rng_state()
    scale = [tensor.clone() for tensor in graphed.loss_scale]
    state = [value for each in graphed.optimizer.state.values() for value in each.values()]
    changed = [*graphed.model.parameters(), *graphed.model.buffers(), *state, *graphed.loss_scale]
    with preserve_rng(CPU), preserve_tensors(changed):
        graphed.step(*small_scene())
        assert differ(state_of(graphed), before)
    assert_same(state_of(graphed), before)
    assert_same(list(graphed.loss_scale), scale)
    assert torch.equal(torch.get_rng_state(), generator)


class StubGraph:
    """Counts instead of replaying."""

    def __init__(self) -> None:
        self.replays, self.resets = 0, 0

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        self.resets += 1


def test_a_capture_warms_up_and_puts_back(monkeypatch):
    """The order of a capture, with a stub in the place of the device."""
    stream, graphs, pools = SimpleNamespace(wait_stream=lambda other: None), [], []
    reserved = iter((1000, 1700))

    def graph(stub: StubGraph, pool: object, **_: object) -> Any:
        graphs.append(stub)
        pools.append(pool)
        return nullcontext()

    for name, stub in {
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: next(reserved),
        "CUDAGraph": StubGraph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    calls, weight = [], torch.zeros(2)

    def function(x: Tensor) -> Tensor:
        calls.append(float(weight[0]))
        return weight.add_(torch.rand(2) + x)

    generator = torch.get_rng_state()
    program = captured(function, [torch.ones(2)], [weight], stream, pool="shared")
    assert calls[0] == calls[-1] == 0, "put back before the capture"
    assert len(calls) == 4
    assert torch.equal(torch.get_rng_state(), generator)
    assert program.nbytes == 700 + 8
    assert program.run() is program.run()
    assert (len(calls), graphs[0].replays, graphs[0].resets) == (4, 2, 0)
    program.drop()
    assert (graphs[0].resets, pools) == (1, ["shared"])


def test_a_capture_that_fails_leaves_the_callers_stream(monkeypatch):
    """torch's own context of a capture does not come to it then."""
    current, own = (SimpleNamespace(name=name, wait_stream=lambda other: None) for name in ("caller's", "capture's"))
    streams = [current]

    @contextmanager
    def switch(stream: Any) -> Iterator[None]:
        before, streams[-1] = streams[-1], stream
        try:
            yield
        finally:
            streams[-1] = before

    def graph(stub: StubGraph, stream: Any, **_: object) -> Any:
        streams[-1] = stream
        raise RuntimeError("operation not permitted when stream is capturing")

    for name, stub in {
        "current_stream": lambda device: streams[-1],
        "stream": switch,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: 0,
        "CUDAGraph": StubGraph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    with pytest.raises(RuntimeError, match="not permitted"):
        captured(lambda x: x, [torch.ones(2)], (), own)
    assert streams == [current]


EMPTY = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 3


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


def warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture does before its graph: three steps, after which all that it knows of is put back."""

    def build(self: GraphedTrainer, step: Any, inputs: Any, changed: Any) -> Program:
        with preserve_rng(CPU), preserve_tensors(changed):
            for _ in range(3):
                step(*inputs)
        return eager(step, inputs)

    monkeypatch.setattr(GraphedTrainer, "_build", build)


def unfreeze(graphed: GraphedTrainer) -> None:
    graphed.model.backbone[0].weight.requires_grad_(True)


def load_fresh_state(graphed: GraphedTrainer) -> None:
    graphed.optimizer.load_state_dict(type(graphed.optimizer)(**_options_of(graphed)).state_dict())


def _options_of(graphed: GraphedTrainer) -> dict[str, Any]:
    names = ("fused", "capturable") if isinstance(graphed.optimizer, torch.optim.AdamW) else ("fused", "momentum")
    group = graphed.optimizer.param_groups[0]
    return {"params": group["params"], "lr": torch.tensor(0.02), **{name: group[name] for name in names}}


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
            warming_up(monkeypatch)
        torch.manual_seed(1)
        for _ in range(3):
            graphed.step(*small_scene())
        states.append(state_of(graphed))
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


def test_a_trainer_made_in_inference_mode_trains_outside_it():
    model = detector()
    with torch.inference_mode():
        graphed = trainer(model, amp=torch.float16)
    graphed.step(*small_scene())
    assert len(graphed.losses()) == 1


def test_an_build_optimizer_another_model_is_refused():
    model = detector()
    with pytest.raises(ValueError, match=r"(\d+) of the \1 parameters of the optimizer are not the model's"):
        GraphedTrainer(model, sgd(detector()), SHAPE, MAX_BOXES)
    foreign = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], torch.tensor(0.1), fused=True)
    with pytest.raises(ValueError, match=r"1 of the .* are not the model's"):
        GraphedTrainer(model, foreign, SHAPE, MAX_BOXES)
    frozen = model.backbone[0].requires_grad_(False)
    with pytest.raises(ValueError, match="none of the model's trainable"):
        GraphedTrainer(model, sgd(frozen), SHAPE, MAX_BOXES)


def test_inference_mode_leaves_nothing_behind():
    images, targets = small_scene()
    model = detector().eval()
    graphed = GraphedDetector(model, SHAPE)
    with torch.inference_mode():
        first = graphed(images)
    again = graphed(images)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["boxes"], other["boxes"])
    training = trainer()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inside torch\.inference_mode"):
        training.step(images, targets)
    training.step(images, targets)
    assert len(training.losses()) == 1


def test_images_that_take_a_gradient_leave_none_behind():
    images, targets = small_scene()
    graphed = trainer()
    for _ in range(2):
        graphed.step([image.clone().requires_grad_() for image in images], targets)
    graphed.step(images, targets)
    assert not graphed._programs[SHAPE].inputs[0].requires_grad
    assert len(graphed.losses()) == 3


def test_a_batch_without_any_weight_teaches_nothing_and_is_not_skipped():
    weighted = detector(class_weights=(0.0, 1.0, 1.0, 1.0), loss_weights=(8.0, 1.0, 1.0, 1.0))
    graphed = trainer(weighted, amp=torch.float16)
    for _ in range(2):
        graphed.step(small_scene()[0], EMPTY)
    rows = graphed.losses()
    assert [row["skipped"] for row in rows] == [0, 0]
    assert [row["loss_classifier"] for row in rows] == [0, 0]


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


# What only a capture can show.


def on_the_gpu(make: Callable[..., Any] = sgd, **options: Any) -> GraphedTrainer:
    return trainer(detector().cuda(), make, **options)


def eager_steps(graphed: GraphedTrainer, steps: int) -> list[Tensor]:
    """The same function, not captured."""
    batch, padded, _ = graphed.model.preprocess(*small_scene())
    options = {"amp": graphed.amp, "clip_norm": graphed.clip_norm}
    parts = graphed.model, graphed.optimizer, graphed.loss_scale, Batch(*batch), padded
    return [training_step(*parts, **options) for _ in range(steps)]


@pytest.mark.cuda
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_replays_are_the_eager_steps(make, amp):
    graphed, twin = (on_the_gpu(make, amp=amp, clip_norm=1.0) for _ in range(2))
    torch.manual_seed(3)
    for _ in range(5):
        graphed.step(*small_scene())
    torch.manual_seed(3)
    expected = torch.stack(eager_steps(twin, 5))
    found = torch.stack([row for *_, row in graphed._unread])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(state_of(graphed), state_of(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
def test_the_capture_leaves_all_as_it_was():
    graphed = on_the_gpu(amp=torch.float16)
    graphed.step(*small_scene())
    graphed.recapture()
    torch.cuda.synchronize()
    before, generators = state_of(graphed), (torch.get_rng_state(), torch.cuda.get_rng_state())
    scale = [tensor.clone() for tensor in graphed.loss_scale]
    graphed._program(SHAPE)
    assert_same(state_of(graphed), before)
    assert_same(list(graphed.loss_scale), scale)
    assert_same([torch.get_rng_state(), torch.cuda.get_rng_state()], list(generators))


@pytest.mark.cuda
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


@pytest.mark.cuda
def test_replays_do_not_wait():
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


@pytest.mark.cuda
def test_a_replay_that_is_not_finite_changes_nothing():
    graphed = on_the_gpu()
    images, targets = small_scene()
    graphed.step(images, targets)
    before = state_of(graphed)
    graphed.step([image * torch.inf for image in images], targets)
    assert_same(state_of(graphed), before)
    graphed.step(images, targets)
    assert differ(state_of(graphed), before)
    with pytest.raises(FloatingPointError, match="step 2"):
        graphed.losses()


@pytest.mark.cuda
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


@pytest.mark.cuda
def test_a_captured_detector_finds_what_the_model_finds():
    model = small_detector(**FIXED, box_score_thresh=0.01).cuda().eval()
    graphed = GraphedDetector(model, SHAPE)
    for seed in (1, 2, 3):
        images, _ = small_scene(seed)
        torch.testing.assert_close(graphed(images), model(images), rtol=1e-4, atol=1e-3)


def test_the_scene_is_what_the_bucket_is_for():
    batch, padded, _ = detector().preprocess(*small_scene())
    assert (tuple(batch.images.shape), padded.boxes.shape[1]) == (SHAPE, MAX_BOXES)
    assert NUM_CLASSES == 4
