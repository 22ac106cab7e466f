"""Steps of a run beside a plain loop of torch."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdet.engine.buckets import GraphPlan
from fastdet.engine.distributed import Processes
from fastdet.engine.recipes import TrainSettings, build_optimizer
from fastdet.engine.step import Stepper, choose_graphs, describe_steps
from fastdet.graphs.step import COLUMNS, LossScale
from fastdet.models.layers import FrozenBatchNorm2d
from fastdet.models.losses import NAMES
from tests.helpers.detectors import small_detector, small_scene

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    lr=0.05, bias_lr_factor=2.0, weight_decay=1e-2, bias_weight_decay=0.0, momentum=0.8, clip_norm=0.5
)
RATES = (0.01, 0.05, 0.05, 0.03, 0.02)


def make_model(**overrides):
    """With two frozen parameters; its BatchNorm and its dropout are in training."""
    model = small_detector(**overrides).train()
    for parameter in model.backbone[0].parameters():
        parameter.requires_grad_(False)
    return model


def make_stepper(model, settings=SETTINGS, **options):
    return Stepper(model, build_optimizer(model, settings), settings, LossScale.initial(None, CPU), **options)


def scene(step):
    """Images of two sizes, and their targets with the seeds of what is sampled."""
    images, targets = small_scene(step)
    return images, [{**target, "seed": torch.tensor(10 * step + k)} for k, target in enumerate(targets)]


def plain_steps(model, settings=SETTINGS, rates=RATES, batches=scene):
    """What anyone would write, in fp32 with an optimizer that is not fused; the rows that a step returns."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": settings.bias_weight_decay},
    ]
    optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=False)
    rows = []
    for step, rate in enumerate(rates):
        for group, factor in zip(optimizer.param_groups, (1.0, settings.bias_lr_factor), strict=True):
            group["lr"] = rate * factor
        torch.manual_seed(step)
        losses = model(*batches(step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf)
        optimizer.step()
        rows.append([*(float(losses[name].detach()) for name in NAMES), float(norm), 0.0, 1.0])
    return rows


def steps_of(stepper, rates=RATES, batches=scene):
    rows = []
    for step, rate in enumerate(rates):
        stepper.set_lr(rate)
        torch.manual_seed(step)
        images, targets = batches(step)
        rows.append(stepper(images, targets, len(images)).tolist())
    return rows


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def differ(model, other):
    return [name for name, value in model.state_dict().items() if not torch.equal(value, other.state_dict()[name])]


@pytest.mark.parametrize("clip_norm", [0.5, 0.0], ids=["clipped", "whole"])
def test_steps_equal_a_plain_loop(clip_norm):
    settings = TrainSettings(**{**vars(SETTINGS), "clip_norm": clip_norm})
    model = make_model()
    before, plain = copy.deepcopy(model), copy.deepcopy(model)
    rows, expected = steps_of(make_stepper(model, settings)), plain_steps(plain, settings)
    assert_close(rows, expected)
    assert_close(model.state_dict(), plain.state_dict())
    frozen = {"backbone.0.weight", "backbone.0.bias"}
    assert set(differ(model, before)) == set(model.state_dict()) - frozen
    # It is clipped, so that the test would see it.
    assert min(row[COLUMNS.index("gradient_norm")] for row in rows) > 0.5


def test_steps_by_a_plan_of_graphs_equal_a_plain_loop():
    """Without a GPU they are not captured; one of fewer images is not in the plan."""
    model = make_model(size_buckets=((96, 96),))
    plain = copy.deepcopy(model)

    def batches(step):
        images, targets = scene(step)
        return images[: 3 - step % 2], targets[: 3 - step % 2]

    stepper = make_stepper(model, graphs=GraphPlan(((3, 3, 96, 96),), 4))
    assert_close(steps_of(stepper, batches=batches), plain_steps(plain, batches=batches))
    assert_close(model.state_dict(), plain.state_dict())


def test_steps_by_a_plan_of_graphs_begin_with_any_mode():
    """As those without one do, of a run whose epochs put the model into training."""
    model = make_model(size_buckets=((96, 96),)).eval()
    plain = copy.deepcopy(model).train()
    stepper = make_stepper(model, graphs=GraphPlan(((3, 3, 96, 96),), 4))
    assert_close(steps_of(stepper), plain_steps(plain))


@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_steps_in_parts_equal_those_of_the_whole(accumulate):
    """Of a network that treats each image alone."""
    model = make_model()
    model.backbone[1].eval()
    model.backbone[3].p = 0.0
    plain, calls = copy.deepcopy(model), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    settings = TrainSettings(**{**vars(SETTINGS), "accumulate": accumulate, "batch_size": 5})
    assert_close(steps_of(make_stepper(model, settings)), plain_steps(plain))
    assert_close(model.state_dict(), plain.state_dict())
    assert max(calls) == -(-3 // accumulate)


class Other(nn.Module):
    """A model that is not ours, whose losses are means over images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.calls = nn.Linear(3, 4), []

    def forward(self, images, targets):
        self.calls.append(len(images))
        features = self.layer(torch.stack([image.mean((1, 2)) for image in images]))
        aims = torch.tensor([[len(target["labels"])] for target in targets])
        losses = ((features - aims) ** 2).mean(0)
        return dict(zip(reversed(NAMES), losses, strict=True))


@pytest.mark.parametrize(("accumulate", "calls"), [(1, [3]), (2, [2, 1]), (3, [1, 1, 1])])
def test_steps_of_another_model_equal_a_plain_loop(accumulate, calls):
    model, plain = Other(), Other()
    settings = TrainSettings(**{**vars(SETTINGS), "accumulate": accumulate})
    assert_close(steps_of(make_stepper(model, settings)), plain_steps(plain))
    assert_close(model.state_dict(), plain.state_dict())
    assert model.calls == calls * len(RATES)


@pytest.mark.parametrize("make", [make_model, Other], ids=["ours", "other"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip_norm", [0.5, 0.0])
def test_a_loss_that_is_not_finite_changes_nothing(make, accumulate, clip_norm):
    model = make()
    stepper = make_stepper(model, TrainSettings(**{**vars(SETTINGS), "accumulate": accumulate, "clip_norm": clip_norm}))
    steps_of(stepper, RATES[:2])
    before, state = copy.deepcopy(model), copy.deepcopy(stepper.optimizer.state_dict()["state"])
    layer = model.layer if make is Other else model.roi_heads.box_predictor.cls_score
    handle = layer.register_forward_hook(lambda _, __, output: output * math.nan)
    (row,) = steps_of(stepper, RATES[2:3])
    handle.remove()
    assert row[COLUMNS.index("skipped")] == 1
    assert any(map(math.isnan, row[: stepper.checked]))
    assert differ(model, before) == []
    torch.testing.assert_close(stepper.optimizer.state_dict()["state"], state, rtol=0, atol=0)
    (row,) = steps_of(stepper, RATES[3:4])
    assert row[COLUMNS.index("skipped")] == 0
    assert differ(model, before)


def test_how_steps_are_taken_is_described():
    model, data = small_detector(), [None]
    assert describe_steps(model, TrainSettings()) == "on cpu, float32"
    parts = describe_steps(model, TrainSettings(amp="bfloat16", accumulate=3))
    assert parts == "on cpu, bfloat16, in 3 parts, BatchNorm by the images of each part"
    several = describe_steps(model, TrainSettings(), processes=Processes(0, 2))
    assert several == "on cpu, float32, 2 processes, BatchNorm by the images of each process"
    assert describe_steps(model, TrainSettings(workers=3)) == "on cpu, float32, 3 workers load images"
    assert choose_graphs(model, data, TrainSettings()) is None
    model.backbone[1] = FrozenBatchNorm2d(4)
    assert describe_steps(model, TrainSettings(accumulate=3)) == "on cpu, float32, in 3 parts"
    assert describe_steps(model, TrainSettings(), processes=Processes(0, 2)) == "on cpu, float32, 2 processes"


def test_graphs_are_chosen_for_a_detector_on_a_gpu():
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode(), torch.device("cuda"):
        model, other, data = small_detector(), Other(), [None] * 9
    graphs = choose_graphs(model, data, TrainSettings())
    assert "each one CUDA graph, of images padded to " in describe_steps(model, TrainSettings(), graphs)
    for each, settings in ((model, TrainSettings(graphs=False)), (other, TrainSettings())):
        assert choose_graphs(each, data, settings) is None
    assert choose_graphs(model, data, TrainSettings(batch_size=3)).shapes[0][:2] == (3, 3)
    # Some of these are host syncs.
    torch.use_deterministic_algorithms(True)
    assert choose_graphs(model, data, TrainSettings()) is None
