import csv
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from fastdet.data import DataError, Shapes
from fastdet.data.augmentation import augment, build
from fastdet.engine import checkpoint
from fastdet.engine.checkpoint import CheckpointError
from fastdet.engine.loading import EpochPlans, plan_epoch
from fastdet.engine.recipes import (
    RECIPES,
    TrainSettings,
    build_average,
    build_optimizer,
    learning_rate,
    parameter_groups,
    update_average,
)
from fastdet.engine.run.folder import COLUMNS, LOSSES, VALIDATION_COLUMNS, read_rows
from fastdet.engine.run.state import build_state
from fastdet.engine.trainer import train
from fastdet.graphs.step import COLUMNS as ROW
from fastdet.visualize import plot_losses
from tests.helpers.detectors import small_detector

SETTINGS = TrainSettings(
    epochs=4, batch_size=2, lr=0.05, warmup_steps=3, schedule="step", milestones=(3,), log_every=2, bias_lr_factor=2.0
)


class StandInDetector(nn.Module):
    """What the loop needs of a detector: four losses that depend on pixels, boxes and draws, and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.poison_at = -1

    def forward(self, images, targets=None):
        self.inputs += [(image, target["boxes"]) for image, target in zip(images, targets, strict=True)]
        features = self.layers(torch.stack(images).float() / 255).mean((2, 3))
        aims = torch.stack([target["boxes"].mean(0) / 32 for target in targets])
        losses = ((features - aims + 0.1 * torch.rand_like(aims)) ** 2).mean(0)
        if len(self.inputs) > self.poison_at > 0:
            losses = losses * math.nan
        return dict(zip(LOSSES, losses, strict=True))


def build_detector() -> StandInDetector:
    torch.manual_seed(1)
    return StandInDetector()


class Drawn(Dataset):
    """Shapes drawn once for all tests."""

    items = tuple(Shapes(7, size=32)[index] for index in range(7))
    class_names = Shapes.class_names

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture
def shapes() -> Drawn:
    return Drawn()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """One thread, since the tensors are tiny, and no picture of the losses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("losses", "average_precision"):
        monkeypatch.setattr(f"fastdet.engine.trainer.plot_{name}", lambda *paths, **options: None)
    yield
    torch.set_num_threads(threads)


def run(model, dataset, out, settings=SETTINGS, **options):
    return train(model, dataset, out, settings, progress=False, **options)


def assert_same_run(first, second):
    """Two folders hold bitwise the same checkpoint, and rows that differ in speed and data wait alone."""
    expected, actual = (checkpoint.load(folder / "last.pth") for folder in (first, second))
    for part in ("model", "random"):
        assert expected[part].keys() == actual[part].keys()
        for name in expected[part]:
            assert torch.equal(expected[part][name], actual[part][name]), f"{part} {name}"
    for index, state in expected["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], actual["optimizer"]["state"][index]["momentum_buffer"])
    assert rows_of(first) == rows_of(second)


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [[row[name] for name in COLUMNS[:-2]] for row in csv.DictReader(file)]


def test_training_writes_its_files_and_learns(tmp_path, shapes, monkeypatch):
    monkeypatch.setattr("fastdet.engine.trainer.plot_losses", plot_losses)
    model = build_detector()
    rows = run(model, shapes, tmp_path / "run", description={"class_names": shapes.class_names})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock",
        "last.pth",
        "loss.png",
        "metrics.csv",
        "settings.json",
    ]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        reader = csv.DictReader(file)
        written = list(reader)
    assert tuple(reader.fieldnames) == COLUMNS
    # Four steps an epoch, a row every two.
    assert [(row["epoch"], row["step"]) for row in rows] == [
        (epoch, 4 * epoch - k) for epoch in (1, 2, 3, 4) for k in (2, 0)
    ]
    assert [int(row["step"]) for row in written] == [row["step"] for row in rows]
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[name] for name in LOSSES))
        assert row["images_per_second"] > 0
        assert 0 < row["data_wait"] < 1
    assert rows[-1]["loss"] < rows[0]["loss"]
    saved = checkpoint.load(tmp_path / "run" / "last.pth")
    assert (saved["epoch"], saved["class_names"]) == (4, shapes.class_names)


