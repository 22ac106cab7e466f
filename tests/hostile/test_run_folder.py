"""A run that is killed, asked to end, run twice, or whose folder is damaged, goes on as if nothing had been."""

import contextlib
import csv
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fastdet import FasterRCNN
from fastdet.cli.main import main
from fastdet.data import Shapes
from fastdet.engine import CheckpointError, Terminated, TrainSettings, checkpoint, load_model, train
from fastdet.engine.evaluate import evaluate
from fastdet.engine.run import folder as run_folder
from fastdet.engine.run.folder import COLUMNS, LOSSES, VALIDATION_COLUMNS, read_rows
from fastdet.weights import files
from tests.helpers.voc import SMALL, write_voc

# In all tests together; `make kills KILLS=200` asks for more.
KILLS = int(os.environ.get("KILLS", "30"))
# With all that a run has to remember.
SETTINGS = TrainSettings(
    epochs=3,
    batch_size=2,
    lr=0.01,
    warmup_steps=2,
    log_every=1,
    save_every=2,
    ema=0.9,
    accumulate=2,
    augmentation="strong",
)
ARCHITECTURE = {"backbone": "small", "num_classes": 5, "settings": {"min_size": 32, "max_size": 32}}
ARCHITECTURE["anchors"] = checkpoint.describe_anchors("small", sizes=(8, 16))
ARCHITECTURE["settings"] |= {"box_representation_size": 8, "rpn_post_nms_top_n_train": 20, "rpn_min_size": 2.0}
ARCHITECTURE["settings"] |= {"rpn_post_nms_top_n_test": 20, "box_pool_size": 3}
DESCRIPTION = {"architecture": ARCHITECTURE, "class_names": Shapes.class_names}
STEPS = 5
# What may differ between two runs: in their results, in the columns of metrics.csv, and in their checkpoints.
TIMES = {"minutes_of_training": None}
SPEED = ("images_per_second", "data_wait")
OF_A_RUN = {"workers", "save_every", "arguments", "environment"}
# Whether a process has ended, without taking its status.
DONE = os.WEXITED | os.WNOHANG | os.WNOWAIT


class Drawn(torch.utils.data.Dataset):
    items = tuple(Shapes(9, size=32)[index] for index in range(9))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


HELD_OUT = [Shapes(3, size=32, seed=1)[index] for index in range(3)]


def validate(model):
    """The better the higher the losses are, so that the best is not the last."""
    found = evaluate(model, HELD_OUT, Shapes.class_names, compute_losses=True)
    total = sum(found.losses.values())
    return {
        "AP": 1 - 1 / (1 + total),
        "AP50": found.coco.ap50,
        "AP75": found.coco.ap75,
        "val_loss": total,
        **found.losses,
    }


