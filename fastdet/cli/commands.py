"""What each command does with its options."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.utils.data import Subset

from fastdet import export, weights
from fastdet.cli import demo, doctor
from fastdet.cli.options import DataPlace, UserError, raise_user_errors
from fastdet.data import COCO, VOC
from fastdet.data.records import AnnotatedImages
from fastdet.engine import RECIPES, TrainSettings, build_model, describe_anchors, detect, load_model, train
from fastdet.engine.checkpoint import require
from fastdet.engine.evaluate import evaluate
from fastdet.metrics import require_pycocotools
from fastdet.models.backbones import NAMED
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.safe_files import printable
from fastdet.visualize import draw_detections, write_report
from fastdet.weights.files import read


def run_train(options: argparse.Namespace) -> None:
    require_pycocotools()
    device, settings = _device(options), _train_settings(options)
    data = _open_data(options, options.data, options.train_split, options.classes)
    if not data.class_names:
        raise UserError(f"--data: {options.data.folder}: no annotation has an object")
    if options.data.annotations and not options.val_data:
        raise UserError("--val-data: a data set in COCO's format has no split to evaluate on")
    held_out = _open_data(options, options.val_data or options.data, options.val_split, data.class_names)
    architecture = _architecture(options, len(data.class_names) + 1)
    with raise_user_errors("--seed"):
        torch.manual_seed(settings.seed)
    with raise_user_errors("the model"):
        model = build_model(architecture, weights_backbone=options.weights_backbone)
    if options.weights:
        with raise_user_errors("--weights"):
            _check_origin(options, architecture, data.class_names)
            weights.load(model, options.weights, replace_predictor=options.replace_predictor)
    elif options.replace_predictor:
        raise UserError("--replace-predictor: it goes with --weights")
    start = time.perf_counter()
    train(
        model.to(device),
        _limit(data, options),
        options.out,
        settings,
        description={"architecture": architecture, "class_names": data.class_names},
        resume=options.resume,
        overwrite=options.overwrite,
        stop_after=options.stop_after,
    )
    trained = time.perf_counter()
    minutes = round((trained - start) / 60, 3)
    metadata = {"backbone": options.backbone, "epochs": settings.epochs, "minutes_of_training": minutes}
    _evaluate(options, model, held_out, data.class_names, metadata)
    print(f"trained in {minutes:.1f} minutes, all in {(time.perf_counter() - start) / 60:.1f}: {options.out}")


def run_eval(options: argparse.Namespace) -> None:
    require_pycocotools()
    model, class_names = load_model(options.weights)
    data = _open_data(options, options.data, options.split, class_names)
    _evaluate(options, model.to(_device(options)), data, class_names, {"weights": str(options.weights)})


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
    "eval": run_eval,
    "detect": run_detect,
    "export": run_export,
    "doctor": run_doctor,
    "demo": lambda options: demo.run(options.out),
}


def _evaluate(
    options: argparse.Namespace,
    model: nn.Module,
    data: AnnotatedImages,
    class_names: tuple[str, ...],
    metadata: Mapping[str, Any],
) -> None:
    """Print the average precision, and write the report where there is a folder for it."""
    dataset = _limit(data, options)
    evaluation = evaluate(model, dataset, class_names, batch_size=4, workers=options.workers, progress=True)
    # First the files: what is printed may go to a terminal that is gone.
    if options.out:
        summary, predictions = evaluation.summary(), evaluation.predictions
        write_report(options.out, summary, predictions, class_names, dataset, metadata=metadata)
    print(evaluation.table())


def _open_data(
    options: argparse.Namespace, place: DataPlace, split: str, class_names: tuple[str, ...] | None
) -> AnnotatedImages:
    how = {"max_pixels": options.max_pixels, "orientation": options.orientation}
    if place.annotations:
        return COCO(place.folder, place.annotations, class_names, **how)
    return VOC(place.folder, split, class_names, zero_based=options.zero_based, **how)


def _limit(data: AnnotatedImages, options: argparse.Namespace) -> Any:
    return data if options.limit is None else Subset(data, range(min(options.limit, len(data))))


def _device(options: argparse.Namespace) -> torch.device:
    if options.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with raise_user_errors("--device"):
        device = torch.device(options.device)
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device: there are cpu and cuda, not {options.device!r}")
        torch.empty(0, device=device)
    return device


def _train_settings(options: argparse.Namespace) -> TrainSettings:
    """The recipe of the backbone, changed by the options that are given."""
    given = {field.name: getattr(options, field.name, None) for field in fields(TrainSettings)}
    with raise_user_errors("training options"):
        recipe = RECIPES.get(options.backbone, TrainSettings())
        return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def _architecture(options: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """The model as plain values, from which `fastdet.engine.build_model` builds it."""
    settings = dict(options.set)
    if "rpn_anchor_generator" in settings:
        raise UserError("--set rpn_anchor_generator: it is not a plain value; see --anchor-sizes, --aspect-ratios")
    settings.update({n: getattr(options, n) for n in ("min_size", "max_size") if getattr(options, n) is not None})
    with raise_user_errors("--backbone"):
        anchors = describe_anchors(options.backbone, options.anchor_sizes, options.aspect_ratios)
    named, pretrained = NAMED[options.backbone], bool(options.weights_backbone or options.weights)
    return {
        "backbone": options.backbone,
        "num_classes": num_classes,
        "anchors": anchors,
        "settings": settings,
        # Written even where it is the default of pretrained weights: a checkpoint is loaded without them.
        "trainable_backbone_layers": named.trainable_layers(options.trainable_backbone_layers, pretrained),
        "freeze_batchnorm": named.freezes_batchnorm(pretrained),
    }


def _check_origin(options: argparse.Namespace, architecture: dict[str, Any], class_names: tuple[str, ...]) -> None:
    """Raises UserError if a checkpoint to start from is of other classes or anchors."""
    content = read(options.weights)
    if not isinstance(content, dict) or "architecture" not in content:
        return
    require(options.weights, content, [name for name in ("architecture", "class_names") if name in content], "of a run")
    anchors, saved_anchors = architecture["anchors"], content["architecture"].get("anchors")
    if anchors != saved_anchors:
        raise UserError(f"--weights: {options.weights} has the anchors {saved_anchors}, this run {anchors}")
    saved_names = tuple(content.get("class_names", ()))
    if class_names != saved_names and not options.replace_predictor:
        names = f"has the classes {saved_names}, this run {class_names}"
        raise UserError(f"--weights: {options.weights} {names}; see --replace-predictor")