def test_two_epochs_and_two_more_are_four(tmp_path, shapes):
    run(build_detector(), shapes, tmp_path / "straight")
    run(build_detector(), shapes, tmp_path / "resumed", stop_after=2)
    torch.manual_seed(99)
    run(StandInDetector(), shapes, tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_a_run_of_two_epochs_can_be_lengthened(tmp_path, shapes):
    # A longer warm-up would be cut to a fifth of the steps, of which there are more then.
    settings = replace(SETTINGS, warmup_steps=1)
    run(build_detector(), shapes, tmp_path / "straight", settings)
    run(build_detector(), shapes, tmp_path / "resumed", replace(settings, epochs=2))
    run(StandInDetector(), shapes, tmp_path / "resumed", settings, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


class Interrupting(Dataset):
    """Shapes that press Ctrl-C at the n-th picture."""

    def __init__(self, shapes, at):
        self.shapes, self.left = shapes, at

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.shapes[index]


@pytest.mark.parametrize("at", [1, 6, 13, 20, 21])
def test_an_interrupted_run_resumes_exactly_and_doubles_no_row(tmp_path, shapes, at):
    settings = replace(SETTINGS, schedule="cosine", log_every=1, epochs=3)
    run(build_detector(), shapes, tmp_path / "straight", settings)
    with pytest.raises(KeyboardInterrupt):
        run(build_detector(), Interrupting(shapes, at), tmp_path / "resumed", settings)
    run(StandInDetector(), shapes, tmp_path / "resumed", settings, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_a_row_that_was_cut_short_is_written_anew(tmp_path, shapes):
    run(build_detector(), shapes, tmp_path / "straight")
    run(build_detector(), shapes, tmp_path / "resumed", stop_after=2)
    with (tmp_path / "resumed" / "metrics.csv").open("a") as file:
        file.write("3,10,0.05,1.5")
    run(StandInDetector(), shapes, tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_resuming_a_finished_run_changes_nothing(tmp_path, shapes):
    rows = run(build_detector(), shapes, tmp_path)
    before = checkpoint.load(tmp_path / "last.pth")["model"]
    assert run(StandInDetector(), shapes, tmp_path, resume=True) == rows
    after = checkpoint.load(tmp_path / "last.pth")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_workers_change_nothing(tmp_path, shapes):
    settings = replace(SETTINGS, epochs=2)
    run(build_detector(), shapes, tmp_path / "none", settings)
    run(build_detector(), shapes, tmp_path / "two", replace(settings, workers=2))
    assert_same_run(tmp_path / "none", tmp_path / "two")


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path, shapes):
    settings = replace(SETTINGS, epochs=1)
    for name, seed in (("first", 0), ("same", 0), ("different", 1)):
        run(build_detector(), shapes, tmp_path / name, replace(settings, seed=seed))
    assert_same_run(tmp_path / "first", tmp_path / "same")
    assert rows_of(tmp_path / "first") != rows_of(tmp_path / "different")


def test_a_run_is_not_overwritten_unasked(tmp_path, shapes):
    settings = replace(SETTINGS, epochs=1)
    run(build_detector(), shapes, tmp_path, settings)
    with pytest.raises(CheckpointError, match="has a run already"):
        run(build_detector(), shapes, tmp_path, settings)
    assert len(run(build_detector(), shapes, tmp_path, settings, overwrite=True)) == 2
    assert len(rows_of(tmp_path)) == 2


def test_a_new_run_that_cannot_begin_leaves_the_old_one(tmp_path, shapes):
    run(build_detector(), shapes, tmp_path, stop_after=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="'scale-jitter' needs a model with settings"):
        run(build_detector(), shapes, tmp_path, replace(SETTINGS, augmentation="scale-jitter"), overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resuming_with_something_else_is_an_error(tmp_path, shapes):
    run(build_detector(), shapes, tmp_path, stop_after=1, description={"class_names": ("a", "b")})
    same = {"resume": True, "description": {"class_names": ("a", "b")}}
    with pytest.raises(CheckpointError, match=r"last\.pth: lr is 0\.1, but the run to be resumed has 0\.05"):
        run(build_detector(), shapes, tmp_path, replace(SETTINGS, lr=0.1), **same)
    with pytest.raises(CheckpointError, match="images is 5"):
        run(build_detector(), Subset(shapes, range(5)), tmp_path, **same)
    with pytest.raises(CheckpointError, match="class_names"):
        run(build_detector(), shapes, tmp_path, resume=True, description={"class_names": ("b", "a")})
    other = nn.Sequential(nn.Conv2d(3, 9, 1))
    with pytest.raises(CheckpointError, match="does not fit the model") as caught:
        run(other, shapes, tmp_path, **same)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        run(build_detector(), shapes, tmp_path / "nowhere", resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, shapes):
    model = build_detector()
    model.poison_at = 10
    shapes.ids, shapes.target = [f"picture-{k}" for k in range(7)], "not a method"
    batch = plan_epoch(7, SETTINGS, 1)[1]
    with pytest.raises(FloatingPointError, match=r"step 6: .*loss_classifier nan") as caught:
        run(model, shapes, tmp_path)
    for index, _ in batch:
        assert f"picture-{index}" in str(caught.value)
    saved = checkpoint.load(tmp_path / "last.pth")
    assert saved["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


def test_a_gradient_that_is_not_finite_is_noticed_even_where_nothing_is_clipped(tmp_path, shapes, monkeypatch):
    """A finite loss of sqrt(0), whose gradient is infinite."""
    plain = StandInDetector.forward

    def poisoned(self, images, targets=None):
        losses = plain(self, images, targets)
        return {**losses, LOSSES[0]: losses[LOSSES[0]] + (self.layers[0].bias * 0).sum().sqrt()}

    monkeypatch.setattr(StandInDetector, "forward", poisoned)
    with pytest.raises(FloatingPointError, match="gradient_norm nan"):
        run(build_detector(), shapes, tmp_path, replace(SETTINGS, clip_norm=0.0))
    saved = checkpoint.load(tmp_path / "last.pth")
    assert saved["epoch"] == 0
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


def test_what_the_model_does_not_take_names_the_images(tmp_path, shapes, monkeypatch):
    def refuse(self, images, targets=None):
        raise ValueError("target 1: box 0 has no area")

    monkeypatch.setattr(StandInDetector, "forward", refuse)
    names = ", ".join(str(index) for index, _ in plan_epoch(7, SETTINGS, 0)[0])
    with pytest.raises(DataError, match=f"images {names}: target 1: box 0 has no area"):
        run(build_detector(), shapes, tmp_path)


def test_the_loop_has_no_host_sync_between_two_readings(tmp_path, shapes, monkeypatch):
    reads = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or plain(self))
    run(build_detector(), shapes, tmp_path, replace(SETTINGS, epochs=1, log_every=3))
    assert reads == [(3, len(ROW)), (1, len(ROW))]


def test_items_are_augmented_by_the_seeds_of_the_plan(tmp_path, shapes):
    model = build_detector()
    settings = replace(SETTINGS, epochs=1, seed=1)
    run(model, shapes, tmp_path, settings)
    draws, mirrored = [draw for batch in plan_epoch(7, settings, 0) for draw in batch], []
    for (index, seed), (image, boxes) in zip(draws, model.inputs, strict=True):
        expected, target = augment(build("flip", (32, 32)), shapes[index], seed)
        assert torch.equal(image, expected)
        assert torch.equal(boxes, target["boxes"])
        mirrored.append(torch.equal(image, shapes[index][0].flip(2)))
    assert set(mirrored) == {True, False}, "the seed should draw both"


def test_the_plan_of_an_epoch():
    settings = TrainSettings(batch_size=3, seed=5)
    plan = plan_epoch(10, settings, 2)
    assert [len(batch) for batch in plan] == [3, 3, 3, 1]
    assert sorted(index for batch in plan for index, _ in batch) == list(range(10))
    assert plan == plan_epoch(10, settings, 2)
    assert plan != plan_epoch(10, settings, 3)
    assert plan != plan_epoch(10, replace(settings, seed=6), 2)
    seeds = [seed for batch in plan for _, seed in batch]
    assert len(set(seeds)) == 10
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_batches_of_one_aspect_ratio(batch_size):
    draw = np.random.default_rng(0)
    sizes = [[(480, 640), (640, 480), (500, 500), (100, 1000)][k] for k in draw.integers(0, 4, 45)]
    settings = TrainSettings(batch_size=batch_size)
    plan = plan_epoch(45, settings, 3, sizes)
    assert sorted(index for batch in plan for index, _ in batch) == list(range(45))
    assert len(plan) == len(plan_epoch(45, settings, 3)) == -(-45 // batch_size)
    mixed = [batch for batch in plan if len({sizes[index] for index, _ in batch}) > 1]
    # What is left of four groups is less than four batches.
    assert len(mixed) < 4
    assert plan == plan_epoch(45, settings, 3, sizes)
    ungrouped = plan_epoch(45, replace(settings, aspect_groups=0), 3, sizes)
    assert ungrouped == plan_epoch(45, settings, 3)
    if batch_size == 3:
        assert len([b for b in ungrouped if len({sizes[index] for index, _ in b}) > 1]) > 8


def test_images_of_one_shape_are_in_the_order_of_no_groups():
    settings = TrainSettings(batch_size=4)
    assert plan_epoch(30, settings, 1, [(480, 640)] * 30) == plan_epoch(30, settings, 1)


def test_the_plans_of_a_run():
    settings = TrainSettings(batch_size=3, epochs=4)
    plans = EpochPlans(10, settings, range(1, 3), 2, None)
    assert plans.steps == 4
    assert list(plans) == plan_epoch(10, settings, 1)[2:] + plan_epoch(10, settings, 2)


def test_learning_rates_by_value():
    cosine = TrainSettings(epochs=10, lr=0.02, warmup_steps=4)
    assert learning_rate(cosine, 0, 10) == pytest.approx(0.02 / 4)
    assert learning_rate(cosine, 1, 10) == pytest.approx(0.02 * 2 / 4, rel=1e-3)
    assert learning_rate(cosine, 50, 10) == pytest.approx(0.01)
    assert learning_rate(cosine, 25, 10) == pytest.approx(0.02 * (1 + math.sqrt(0.5)) / 2)
    assert 0 < learning_rate(cosine, 99, 10) < 1e-5
    vgg16 = RECIPES["vgg16"]
    assert learning_rate(vgg16, 0, 5011) == learning_rate(vgg16, 10 * 5011 - 1, 5011) == 1e-3
    assert learning_rate(vgg16, 10 * 5011, 5011) == learning_rate(vgg16, 14 * 5011 - 1, 5011) == pytest.approx(1e-4)
    steps = TrainSettings(schedule="step", lr=1, warmup_steps=0, milestones=(1, 2), gamma=0.5)
    assert [learning_rate(steps, step, 2) for step in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_parameter_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    weights, biases = parameter_groups(model, RECIPES["vgg16"])
    assert weights["params"] == [model[1].weight, model[2].weight]
    assert biases["params"] == [model[1].bias, model[2].bias]
    assert (weights["lr_factor"], weights["weight_decay"]) == (1, 5e-4)
    assert (biases["lr_factor"], biases["weight_decay"]) == (2, 0)
    groups = parameter_groups(model, TrainSettings())
    assert [(group["lr_factor"], group["weight_decay"]) for group in groups] == [(1, 1e-4), (1, 1e-4)]
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), TrainSettings())) == 1
    with pytest.raises(ValueError, match="no trainable parameters"):
        parameter_groups(model.requires_grad_(False), TrainSettings())


def test_groups_get_their_rates(tmp_path, shapes):
    run(build_detector(), shapes, tmp_path, replace(SETTINGS, epochs=1, warmup_steps=0))
    weights, biases = checkpoint.load(tmp_path / "last.pth")["optimizer"]["param_groups"]
    assert float(biases["lr"]) == pytest.approx(2 * float(weights["lr"])) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("epochs", -1), ("batch_size", 0), ("lr", 0), ("lr", math.nan), ("schedule", "linear"), ("log_every", 0)],
        *[("accumulate", 5), ("seed", (1 << 63) + 1)],
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        TrainSettings(**{name: value})


def test_settings_of_another_type():
    allowed = {"bias_weight_decay": None, "milestones": [], "graphs": True}
    for field in fields(TrainSettings):
        for value in (None, "x", -1, math.nan, math.inf, True, [], [0.5], object()):
            if field.name in allowed and allowed[field.name] == value:
                TrainSettings(**{field.name: value})
            else:
                with pytest.raises(ValueError, match=f"^{field.name} must be .*, not "):
                    TrainSettings(**{field.name: value})


def test_no_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        run(build_detector(), Shapes(0), tmp_path)


def test_no_epochs_write_no_picture(tmp_path, shapes):
    assert run(build_detector(), shapes, tmp_path, replace(SETTINGS, epochs=0)) == []
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers_are_torchs(name, kind):
    layer = torch.nn.Linear(3, 2)
    settings = TrainSettings(optimizer_name=name, lr=0.5, weight_decay=0.25, bias_weight_decay=0.0)
    optimizer = build_optimizer(layer, settings)
    assert type(optimizer) is kind
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.25), (0.5, 0.0)]
    assert optimizer.defaults["fused"], "that a CUDA graph can hold"
    with pytest.raises(ValueError, match="'adam'"):
        TrainSettings(optimizer_name="adam")


