"""The command line: `fastdet train`, `eval`, `detect`, `export`, `doctor` and `demo`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch.utils.data import Subset

from fastdet import export, weights
from fastdet.cli import demo, doctor
from fastdet.cli.options import UserError, parser
from fastdet.data import VOC, DataError
from fastdet.engine import checkpoint
from fastdet.engine.checkpoint import CheckpointError, one_line
from fastdet.engine.predict import detect, evaluate, write_report
from fastdet.engine.recipes import RECIPES, TrainSettings
from fastdet.engine.trainer import train
from fastdet.models.backbones import NAMED
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.visualize.draw import draw_detections
from fastdet.weights.convert import WeightsError
from fastdet.weights.files import TensorFileError, read

_USER_ERROR, _FAILED, _INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what the user can mend is one line on stderr.

    Returns:
        0; 1 if training went astray, memory ran out or `doctor` found a fault; 2 for an error in options or files; 130
        after Ctrl-C.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            options = parser().parse_args(argv)
            _COMMANDS[options.command](options)
        except KeyboardInterrupt:
            return _complain("interrupted", _INTERRUPTED)
        except (UserError, DataError, CheckpointError, OSError) as error:
            return _complain(_last_line(error), _USER_ERROR)
        except FloatingPointError as error:
            return _complain(f"{error}; a lower --lr or a longer --warmup-steps may help", _FAILED)
        except _Ailing as error:
            return _complain(str(error), _FAILED)
        except torch.OutOfMemoryError:
            return _complain("the device's memory is too small; try a lower --batch-size or --max-size", _FAILED)
    return 0


def _complain(message: str, code: int) -> int:
    print(f"fastdet: {message}", file=sys.stderr)
    return code


def _last_line(error: Exception) -> str:
    """The message of an error; of one from a loader's worker, which comes with a traceback, its last line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"fastdet: warning: {message}", file=sys.stderr)


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Turn what a library says about a value into an error of the option that it came from."""
    try:
        yield
    except (UserError, DataError, CheckpointError):
        raise
    except (WeightsError, TensorFileError) as error:
        raise UserError(f"{option}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{option}: {one_line(error)}") from error


def _train(options: argparse.Namespace) -> None:
    device = _device(options)
    settings = _train_settings(options)
    data = VOC(options.data, options.train_split, options.classes)
    held_out = VOC(options.data, options.val_split, data.class_names)
    architecture = _architecture(options, len(data.class_names) + 1)
    with _naming("--seed"):
        torch.manual_seed(settings.seed)
    with _naming("the model"):
        model = checkpoint.build_model(architecture, weights_backbone=options.weights_backbone)
    if options.weights:
        with _naming("--weights"):
            _check_origin(options, architecture, data.class_names)
            weights.load(model, options.weights, replace_predictor=options.replace_predictor)
    elif options.replace_predictor:
        raise UserError("--replace-predictor: it goes with --weights")
    start = time.perf_counter()
    train(
        model.to(device),
        _limited(data, options.limit),
        options.out,
        settings,
        description={"architecture": architecture, "class_names": data.class_names},
        resume=options.resume,
        overwrite=options.overwrite,
        stop_after=options.stop_after,
    )
    minutes = {"minutes_of_training": _minutes_since(start)}
    facts = {"backbone": options.backbone, "epochs": settings.epochs, **minutes}
    _evaluate(options, model, _limited(held_out, options.limit), data.class_names, facts)
    print(f"trained in {minutes['minutes_of_training']:.1f} minutes, all in {_minutes_since(start):.1f}: {options.out}")


def _check_origin(options: argparse.Namespace, architecture: dict[str, Any], class_names: tuple[str, ...]) -> None:
    """Raises UserError if a checkpoint to start from says that it is of other classes or anchors."""
    content = read(options.weights)
    if not isinstance(content, dict) or "architecture" not in content:
        return
    pairs = [("anchors", architecture["anchors"], content["architecture"].get("anchors"))]
    if not options.replace_predictor:
        pairs.append(("classes", class_names, tuple(content.get("class_names", ()))))
    for what, now, then in pairs:
        if now != then:
            way_out = "; see --replace-predictor" if what == "classes" else ""
            raise UserError(f"--weights: {options.weights} has the {what} {then}, this run {now}{way_out}")


def _eval(options: argparse.Namespace) -> None:
    model, class_names = checkpoint.load_model(options.weights)
    model.to(_device(options))
    data = _limited(VOC(options.data, options.split, class_names), options.limit)
    _evaluate(options, model, data, class_names, {"weights": str(options.weights)})


def _evaluate(options: argparse.Namespace, model: Any, data: Any, class_names: tuple[str, ...], facts: Any) -> None:
    found = evaluate(model, data, class_names, batch_size=4, workers=options.workers, progress=True)
    print(found.table())
    if options.out:
        write_report(found, data, options.out, facts=facts)


def _detect(options: argparse.Namespace) -> None:
    model, class_names = checkpoint.load_model(options.weights)
    model.to(_device(options))
    options.out.mkdir(parents=True, exist_ok=True)
    uses: Counter[str] = Counter()
    for found in detect(model, options.images):
        sure = found.scores >= options.score
        boxes, labels, scores = found.boxes[sure], found.labels[sure], found.scores[sure]
        # Images of one name from two folders must not overwrite each other.
        uses[found.path.stem] += 1
        number = uses[found.path.stem]
        picture = options.out / f"{found.path.stem}{f'_{number}' if number > 1 else ''}.png"
        draw_detections(found.image, boxes, labels, scores, class_names).save(picture)
        counts = Counter(class_names[label - 1] for label in labels.tolist())
        said = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing"
        print(f"{found.path}: {said} -> {picture}")


def _doctor(options: argparse.Namespace) -> None:
    device = _device(options)
    print("\n".join(doctor.environment(device)))
    complaint = doctor.probe(device)
    print(f"a step of a small detector: {complaint or 'as it should be'}")
    model = FasterRCNN(options.backbone, 21).to(device)
    with _naming("--height, --width"):
        memory = doctor.training_memory(model, options.batch_size, options.height, options.width)
    size = f"{options.batch_size} x {options.height} x {options.width}"
    print(f"training {options.backbone}, {size}: {doctor.told(memory)}")
    if complaint:
        raise _Ailing(f"the detector does not run as it should on {device}: {complaint}")


class _Ailing(Exception):
    """What `doctor` found wrong."""


def _export(options: argparse.Namespace) -> None:
    model, class_names = checkpoint.load_model(options.weights)
    device = _device(options)
    with _naming("--height, --width"):
        height, width = export.input_size(model.settings, options.height, options.width)
    with _naming("--to"):
        if options.to.suffix == ".pt2":
            export.export_pt2(model.to(device), options.to, height=height, width=width)
            how = f"runs on {device.type}, loads after 'import fastdet'"
        else:
            export.export_onnx(model, options.to, height=height, width=width)
            how = f"opset {export.OPSET}"
    channels = len(model.settings.image_mean)
    print(f"{options.to}: images [B, {channels}, {height}, {width}] in 0..1, sizes [B, 2], scales [B]; {how}")
    print(f"labels from 1: {', '.join(class_names)}")


def _demo(options: argparse.Namespace) -> None:
    demo.run(options.out)


def _limited(data: VOC, limit: int | None) -> Any:
    return data if limit is None else Subset(data, range(min(limit, len(data))))


def _minutes_since(start: float) -> float:
    return round((time.perf_counter() - start) / 60, 3)


def _device(options: argparse.Namespace) -> torch.device:
    if options.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _naming("--device"):
        device = torch.device(options.device)
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device: there are cpu and cuda, not {options.device!r}")
        torch.empty(0, device=device)
    return device


def _train_settings(options: argparse.Namespace) -> TrainSettings:
    """The recipe of the backbone, with what the options say otherwise."""
    given = {field.name: getattr(options, field.name, None) for field in fields(TrainSettings)}
    with _naming("training options"):
        recipe = RECIPES.get(options.backbone, TrainSettings())
        return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def _architecture(options: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    """The model as plain values, from which `fastdet.engine.checkpoint.build_model` makes it."""
    settings = dict(options.set)
    if "rpn_anchor_generator" in settings:
        raise UserError("--set rpn_anchor_generator: it is not a plain value; see --anchor-sizes, --aspect-ratios")
    settings.update({n: getattr(options, n) for n in ("min_size", "max_size") if getattr(options, n) is not None})
    with _naming("--backbone"):
        anchors = checkpoint.describe_anchors(options.backbone, options.anchor_sizes, options.aspect_ratios)
    named, pretrained = NAMED[options.backbone], bool(options.weights_backbone or options.weights)
    return {
        "backbone": options.backbone,
        "num_classes": num_classes,
        "anchors": anchors,
        "settings": settings,
        # Said even where it is the default of pretrained weights: whoever loads the checkpoint has none to go by.
        "trainable_backbone_layers": named.trainable_layers(options.trainable_backbone_layers, pretrained),
        "freeze_batchnorm": named.freezes_batchnorm(pretrained),
    }


_COMMANDS = {
    "train": _train,
    "eval": _eval,
    "detect": _detect,
    "export": _export,
    "doctor": _doctor,
    "demo": _demo,
}
