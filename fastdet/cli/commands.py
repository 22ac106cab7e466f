"""What each command does with its options."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from dataclasses import replace as replace_fields
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import nn

from fastdet import export, weights
from fastdet.cli import compare, demo, doctor, lint
from fastdet.cli.data import open_data, open_training_data
from fastdet.cli.options import parse
from fastdet.cli.plan import DetectorOptions, Plan, describe_run, plan_detector, warn_of_random_weights
from fastdet.cli.values import UserError, raise_user_errors, read_arguments
from fastdet.data import JoinedImages
from fastdet.data.convert import write_coco
from fastdet.engine import RECIPES, TrainSettings, build_model, detect, distributed, load_model, train
from fastdet.engine.defaults import collect_objects
from fastdet.engine.distributed import ALONE, Processes
from fastdet.engine.evaluate import evaluate
from fastdet.engine.loading import augment_for, default_workers
from fastdet.engine.recipes import default_rate
from fastdet.engine.run.replay import replay
from fastdet.engine.run.state import build_metadata, build_state
from fastdet.engine.step import choose_graphs, describe_steps
from fastdet.metrics import require_pycocotools
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.safe_files import printable
from fastdet.visualize import draw_detections, write_report
from fastdet.weights.files import one_line

# Images of an evaluation at a time, of one size.
_EVALUATED = 4


class _Run(NamedTuple):
    """What a training run is made of."""

    settings: TrainSettings
    data: JoinedImages
    held_out: JoinedImages
    plan: Plan
    model: FasterRCNN


def _prepare(options: argparse.Namespace, device: torch.device) -> _Run:
    """The data sets and the model, on its device, that the options of a training run name."""
    settings = _train_settings(options)
    data, held_out = open_training_data(options)
    if held_out is None:
        raise UserError("--data has no split to evaluate on: --val-share keeps images apart, --val-data names others")
    if options.workers is None:
        settings = replace_fields(settings, workers=default_workers(device, settings.batch_size, data.sizes))
    objects = collect_objects(data)
    if not len(objects.boxes):
        places = ", ".join(map(str, options.data))
        ignored = f", but {objects.ignored} that are to be ignored" if objects.ignored else ""
        raise UserError(f"--data: {places}: {len(data)} images without a box that is to be found{ignored}")
    if not any((~held_out.target(index)["ignore"]).any() for index in range(len(held_out))):
        warnings.warn("no image to evaluate on has a box that is to be found: no average precision", stacklevel=2)
    plan = plan_detector(DetectorOptions.of(options), objects, data.class_names)
    if options.replace_predictor and not options.weights:
        raise UserError("--replace-predictor: it goes with --weights")
    warn_of_random_weights(options)
    with raise_user_errors("--seed"):
        torch.manual_seed(settings.seed)
    with raise_user_errors("the model"):
        model = build_model(plan.architecture, weights_backbone=options.weights_backbone)
    if options.weights:
        with raise_user_errors("--weights"):
            weights.load(model, options.weights, replace_predictor=options.replace_predictor)
    return _Run(settings, data, held_out, plan, model.to(device))


def _describe(options: argparse.Namespace, run: _Run, device: torch.device) -> dict[str, Any]:
    """What a run's files hold beside its settings."""
    return {
        "architecture": run.plan.architecture,
        "class_names": run.data.class_names,
        "arguments": options.arguments,
        "environment": doctor.describe_environment(device),
    }


def run_train(options: argparse.Namespace) -> None:
    require_pycocotools()
    device = _device(options)
    with distributed.join(device) as processes:
        if processes.writes:
            _train(options, processes, device)
            return
        # The lines and warnings of the others are those of the first.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _train(options, processes, device)


