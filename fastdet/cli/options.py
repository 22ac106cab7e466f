"""The options of the command line: what each command takes, and what its values may be."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastdet.cli.data import add_data_options, add_max_pixels, add_split_options
from fastdet.cli.values import (
    UserError,
    coco_folder,
    milestones,
    model_file,
    not_negative,
    positive,
    read_arguments,
    score,
    setting,
    sizes,
)
from fastdet.data.augmentation import PRESETS
from fastdet.engine.recipes import PRECISIONS, RECIPES
from fastdet.models.backbones import NAMED
from fastdet.version import VERSION

_BACKBONE = "mobilenet_v2_fpn"
_WORKERS = "processes that load images; otherwise none on a CPU, and on a GPU up to four"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, and in `arguments` itself, with those of `train --settings FILE` in its place.

    Raises:
        UserError: it cannot be used.
    """
    arguments = list(argv)
    if arguments[:1] == ["train"]:
        finder = _Parser(prog="fastdet train", add_help=False, allow_abbrev=False)
        finder.add_argument("--settings")
        found, given = finder.parse_known_args(arguments[1:])
        if found.settings is not None:
            arguments = ["train", *_without_data(read_arguments(found.settings), given), *given]
    options, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)} (see fastdet {options.command} --help)")
    options.arguments = arguments
    return options