@pytest.mark.parametrize(
    ("amp", "dtype"),
    [("none", torch.float32), ("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_networks_run_in_the_precision_that_is_asked_for(tmp_path, shapes, amp, dtype):
    model, dtypes, gradients = build_detector(), set(), set()
    model.layers[3].register_forward_hook(lambda layer, args, output: dtypes.add(output.dtype))
    weight = model.layers[3].weight
    weight.register_hook(lambda gradient: gradients.add(gradient.dtype))
    rows = run(model, shapes, tmp_path, replace(SETTINGS, epochs=1, amp=amp))
    assert (dtypes, gradients, weight.dtype) == ({dtype}, {torch.float32}, torch.float32)
    assert math.isfinite(rows[-1]["loss"])
    other = replace(SETTINGS, epochs=2, amp="none" if amp == "bfloat16" else "bfloat16")
    with pytest.raises(CheckpointError, match="amp is"):
        train(build_detector(), shapes, tmp_path, other, resume=True, progress=False)


def test_the_loss_scale_of_fp16_is_resumed(tmp_path, shapes):
    """It falls in the first steps, whose gradients overflow, and these change no weights."""
    settings = replace(SETTINGS, epochs=2, amp="float16", lr=1e-3)

    def build():
        model = build_detector()
        # Of what is multiplied by 2**16 a part is above the largest of float16.
        model.layers[3].register_full_backward_pre_hook(lambda layer, grads: (grads[0] * 1000,))
        return model

    run(build(), shapes, tmp_path / "straight", settings)
    run(build(), shapes, tmp_path / "resumed", settings, stop_after=1)
    run(build(), shapes, tmp_path / "resumed", settings, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    first, second = (checkpoint.load(tmp_path / name / "last.pth")["loss_scale"] for name in ("straight", "resumed"))
    assert float(first["scale"]) == float(second["scale"]) < 2.0**16
    assert int(first["growth_tracker"]) == int(second["growth_tracker"])


class Graded:
    """Validation with the grades that it is given; it remembers what it was called with."""

    def __init__(self, *grades: float) -> None:
        self.grades, self.states = list(grades), []

    def __call__(self, model):
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})
        grade = self.grades[len(self.states) - 1]
        return {"AP": grade, "AP50": grade, "AP75": grade / 2}


def test_the_best_weights_are_kept(tmp_path, shapes):
    validate = Graded(0.2, 0.5, 0.5, 0.1)
    run(build_detector(), shapes, tmp_path, validate=validate, description={"class_names": ("a",)})
    best, last = (checkpoint.load(tmp_path / f"{name}.pth") for name in ("best", "last"))
    assert (best["epoch"], best["AP"], best["class_names"]) == (2, 0.5, ("a",))
    for name, value in validate.states[1].items():
        assert torch.equal(best["model"][name], value)
    assert last["best"] == {"epoch": 2, "AP": 0.5, "evaluations_since": 2}
    with (tmp_path / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"], row["AP"]) for row in rows] == [
        ("1", "4", "0.2"),
        ("2", "8", "0.5"),
        ("3", "12", "0.5"),
        ("4", "16", "0.1"),
    ]


def test_the_metrics_of_an_evaluation_may_be_numbers_of_numpy_or_tensors(tmp_path, shapes):
    validate = Graded(np.float64(0.25), torch.tensor(0.5))
    run(build_detector(), shapes, tmp_path, stop_after=2, validate=validate)
    best, last = (checkpoint.load(tmp_path / f"{name}.pth") for name in ("best", "last"))
    assert (best["AP"], last["best"]) == (0.5, {"epoch": 2, "AP": 0.5, "evaluations_since": 0})
    run(build_detector(), shapes, tmp_path, stop_after=2, validate=validate, resume=True)


@pytest.mark.parametrize("found", [None, {}, {"mAP": 0.5}])
def test_an_evaluation_needs_an_average_precision(tmp_path, shapes, found):
    with pytest.raises(ValueError, match='validate must return a dict with "AP", got '):
        run(build_detector(), shapes, tmp_path, validate=lambda model: found)
    assert train(build_detector(), shapes, tmp_path, SETTINGS, resume=True, stop_after=1, validate=lambda _: {"AP": 1})


@pytest.mark.parametrize("item", [(1, 2, 3), (1,)])
def test_an_item_that_is_no_pair_is_named(tmp_path, item):
    with pytest.raises(DataError, match=r"item \d of the data set: .* to unpack \(expected 2"):
        run(build_detector(), [item] * 3, tmp_path)


def test_a_data_set_may_have_attributes_of_the_names_of_ours(tmp_path, shapes):
    shapes.ids, shapes.target = list("abcdefg"), lambda index: index
    run(build_detector(), shapes, tmp_path, stop_after=1)
    assert checkpoint.load(tmp_path / "last.pth")["data"] is None


@pytest.mark.parametrize(("every", "epochs"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4]), (9, [4])])
def test_evaluations_come_every_few_epochs_and_at_the_end(tmp_path, shapes, every, epochs):
    run(build_detector(), shapes, tmp_path, replace(SETTINGS, eval_every=every), validate=Graded(*[0.1] * 4))
    rows = read_rows(tmp_path / "validation.csv", 99, VALIDATION_COLUMNS)
    assert [row["epoch"] for row in rows] == epochs