def _train(options: argparse.Namespace, processes: Processes, device: torch.device) -> None:
    run = _prepare(options, device)
    settings, data, held_out, plan, model = run
    with raise_user_errors("--batch-size"):
        processes.check_batch_size(settings.batch_size)
    graphs = choose_graphs(model, data, settings, processes)
    steps = describe_steps(model, settings, graphs, processes)
    print("\n".join(describe_run(options, plan, settings, steps, data, held_out)), flush=True)

    def validate(model: nn.Module) -> dict[str, float]:
        workers = settings.workers
        found = evaluate(model, held_out, data.class_names, workers=workers, processes=processes, compute_losses=True)
        coco, losses = found.coco, found.losses or {}
        return {"AP": coco.ap, "AP50": coco.ap50, "AP75": coco.ap75, "val_loss": sum(losses.values()), **losses}

    start = time.perf_counter()
    train(
        model,
        data,
        options.out,
        settings,
        description=_describe(options, run, device),
        resume=options.resume or processes.has_begun(),
        overwrite=options.overwrite,
        stop_after=options.stop_after,
        validate=validate,
        processes=processes,
        graphs=graphs,
        tensorboard=options.tensorboard,
    )
    minutes = round((time.perf_counter() - start) / 60, 3)
    metadata = {"backbone": options.backbone, "epochs": settings.epochs, "minutes_of_training": minutes}
    best, last = options.out / "best.pth", options.out / "last.pth"
    model = processes.from_first(lambda: load_model(best if best.exists() else last)[0]).to(device)
    _evaluate(options, model, held_out, data.class_names, settings.workers, metadata, processes)
    print(f"trained in {minutes:.1f} minutes, all in {(time.perf_counter() - start) / 60:.1f}: {options.out}")