def run(out, settings=SETTINGS, dataset=None, **options):
    torch.manual_seed(3)
    options = {"description": DESCRIPTION, "progress": False, "validate": validate, **options}
    return train(checkpoint.build_model(ARCHITECTURE), dataset or Drawn(), out, settings, **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of an undisturbed run, and its seconds."""
    torch.set_num_threads(1)
    folder, start = tmp_path_factory.mktemp("straight"), time.perf_counter()
    run(folder)
    seconds = time.perf_counter() - start
    assert checkpoint.load(folder / "best.pth")["epoch"] < SETTINGS.epochs
    return folder, seconds


@pytest.fixture(autouse=True)
def _one_thread():
    """A process with threads of torch cannot be forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_equal(found, expected, name):
    """Bitwise, at every depth."""
    assert type(found) is type(expected), name
    if isinstance(expected, dict):
        assert list(found) == list(expected), name
    if isinstance(expected, (dict, list, tuple)):
        for key in expected if isinstance(expected, dict) else range(max(len(expected), len(found))):
            assert_equal(found[key], expected[key], f"{name} {key}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
    else:
        assert found == expected, name


def assert_same_checkpoints(first, second, names=("last.pth", "best.pth")):
    """Two folders hold bitwise the same state and the same best weights, however the runs were called."""
    for name in names:
        expected, found = (checkpoint.load(folder / name) for folder in (first, second))
        assert_equal(*({k: v for k, v in x.items() if k not in OF_A_RUN} for x in (found, expected)), name)


def assert_same_run(first, second):
    """As above, and the same rows but for the speed; nothing else is left."""
    assert_same_checkpoints(first, second)
    columns = [name for name in COLUMNS if name not in SPEED]
    expected, found = (read_rows(folder / "metrics.csv", 1 << 60, columns) for folder in (first, second))
    assert_equal(found, expected, "metrics.csv")
    texts = [(folder / "validation.csv").read_text() for folder in (first, second)]
    assert texts[0] == texts[1]
    assert not list(second.glob(".*.tmp"))


def steps_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def in_a_child(call):
    """The process of a call; its exit status is 0 if it returned."""
    child = os.fork()
    if child:
        return child
    try:
        call()
        os._exit(0)
    except Terminated:
        os._exit(143)
    except BaseException:
        os._exit(1)


def ended(child):
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status)


def kill_after(child, seconds, kind=signal.SIGKILL):
    """The exit status of a process that is killed unless it has ended by then."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and not os.waitid(os.P_PID, child, DONE):
        time.sleep(0.002)
    os.kill(child, kind)
    return ended(child)


@pytest.mark.parametrize(
    ("kind", "workers", "save_every", "kills"),
    [
        (signal.SIGKILL, 0, 2, KILLS * 2 // 5),
        (signal.SIGTERM, 0, 2, KILLS // 5),
        (signal.SIGKILL, 2, 1, KILLS // 5),
    ],
    ids=["kill", "term", "workers"],
)
def test_killed_runs_resume_bitwise(tmp_path, straight, kind, workers, save_every, kills):
    """Killed at random moments, again and again; each resumption goes on from where the last came."""
    folder, seconds = straight
    settings, draw = replace(SETTINGS, workers=workers, save_every=save_every), random.Random(workers)
    done = round_number = 0
    while done < kills:
        round_number += 1
        out, exitcode, attempts = tmp_path / str(round_number), 1, 0
        while exitcode != 0:
            attempts += 1
            resume = (out / "last.pth").exists()
            child = in_a_child(lambda out=out, resume=resume: run(out, settings, resume=resume))
            # Longer from time to time: on a machine that is busier than before no step would be saved.
            exitcode = kill_after(child, draw.random() * seconds * (0.3 + attempts / 20), kind)
            assert exitcode in (0, -kind, 128 + kind), f"kill {done} of a run ended with {exitcode}"
            done += exitcode != 0
        assert_same_run(folder, out)
        assert steps_of(out) == list(range(1, STEPS * SETTINGS.epochs + 1))


def test_commands_killed_in_training_or_evaluation_resume_bitwise(tmp_path):
    """As above through the command, half of the kills once the training is done."""
    voc = write_voc(tmp_path / "voc", {"trainval": 6, "test": 8})
    command = ["train", "--data", f"voc:{voc}", "--epochs", "2", *SMALL]
    command += ["--ema", "0.9", "--accumulate", "2", "--augmentation", "photometric", "--save-every", "1", "--out"]

    def train_command(out, *options):
        with (tmp_path / "log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            os._exit(main([*command, str(out), *options]))

    start = time.perf_counter()
    assert ended(in_a_child(lambda: train_command(tmp_path / "straight"))) == 0
    seconds, result = time.perf_counter() - start, json.loads((tmp_path / "straight/result.json").read_text())
    trained = (tmp_path / "straight/loss.png").stat().st_mtime_ns
    evaluation = ((tmp_path / "straight/detections.png").stat().st_mtime_ns - trained) / 1e9
    draw, kills, round_number = random.Random(0), 0, 0
    while kills < KILLS // 5:
        round_number += 1
        out, exitcode = tmp_path / str(round_number), 1
        while exitcode != 0:
            options = ["--resume"] if (out / "last.pth").exists() else []
            (out / "loss.png").unlink(missing_ok=True)
            child = in_a_child(lambda out=out, options=options: train_command(out, *options))
            wait = draw.random() * seconds
            if (round_number + kills) % 2 == 0:
                # It is written, also anew, between training and evaluation.
                while not (out / "loss.png").exists() and not os.waitid(os.P_PID, child, DONE):
                    time.sleep(0.001)
                wait = draw.random() * evaluation
            exitcode = kill_after(child, wait)
            assert exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-2000:]
            kills += exitcode != 0
        assert_same_run(tmp_path / "straight", out)
        assert {**json.loads((out / "result.json").read_text()), **TIMES} == {**result, **TIMES}
    rows = read_rows(tmp_path / "straight/validation.csv", 1 << 60, VALIDATION_COLUMNS)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["val_loss"] == pytest.approx(sum(row[name] for name in LOSSES)) for row in rows)


def test_sigterm_saves_in_the_middle_of_an_epoch(tmp_path, straight):
    class Ending(Drawn):
        def __getitem__(self, index):
            if index == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match=r"last\.pth: saved after (step|epoch) \d+"):
        run(tmp_path, dataset=Ending())
    assert signal.getsignal(signal.SIGTERM) == before
    assert steps_of(tmp_path)[-1] == checkpoint.load(tmp_path / "last.pth")["step"] > 0
    run(tmp_path, resume=True)
    assert_same_run(straight[0], tmp_path)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_an_evaluation_ends_at_once_and_is_taken_again(tmp_path, straight, kind):
    def end(model):
        os.kill(os.getpid(), kind)
        (tmp_path / "evaluated").touch()

    out = tmp_path / "run"
    assert ended(in_a_child(lambda: run(out, validate=end))) in (128 + kind, -kind)
    assert not (tmp_path / "evaluated").exists()
    saved = checkpoint.load(out / "last.pth")
    assert (saved["epoch"], saved["step"]) == (0, STEPS)
    run(out, resume=True)
    assert_same_run(straight[0], out)


def test_sigterm_in_an_evaluation_is_noticed_though_its_exception_is_lost(tmp_path):
    def end(model):
        with contextlib.suppress(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(model)

    with pytest.raises(Terminated, match="saved after epoch 1"):
        run(tmp_path, validate=end)
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 1


def test_the_command_ends_with_143_and_a_line(tmp_path):
    command = [sys.executable, "-m", "fastdet", "demo", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "last.pth").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    lines = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 143, lines
    assert lines[-1].startswith(f"fastdet: terminated; {tmp_path}/last.pth: saved after ")


def test_a_folder_has_one_run_at_a_time(tmp_path):
    child = in_a_child(lambda: run(tmp_path, replace(SETTINGS, epochs=10_000)))
    while not (tmp_path / "metrics.csv").exists():
        time.sleep(0.02)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(CheckpointError, match=f"process {child}"):
            run(tmp_path, **options)
    os.kill(child, signal.SIGKILL)
    ended(child)
    (tmp_path / ".last.pth.123.tmp").write_bytes(b"a part")
    (tmp_path / ".notes.tmp").write_bytes(b"of somebody else")
    run(tmp_path, overwrite=True)  # the lock of a process that is gone
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [".notes.tmp"]


@pytest.fixture(scope="module")
def half(straight, tmp_path_factory):
    """The folder of a run that is to go on."""
    folder = tmp_path_factory.mktemp("half")
    run(folder, stop_after=2)
    return folder


@pytest.mark.filterwarnings("ignore:.*lines cannot be read")
@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0], "1,x,0.01,1,1,1,1,1,1", *lines[2:]],
        lambda lines: [lines[0], "\0\0\0", *lines[1:]],
        lambda lines: [lines[0], '"', *lines[1:]],
        lambda lines: ["epoch;step", *lines[1:]],
        lambda lines: [],
        lambda lines: ["\udcff"],
    ],
    ids=["a word", "zeros", "a quotation mark", "a header", "empty", "no text"],
)
def test_a_damaged_metrics_file_does_not_block_a_resumption(tmp_path, straight, half, damage):
    shutil.copytree(half, tmp_path, dirs_exist_ok=True)
    metrics = tmp_path / "metrics.csv"
    lines = damage(metrics.read_text().splitlines())
    metrics.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    run(tmp_path, resume=True)
    assert_same_checkpoints(straight[0], tmp_path)
    assert steps_of(tmp_path)[-1] == STEPS * SETTINGS.epochs


def test_a_worker_that_is_killed_is_named(tmp_path, capsys, monkeypatch):
    class Dying(Drawn):
        def __getitem__(self, index):
            if torch.utils.data.get_worker_info():
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    with pytest.raises(ValueError, match=r"DataLoader worker .*fewer workers"):
        run(tmp_path, replace(SETTINGS, workers=1), dataset=Dying())


@pytest.mark.parametrize("library", ["torch", "torch, later", "python"])
def test_a_full_disk_is_called_that(tmp_path, library):
    def write(file):
        class Full:
            failures = 0

            def write(self, data):
                # What the writer adds when it has failed is less, and can be written.
                if library == "torch, later" and (self.failures or len(data) < 1000):
                    return file.write(data)
                self.failures += 1
                raise OSError(28, "No space left on device")

            def flush(self):
                pass

        Full().write(b"") if library == "python" else torch.save({"w": torch.zeros(999)}, Full())

    with pytest.raises(files.TensorFileError, match=r"cannot be written: .*No space left on device"):
        files.write(tmp_path / "x.pth", write)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_pictures(monkeypatch):
    """Of runs that are done at once, most of whose time they would take."""
    for name in ("losses", "average_precision"):
        monkeypatch.setattr(f"fastdet.engine.trainer.plot_{name}", lambda *paths, **options: None)


ODD = [None, -1, True, math.nan, "x", [1], {1: 2}, 10**30, torch.zeros(2)]
ENTRIES = ["architecture", "class_names", "model", "optimizer", "random", "epoch", "step", "lr", "images", "milestones"]
ENTRIES += ["epochs", "workers", "log_every", "average", "averaged", "best", "loss_scale"]
PARTS = ["backbone", "num_classes", "settings", "anchors", "trainable_backbone_layers", "freeze_batchnorm"]


@pytest.mark.parametrize("entry", [*ENTRIES, *(f"architecture {part}" for part in PARTS)])
def test_odd_entries_of_a_checkpoint_are_errors_of_one_line(tmp_path, straight, no_pictures, entry):
    content = checkpoint.load(straight[0] / "last.pth")
    path = tmp_path / "last.pth"
    for value in ODD:
        name, _, part = entry.partition(" ")
        changed = {**content, name: {**content[name], part: value} if part else value}
        checkpoint.save(path, changed)
        for call in (lambda: load_model(path), lambda: run(tmp_path, resume=True)):
            message = None
            try:
                call()
            except CheckpointError as error:
                message = str(error)
            assert message is None or ("\n" not in message and len(message) < 700 and str(tmp_path) in message)


@pytest.mark.parametrize("part", PARTS[2:])
def test_odd_parts_of_an_architecture_are_refused(tmp_path, straight, part):
    content, path = checkpoint.load(straight[0] / "last.pth"), tmp_path / "last.pth"
    for value in [-1, math.nan, "x", [1], {1: 2}, 10**30, torch.zeros(2)]:
        checkpoint.save(path, {**content, "architecture": {**content["architecture"], part: value}})
        with pytest.raises(CheckpointError):
            load_model(path)
    settings = {**ARCHITECTURE["settings"], "rpn_anchor_generator": 5}
    anchors = checkpoint.describe_anchors("small")
    checkpoint.save(path, {**content, "architecture": {**ARCHITECTURE, "settings": settings, "anchors": anchors}})
    with pytest.raises(CheckpointError, match=r'has its anchors as "anchors"'):
        load_model(path)


class Image1(Drawn):
    items = Drawn.items[:1]


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def one_step(request, tmp_path_factory):
    """Settings, and the checkpoint of a run of one epoch with one step; the run is to have two."""
    folder = tmp_path_factory.mktemp("one step")
    settings = replace(SETTINGS, optimizer_name=request.param, epochs=2)
    run(folder, settings, Image1(), stop_after=1)
    return settings, checkpoint.load(folder / "last.pth")


def change(content, value, *path):
    """A checkpoint with another value at one place."""
    if not path:
        return value
    return {**content, path[0]: change(content.get(path[0], {}), value, *path[1:])}


@pytest.mark.parametrize("value", [*ODD, torch.zeros(2, dtype=torch.complex64), "a\nb", {"a": torch.zeros(2)}])
def test_odd_states_of_an_optimizer_are_refused(tmp_path, one_step, value):
    settings, content = one_step
    names = list(content["optimizer"]["state"][0])
    for path in ([], ["state"], ["state", 0], ["state", 7000], ["state", "0"], *(["state", 0, name] for name in names)):
        checkpoint.save(tmp_path / "last.pth", change(content, value, "optimizer", *path))
        with pytest.raises(CheckpointError) as caught:
            run(tmp_path, settings, Image1(), resume=True)
        assert str(caught.value).isprintable(), path
        assert len(str(caught.value)) < 700, path


def test_values_that_no_step_gives_are_refused(tmp_path, one_step):
    settings, content = one_step
    state = content["optimizer"]["state"][0]
    for name, value in state.items():
        for bad in (math.inf, math.nan, *([-1.0] if name in ("step", "exp_avg_sq") else [])):
            changed = value.clone()
            changed.view(-1)[0] = bad
            checkpoint.save(tmp_path / "last.pth", change(content, changed, "optimizer", "state", 0, name))
            with pytest.raises(CheckpointError, match=rf"optimizer's .*{name}"):
                run(tmp_path, settings, Image1(), resume=True)
    weights = {name: value.to(torch.complex64) for name, value in content["model"].items()}
    checkpoint.save(tmp_path / "last.pth", {**content, "model": weights})
    with pytest.raises(CheckpointError, match=r"holds torch\.complex64 in place of torch\.float32"):
        run(tmp_path, settings, Image1(), resume=True)


def test_hyperparameters_of_a_file_are_not_taken(tmp_path, one_step):
    """Those of the run are its settings."""
    settings, content = one_step
    checkpoint.save(tmp_path / "straight/last.pth", content)
    run(tmp_path / "straight", settings, Image1(), resume=True)
    groups = [{**group, "weight_decay": 1e6, "maximize": True} for group in content["optimizer"]["param_groups"]]
    checkpoint.save(tmp_path / "changed/last.pth", change(content, groups, "optimizer", "param_groups"))
    run(tmp_path / "changed", settings, Image1(), resume=True)
    assert_same_checkpoints(tmp_path / "straight", tmp_path / "changed", ["last.pth"])


def test_epochs_and_steps_beyond_the_run_are_refused(tmp_path, one_step):
    settings, content = one_step
    for entry, value, message in (("epoch", 3, "3 epochs, more than the 2 wanted"), ("step", 2, "at most the 1 of an")):
        checkpoint.save(tmp_path / "last.pth", {**content, entry: value})
        with pytest.raises(CheckpointError, match=message):
            run(tmp_path, settings, Image1(), resume=True)


@pytest.mark.parametrize(
    "change",
    [{"sizes": ((12.0, 1e300),)}, {"sizes": ((1e-9,),)}, {"strides": (2**62,)}, {"offset": 1e30}],
    ids=lambda change: next(iter(change)),
)
def test_anchors_beyond_any_image_are_refused(tmp_path, straight, change):
    content = checkpoint.load(straight[0] / "last.pth")
    anchors = {**checkpoint.describe_anchors("small"), **change}
    checkpoint.save(tmp_path / "last.pth", {**content, "architecture": {**ARCHITECTURE, "anchors": anchors}})
    with pytest.raises(CheckpointError, match=next(iter(change))):
        load_model(tmp_path / "last.pth")


@pytest.mark.parametrize("entry", ["architecture", "class_names", "model"])
def test_odd_checkpoints_to_start_from_are_errors_of_one_line(tmp_path, straight, entry, capsys):
    """Through the command line, which looks at the description first."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    for split in ("trainval", "test"):
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text("one\n")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"
    (tmp_path / "Annotations/one.xml").write_text(f"<annotation><object><name>a</name>{box}</object></annotation>")
    Image.new("RGB", (32, 32)).save(tmp_path / "JPEGImages/one.png")
    content = checkpoint.load(straight[0] / "last.pth")
    command = ["train", "--data", f"voc:{tmp_path}", "--backbone", "small", "--epochs", "1"]
    for value in ODD:
        checkpoint.save(tmp_path / "odd.pth", {**content, entry: value})
        code = main([*command, "--weights", str(tmp_path / "odd.pth"), "--out", str(tmp_path / "out"), "--overwrite"])
        error = capsys.readouterr().err.splitlines()
        assert code == 2, value
        assert error[-1].startswith("fastdet: "), error
        assert "Traceback" not in "".join(error)


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 50_000},
        {"settings": {"min_size": 10**9, "max_size": 10**9}},
        {"settings": {"rpn_conv_depth": 100_000}},
        {"settings": {"box_num_convs": 100_000}},
        {"settings": {"box_representation_size": 10**7}},
        {"settings": {"rpn_hidden_channels": 10**7}},
        {"settings": {"box_pool_size": 10**6}},
        {"settings": {"image_mean": [0.5] * 10**5, "image_std": [0.5] * 10**5}},
        {"anchors": {"sizes": [[8.0] * 10**5], "aspect_ratios": [[1.0]]}},
    ],
    ids=lambda change: str(next(iter(change.get("settings", change)))),
)
def test_the_description_of_a_model_allocates_nothing(tmp_path, straight, change):
    content = checkpoint.load(straight[0] / "last.pth")
    names = [f"class {i}" for i in range(change.get("num_classes", 5) - 1)]
    architecture = {**ARCHITECTURE, **change}
    if "settings" in change:
        architecture["settings"] = {**ARCHITECTURE["settings"], **change["settings"]}
    path = tmp_path / "last.pth"
    checkpoint.save(path, {**content, "architecture": architecture, "class_names": names})
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert time.perf_counter() - start < 15  # seconds, on a busy machine
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_locks_only_where_there_are_any(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.os, "name", "nt")
    with run_folder.lock(tmp_path / "new"):
        assert not list((tmp_path / "new").iterdir())


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\)"), run_folder.lock(tmp_path):
        pass