def test_a_run_without_patience_left_ends(tmp_path, shapes):
    settings, grades = replace(SETTINGS, epochs=9, patience=2), (0.1, 0.3, 0.2, 0.3)
    validate = Graded(*grades)
    run(build_detector(), shapes, tmp_path, settings, validate=validate)
    assert len(validate.states) == 4
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 4
    again = Graded(0.9)
    run(StandInDetector(), shapes, tmp_path, settings, validate=again, resume=True)
    assert not again.states
    run(StandInDetector(), shapes, tmp_path, replace(settings, patience=3), validate=again, resume=True, stop_after=5)
    assert checkpoint.load(tmp_path / "best.pth")["epoch"] == 5


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_resumed_run_has_the_best_of_one_that_was_not_interrupted(tmp_path, shapes, ema):
    settings = replace(SETTINGS, ema=ema)
    run(build_detector(), shapes, tmp_path / "straight", settings, validate=Graded(0.2, 0.5, 0.4, 0.6))
    run(build_detector(), shapes, tmp_path / "resumed", settings, validate=Graded(0.2, 0.5), stop_after=2)
    # As of a run that was killed after its third evaluation, before the checkpoint.
    (tmp_path / "resumed/best.pth").write_bytes(b"of the third epoch")
    with (tmp_path / "resumed/validation.csv").open("a") as file:
        file.write("3,12,0.9,0.9,0.9,1,1,1,1,1\r\n")
    run(StandInDetector(), shapes, tmp_path / "resumed", settings, validate=Graded(0.4, 0.6), resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    states = [checkpoint.load(tmp_path / name / "best.pth") for name in ("straight", "resumed")]
    assert [state["epoch"] for state in states] == [4, 4]
    for name, value in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], value)
    texts = [(tmp_path / name / "validation.csv").read_text() for name in ("straight", "resumed")]
    assert texts[0] == texts[1]