def run_replay(options: argparse.Namespace) -> None:
    path = options.run / "failure.json"
    try:
        record = json.loads(path.read_bytes())
        step = int(record["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the record of a step: {one_line(error)}") from error
    given = parse(["train", *read_arguments(options.run / "settings.json"), "--out", str(options.run)])
    device = _device(given)
    run = _prepare(given, device)
    metadata = build_metadata(run.data, run.settings, _describe(given, run, device))
    state = build_state(options.run, run.model, run.settings, metadata)
    with raise_user_errors(str(path)):
        lines = replay(state, run.data, augment_for(run.model, run.data, run.settings), run.settings, step)
    print("\n".join(printable(line, 2000) for line in lines))


def run_eval(options: argparse.Namespace) -> None:
    require_pycocotools()
    model, class_names = load_model(options.weights)
    for name in options.classes or ():
        if name not in class_names:
            raise UserError(f"--classes: {options.weights} has no class {name!r}, but {', '.join(class_names)}")
    data = open_data(options, options.data, "val", options.split, class_names)
    device = _device(options)
    workers = default_workers(device, _EVALUATED, data.sizes) if options.workers is None else options.workers
    _evaluate(options, model.to(device), data, class_names, workers, {"weights": str(options.weights)})


def run_lint(options: argparse.Namespace) -> None:
    if lint.run(options):
        raise lint.DataSetError(f"ground truth is lost or false: {options.out / 'lint.json'} has all of it")


def run_convert(options: argparse.Namespace) -> None:
    data = open_data(options, options.data, "train", options.split)
    write_coco(data, options.to, lint.bar("images written"))
    print(printable(f"{options.to}: {len(data)} images, instances.json with {', '.join(data.class_names)}", 2000))


def run_detect(options: argparse.Namespace) -> None:
    model, class_names = load_model(options.weights)
    model.to(_device(options))
    options.out.mkdir(parents=True, exist_ok=True)
    for found in detect(model, options.images, max_pixels=options.max_pixels):
        confident = found.scores >= options.score
        boxes, labels, scores = found.boxes[confident], found.labels[confident], found.scores[confident]
        drawn = _create(options.out, found.path.stem)
        with drawn:
            draw_detections(found.image, boxes, labels, scores, class_names).save(drawn, format="PNG")
        counts = Counter(class_names[label - 1] for label in labels.tolist())
        listed = ", ".join(f"{times} {printable(name, 40)}" for name, times in counts.most_common()) or "nothing"
        print(printable(f"{found.path}: {listed} -> {drawn.name}"))


def _create(folder: Path, stem: str) -> BinaryIO:
    """A new file, of a name that is free: none that is there is overwritten, and no link is followed."""
    for number in count(1):
        with contextlib.suppress(FileExistsError):
            return (folder / (f"{stem}_{number}.png" if number > 1 else f"{stem}.png")).open("xb")
    raise AssertionError


def run_export(options: argparse.Namespace) -> None:
    model, class_names = load_model(options.weights)
    device = _device(options)
    with raise_user_errors("--height, --width"):
        height, width = export.input_size(model.settings, options.height, options.width)
    with raise_user_errors("--to"):
        if options.to.suffix == ".pt2":
            export.export_pt2(model.to(device), options.to, height=height, width=width)
            runtime = f"runs on {device.type}, loads after 'import fastdet'"
        else:
            export.export_onnx(model, options.to, height=height, width=width)
            runtime = f"opset {export.OPSET}"
    channels = len(model.settings.image_mean)
    print(f"{options.to}: images [B, {channels}, {height}, {width}] in 0..1, sizes [B, 2], scales [B]; {runtime}")
    print(printable(f"labels from 1: {', '.join(class_names)}", 10_000))


def run_doctor(options: argparse.Namespace) -> None:
    device = _device(options)
    print("\n".join(doctor.describe_environment(device)))
    problem = doctor.run_self_check(device)
    print(f"self-check failed: {problem}" if problem else "self-check passed: a step of a small detector")
    model = FasterRCNN(options.backbone, 21).to(device)
    with raise_user_errors("--height, --width"):
        memory = doctor.measure_training_memory(model, options.batch_size, options.height, options.width)
    print(f"training {options.backbone}, {options.batch_size} x {options.height} x {options.width}: {memory}")
    if problem:
        raise doctor.SelfCheckError(f"self-check failed on {device}: {problem}")


COMMANDS = {
    "train": run_train,
    "replay": run_replay,
    "eval": run_eval,
    "lint": run_lint,
    "convert": run_convert,
    "compare": compare.run,
    "detect": run_detect,
    "export": run_export,
    "doctor": run_doctor,
    "demo": lambda options: demo.run(options.out),
}


def _evaluate(
    options: argparse.Namespace,
    model: nn.Module,
    data: JoinedImages,
    class_names: tuple[str, ...],
    workers: int,
    metadata: Mapping[str, Any],
    processes: Processes = ALONE,
) -> None:
    """Print the average precision, and write the report where there is a folder for it."""
    evaluation = evaluate(
        model, data, class_names, batch_size=_EVALUATED, workers=workers, progress=processes.writes, processes=processes
    )
    # First the files: what is printed may go to a terminal that is gone.
    if options.out and processes.writes:
        summary, predictions = evaluation.summary(), evaluation.predictions
        write_report(options.out, summary, predictions, class_names, data, metadata=metadata)
    print(evaluation.table())


def _device(options: argparse.Namespace) -> torch.device:
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device: there are cpu and cuda, not {name!r}")
    with raise_user_errors("--device"):
        device = torch.device(name)
        if device.type == "cuda" and not torch.backends.cuda.is_built():
            raise UserError(f"--device {device}: torch is built without CUDA here")
        device = distributed.local_device(device)
        torch.empty(0, device=device)
    return device


def _train_settings(options: argparse.Namespace) -> TrainSettings:
    """The recipe of the backbone, changed by the options that are given."""
    given = {field.name: getattr(options, field.name, None) for field in fields(TrainSettings)}
    with raise_user_errors("training options"):
        recipe = RECIPES.get(options.backbone, TrainSettings())
        settings = replace_fields(recipe, **{name: value for name, value in given.items() if value is not None})
        if not (settings.milestones if settings.schedule == "step" else given["milestones"] is None):
            raise UserError("--milestones: --schedule step needs them, and no other takes them")
        if given["lr"] is None:
            return replace_fields(settings, lr=default_rate(recipe, settings.optimizer_name, settings.batch_size))
        return settings