def test_the_model_of_a_checkpoint_is_the_average_of_the_trained_one(straight):
    model, names = load_model(straight[0] / "last.pth")
    assert isinstance(model, FasterRCNN)
    assert names == Shapes.class_names
    assert all(not tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    fresh = checkpoint.build_model(ARCHITECTURE)
    fresh.load_state_dict(checkpoint.load(straight[0] / "last.pth")["average"])
    images = [Drawn.items[0][0]]
    with torch.no_grad():
        torch.testing.assert_close(model(images), fresh.eval()(images), rtol=0, atol=0)


def test_a_checkpoint_that_is_not_finite_is_not_resumed(tmp_path, straight, capsys):
    content = checkpoint.load(straight[0] / "last.pth")
    for part in ("model", "average"):
        next(iter(content[part].values())).view(-1)[0] = math.inf
    checkpoint.save(tmp_path / "last.pth", content)
    with pytest.raises(CheckpointError, match=r"has 1 of \d+ values that are not finite"):
        run(tmp_path, resume=True)
    arguments = ["--weights", str(tmp_path / "last.pth"), "--out", str(tmp_path / "drawn")]
    assert main(["detect", str(tmp_path / "photo.png"), *arguments]) == 2
    assert "values that are not finite" in capsys.readouterr().err