def test_a_new_run_forgets_the_best_of_the_old(tmp_path, shapes):
    run(build_detector(), shapes, tmp_path, validate=Graded(0.9, 0.9, 0.9, 0.9))
    run(build_detector(), shapes, tmp_path, overwrite=True, stop_after=1)
    assert not (tmp_path / "best.pth").exists()
    assert not (tmp_path / "validation.csv").exists()


def test_the_record_of_a_failure_goes_with_the_next_attempt(tmp_path, shapes):
    run(build_detector(), shapes, tmp_path, stop_after=1)
    (tmp_path / "failure.json").write_text("of an earlier attempt")
    with pytest.raises(CheckpointError, match="lr is"):
        run(StandInDetector(), shapes, tmp_path, replace(SETTINGS, lr=0.9), resume=True)
    assert (tmp_path / "failure.json").exists()
    run(StandInDetector(), shapes, tmp_path, resume=True)
    assert not (tmp_path / "failure.json").exists()


def test_the_average_of_the_weights_by_value(tmp_path, shapes):
    decay, history, plain = 0.3, [], build_detector()
    step = torch.optim.SGD.step

    class Recorded(torch.optim.SGD):
        def step(self, *arguments, **options):
            step(self, *arguments, **options)
            history.append([p.detach().clone() for group in self.param_groups for p in group["params"]])

    average = build_average(plain)
    optimizer = Recorded(plain.parameters(), lr=0.1)
    expected = None
    for index in range(6):
        image = torch.rand(3, 32, 32)
        losses = plain([image, image], [{"boxes": torch.rand(2, 4)}] * 2)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        update_average(average, plain, decay)
        # The first update takes the weights as they are; n counts from 0.
        keep = min(decay, (1 + index) / (10 + index)) if index else 0.0
        expected = (
            history[-1]
            if expected is None
            else [keep * old + (1 - keep) * new for old, new in zip(expected, history[-1], strict=True)]
        )
        for value, wanted in zip(average.module.parameters(), expected, strict=True):
            torch.testing.assert_close(value, wanted)
    statistics = plain.layers[1]
    assert average.module.layers[1].num_batches_tracked == statistics.num_batches_tracked
    assert not torch.equal(average.module.layers[1].running_mean, statistics.running_mean)