def _without_data(saved: Sequence[str], given: Sequence[str]) -> list[str]:
    """Arguments of a run without the data sets that are `given` anew, which would come in addition."""
    finder = _Parser(prog="fastdet train", add_help=False, allow_abbrev=False)
    for name in ("--data", "--val-data"):
        if any(argument.split("=")[0] == name for argument in given):
            finder.add_argument(name, action="append")
    return finder.parse_known_args(list(saved))[1]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; its result has the command's name in `command`. Raises UserError, does not exit."""
    parser = _Parser(prog="fastdet", description="Train and use two-stage object detectors.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, device: str = "") -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name not in ("demo", "lint", "convert", "compare", "replay"):
            added.add_argument("--device", help=f"{device}cuda if there is one, else cpu")
        if name in ("eval", "detect", "export"):
            added.add_argument("--weights", type=Path, required=True, help="best.pth or last.pth of a run")
        return added

    parser.add_argument("--version", action="version", version=f"fastdet {VERSION}")
    lint = command("lint", "Look for what is wrong in a data set, and for anchors that fit it, before training.")
    add_data_options(lint)
    add_split_options(lint)
    _add_detector_options(lint)
    lint.add_argument("--out", type=Path, default=Path("runs/lint"), help="folder for the results (runs/lint)")
    lint.add_argument(
        "--fix", type=Path, metavar="DIR", help="write a cleaned copy, in COCO's format, into a new folder"
    )

    convert = command("convert", "Copy data sets into one in COCO's format: images and instances.json.")
    add_data_options(convert)
    convert.add_argument("--split", help="VOC's list, or YOLO's key (trainval, train)")
    convert.add_argument("--to", type=coco_folder, required=True, metavar="coco:DIR", help="a folder that is not there")

    train = command("train", "Train a detector and evaluate it.")
    train.add_argument(
        "--out", type=Path, required=True, help="folder for best.pth, last.pth, metrics, result.json, images"
    )
    train.add_argument("--settings", metavar="FILE", help="settings.json of a run, to be repeated with other options")
    add_data_options(train)
    add_split_options(train)
    _add_model_options(train)
    _add_recipe_options(train)
    train.add_argument("--tensorboard", action="store_true", help="write the figures for TensorBoard, too")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in --out, other options unchanged")
    existing.add_argument("--overwrite", action="store_true", help="begin anew where --out has a run")

    evaluation = command("eval", "Average precision of a trained detector.")
    add_data_options(evaluation)
    evaluation.add_argument("--split", help="VOC's list, or YOLO's key (test, val)")
    evaluation.add_argument("--out", type=Path, help="folder for result.json and detections.png")
    evaluation.add_argument("--workers", type=not_negative, metavar="N", help=_WORKERS)

    detect = command("detect", "Find objects in images: pictures with the boxes, a JSON file, or both.")
    detect.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, and folders of them")
    detect.add_argument("--out", type=Path, help="folder for the drawn images")
    detect.add_argument("--json", type=Path, metavar="FILE", help="boxes, labels and scores of each image, a new file")
    add_max_pixels(detect)
    detect.add_argument("--score", type=score, default=0.5, help="least score of a box (0.5)")

    text = "Write a trained detector for torch.export or ONNX: pixels in, suppressed boxes out."
    export = command("export", text, device="that a .pt2 runs on: ")
    to = ".pt2, loaded by torch.export.load after 'import fastdet'; or .onnx, in standard operators"
    export.add_argument("--to", type=model_file, required=True, metavar="FILE", help=to)
    export.add_argument("--height", type=positive, help="of the images it takes, in pixels (padded --min-size)")
    export.add_argument("--width", type=positive, help="likewise (padded --max-size)")

    compare = command("compare", "The settings in which runs differ, and how well each did.")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    compare.add_argument("--out", type=Path, help="folder for compare.png, the curves of the runs")

    replay = command("replay", "Take the step of a run again in which a loss or gradient was not finite.")
    replay.add_argument("run", type=Path, metavar="RUN", help="folder of the run, with failure.json")

    doctor = command("doctor", "Describe this machine, check that the detector runs, measure the memory of a step.")
    doctor.add_argument("--backbone", choices=tuple(NAMED), default="mobilenet_v2", help="whose step (mobilenet_v2)")
    doctor.add_argument("--batch-size", type=positive, default=1, help="images of the step (1)")
    doctor.add_argument("--height", type=positive, default=608, help="of the padded images in pixels (608)")
    doctor.add_argument("--width", type=positive, default=912, help="likewise (912)")

    demo = command("demo", "Train a small detector of drawn shapes on the CPU, in about two minutes.")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (runs/demo)")
    return parser


def _add_detector_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("detector").add_argument
    add("--backbone", default=_BACKBONE, help=f"{', '.join(NAMED)} ({_BACKBONE})")
    chosen = "otherwise chosen by the objects' sizes, at most the backbone's default"
    add("--min-size", type=positive, help=f"shorter side of resized images in pixels; {chosen}")
    longest = "longest longer side; otherwise the backbone's, in proportion to a chosen shorter side"
    add("--max-size", type=positive, help=longest)
    auto = "anchors that fit the objects of --data (auto), or the backbone's (default)"
    add("--anchors", choices=("auto", "default"), help=f"{auto}; auto where no sizes are given")
    add(
        "--anchor-sizes", type=sizes, metavar="32,64,128", help="sides in pixels; of a pyramid its finest level's first"
    )
    add("--aspect-ratios", type=sizes, metavar=".5,1,2", help="height over width")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    _add_detector_options(parser)
    group = parser.add_argument_group("model")
    add = group.add_argument
    initial = group.add_mutually_exclusive_group()
    initial.add_argument("--weights-backbone", metavar="FILE_OR_NAME", help="its weights: a file, or IMAGENET1K_V1")
    initial.add_argument("--weights", type=Path, metavar="FILE", help="weights of a detector to start from")
    add("--replace-predictor", action="store_true", help="those of --weights are for other classes")
    add("--trainable-backbone-layers", type=int, metavar="N", help="stages not frozen, from the end")
    weighed = "let the boxes of each class count alike in the classifier's loss"
    add("--class-weights", choices=("balanced",), help=weighed)
    add("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="a field of fastdet.Settings")


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    title = f"What is left out is as in the backbone's recipe; that of {_BACKBONE} is in brackets."
    group, recipe = parser.add_argument_group("training", title), RECIPES[_BACKBONE]

    def add(name: str, text: str, **options: Any) -> None:
        field = options.get("dest", name.strip("-").replace("-", "_"))
        default = getattr(recipe, field)
        shown = default if isinstance(default, str) else f"{default:g}"
        group.add_argument(name, help=f"{text} ({shown})", **options)

    add("--epochs", "passes over the data", type=int)
    ends = "end after N epochs, on the schedule of --epochs"
    group.add_argument("--stop-after", type=not_negative, metavar="N", help=ends)
    add("--batch-size", "images a step, of all processes together", type=int)
    add("--accumulate", "parts of a batch that go through the network one after another", type=int, metavar="N")
    add("--optimizer", "SGD with momentum, or AdamW", dest="optimizer_name", choices=("sgd", "adamw"))
    add("--lr", "learning rate; otherwise the recipe's, in proportion to --batch-size", type=float)
    add("--schedule", "of the rate: it falls to zero, or at the milestones", choices=("cosine", "step"))
    group.add_argument(
        "--milestones", type=milestones, metavar="8,11", help="epochs after which 'step' lowers the rate"
    )
    add("--warmup-steps", "steps in which the rate rises", type=int)
    add("--weight-decay", "decay of the weights", type=float)
    add("--clip-norm", "largest norm of the gradients; 0 does not clip", type=float)
    add("--ema", "average the weights, such as 0.9998; 0: not", type=float, metavar="DECAY")
    add("--eval-every", "epochs between two evaluations; the best weights are kept", type=int, metavar="N")
    add("--save-every", "write last.pth within an epoch too; 0: only after it", type=int, metavar="STEPS")
    add("--patience", "end after N evaluations without a better one; 0: never", type=int, metavar="N")
    add("--amp", "precision of the networks; auto: mixed on a GPU, none: float32", choices=PRECISIONS)
    graphs = "on a GPU, no CUDA graph of a step"
    group.add_argument("--no-graphs", dest="graphs", action="store_false", default=None, help=graphs)
    add("--augmentation", "of the images: flip mirrors half of them", choices=PRESETS)
    groups = "steps a doubling of width / height, to batch alike images; 0: none"
    add("--aspect-groups", groups, type=int, metavar="N")
    group.add_argument("--workers", type=int, metavar="N", help=_WORKERS)
    add("--seed", "of all that is drawn at random", type=int)