def test_what_is_evaluated_is_the_average(tmp_path, shapes):
    validate, settings = Graded(0.1, 0.2, 0.3, 0.4), replace(SETTINGS, ema=0.9)
    model = build_detector()
    run(model, shapes, tmp_path, settings, validate=validate)
    saved = checkpoint.load(tmp_path / "last.pth")
    for name, value in validate.states[-1].items():
        assert torch.equal(saved["average"][name], value)
    weight = "layers.0.weight"
    assert not torch.equal(saved["average"][weight], saved["model"][weight])
    assert torch.equal(saved["model"][weight], model.state_dict()[weight])
    assert saved["averaged"] == 16


@pytest.mark.cuda
def test_the_average_lies_in_memory_as_the_weights_of_a_gpu(tmp_path):
    """Else torch would move one tensor after another."""
    state = build_state(tmp_path, small_detector().cuda(), replace(SETTINGS, ema=0.9), {})
    weights, averages = (list(each.parameters()) for each in (state.model, state.average.module))
    assert [weight.stride() for weight in weights] == [average.stride() for average in averages]
    assert weights[0].stride() == (48, 1, 12, 3), "channels-last"


def test_the_warm_up_of_a_short_run_is_short():
    short = TrainSettings(epochs=8, lr=1.0, warmup_steps=60)
    rates = [learning_rate(short, step, 5) for step in range(40)]
    assert max(rates) > 0.85
    assert rates[0] == pytest.approx(1 / 8)
    assert rates.index(max(rates)) == 7


def test_checkpoints_within_an_epoch(tmp_path, shapes, monkeypatch):
    saved, plain = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, content: saved.append(content) or plain(path, content))
    settings = replace(SETTINGS, batch_size=1, log_every=1, epochs=2, save_every=3)
    run(build_detector(), shapes, tmp_path, settings)
    places = [(content["epoch"], content["step"]) for content in saved]
    assert places == [(0, 0), (0, 3), (0, 6), (1, 0), (1, 3), (1, 6), (2, 0)]


def test_losses_of_an_evaluation_are_kept_beside_its_figures(tmp_path, shapes, monkeypatch):
    drawn, found = [], {"val_loss": 1.0, **dict.fromkeys(LOSSES, 0.25)}
    monkeypatch.setattr("fastdet.engine.trainer.plot_losses", lambda *paths, validation: drawn.append(validation))
    grades = Graded(0.1, 0.2, 0.3, 0.4)
    run(build_detector(), shapes, tmp_path, validate=lambda model: {**grades(model), **found})
    rows = read_rows(tmp_path / "validation.csv", 99, VALIDATION_COLUMNS)
    assert [row["AP"] for row in rows] == [0.1, 0.2, 0.3, 0.4]
    assert all({name: row[name] for name in found} == found for row in rows)
    assert drawn == [tmp_path / "validation.csv"]


def test_an_evaluation_need_not_have_losses(tmp_path, shapes):
    run(build_detector(), shapes, tmp_path, replace(SETTINGS, epochs=1), validate=Graded(0.1))
    (row,) = read_rows(tmp_path / "validation.csv", 99, VALIDATION_COLUMNS)
    assert row["AP"] == 0.1
    assert all(math.isnan(row[name]) for name in ("val_loss", *LOSSES))


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (Path("x"), r"description\['source'\] must be plain, .* got a pathlib\.PosixPath"),
        ({"files": ("a", [torch.zeros(1)])}, r"\['source'\]\['files'\]\[1\]\[0\] .* torch\.Tensor"),
        ({"a": {np.str_("a"): 1}}, r"\['source'\]\['a'\] .* dicts by texts, got a builtins\.dict"),
        ({(1, 2): 1}, r"\['source'\] .* dicts by texts, got a builtins\.dict"),
    ],
)
def test_a_description_that_could_not_be_read_again_is_refused_before_anything_is_written(
    tmp_path, shapes, value, place
):
    with pytest.raises(ValueError, match=place):
        run(build_detector(), shapes, tmp_path / "run", description={"source": value})
    with pytest.raises(ValueError, match="description must not have data, epoch, lr,"):
        run(build_detector(), shapes, tmp_path / "run", description={"data": "x", "epoch": 1, "lr": 2, "other": 3})
    with pytest.raises(ValueError, match=r"settings\['lr'\] must be plain, .* numpy\.float64"):
        run(build_detector(), shapes, tmp_path / "run", replace(SETTINGS, lr=np.float64(0.1)))
    assert not (tmp_path / "run").exists()


def test_a_plain_description_is_read_as_it_was_written(tmp_path, shapes):
    described = {"a": [1, 2.5, "x", True, None], "b": {"c": (), "d": {}}}
    run(build_detector(), shapes, tmp_path, stop_after=0, description=described)
    saved = checkpoint.load(tmp_path / "last.pth")
    assert {name: saved[name] for name in described} == described
    run(build_detector(), shapes, tmp_path, stop_after=1, description=described, resume=True)


@pytest.mark.parametrize("setting", ["patience", "eval_every"])
def test_settings_of_evaluations_need_some(tmp_path, shapes, setting):
    with pytest.raises(ValueError, match=f"{setting}=2.*: without validate"):
        run(build_detector(), shapes, tmp_path, replace(SETTINGS, **{setting: 2}))


def test_what_an_older_run_wrote_is_gone_when_a_new_one_begins(tmp_path, shapes):
    names = {"loss.png", "AP.png", "result.json", "detections.png", "best.pth", "validation.csv", "failure.json"}
    run(build_detector(), shapes, tmp_path, stop_after=1)
    for name in (*names, "notes.txt"):
        (tmp_path / name).write_text("old")
    run(build_detector(), shapes, tmp_path, resume=True, stop_after=1)
    assert {path.name for path in tmp_path.iterdir()} & names == names - {"failure.json"}
    (tmp_path / "failure.json").write_text("old")
    found = []

    def validate(model):
        found.append({path.name for path in tmp_path.iterdir()})
        return {"AP": 0.5, "AP50": 0.5, "AP75": 0.5}

    run(build_detector(), shapes, tmp_path, overwrite=True, stop_after=1, validate=validate)
    assert found == [{".lock", "last.pth", "settings.json", "metrics.csv", "notes.txt"}]
