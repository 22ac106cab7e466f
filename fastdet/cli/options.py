"""The options of the command line: what each command takes, and what its values may be."""

from __future__ import annotations

import argparse
import ast
import math
from pathlib import Path
from typing import Any, NoReturn

from fastdet.models.backbones import NAMED


class UserError(ValueError):
    """An option says something that cannot be done; the message is one line naming it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it gives says which in `command`. Raises UserError instead of exiting."""
    whole = _Parser(prog="fastdet", description="Train and use two-stage object detectors.", allow_abbrev=False)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        return added

    one = command("train", "Train a detector and evaluate it.")
    _add_data_options(one)
    one.add_argument("--out", type=Path, required=True, help="folder for last.pth, metrics.csv, result.json, pictures")
    one.add_argument("--train-split", default="trainval", help="name of a file in ImageSets/Main (trainval)")
    one.add_argument("--val-split", default="test", help="likewise, to evaluate on (test)")
    one.add_argument("--classes", type=_names, help="names, by commas; those of the training split otherwise")
    _add_model_options(one)
    _add_recipe_options(one)
    again = one.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in --out, all other options as then")
    again.add_argument("--overwrite", action="store_true", help="begin anew where --out has a run")

    one = command("eval", "Average precision of a trained detector.")
    _add_data_options(one)
    one.add_argument("--weights", type=Path, required=True, help="last.pth of a run")
    one.add_argument("--split", default="test", help="name of a file in ImageSets/Main (test)")
    one.add_argument("--out", type=Path, help="folder for result.json and detections.png")

    one = command("detect", "Draw the boxes found in images.")
    one.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    one.add_argument("--weights", type=Path, required=True, help="last.pth of a run")
    one.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    one.add_argument("--score", type=_share, default=0.5, help="least score of a box (0.5)")
    one.add_argument("--device", help="cuda if there is one, else cpu")

    one = command("doctor", "Say what this machine has, try the detector on it, measure the memory of a step.")
    one.add_argument("--backbone", choices=tuple(NAMED), default="mobilenet_v2", help="whose step (mobilenet_v2)")
    one.add_argument("--batch-size", type=_at_least_one, default=1, help="images of the step (1)")
    one.add_argument("--height", type=_at_least_one, default=608, help="of the padded images in pixels (608)")
    one.add_argument("--width", type=_at_least_one, default=912, help="likewise (912)")
    one.add_argument("--device", help="cuda if there is one, else cpu")

    one = command("export", "Write a trained detector for torch.export or ONNX: pixels in, suppressed boxes out.")
    one.add_argument("--weights", type=Path, required=True, help="last.pth of a run")
    one.add_argument(
        "--to",
        type=_model_file,
        required=True,
        metavar="FILE",
        help=".pt2, loaded by torch.export.load after 'import fastdet'; or .onnx, in standard operators",
    )
    one.add_argument("--height", type=_at_least_one, help="of the images it takes, in pixels (padded --min-size)")
    one.add_argument("--width", type=_at_least_one, help="likewise (padded --max-size)")
    one.add_argument("--device", help="that a .pt2 runs on: cuda if there is one, else cpu")

    one = command("demo", "Train a small detector of drawn shapes on the CPU, in about two minutes.")
    one.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (runs/demo)")
    return whole


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=_voc, required=True, metavar="voc:PATH", help="a folder in the VOC layout")
    parser.add_argument("--limit", type=_at_least_one, metavar="N", help="only the first N images of each split")
    parser.add_argument("--workers", type=_not_negative, default=0, help="processes that load images (0)")
    parser.add_argument("--device", help="cuda if there is one, else cpu")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--backbone", default="mobilenet_v2", help=f"{', '.join(NAMED)} (mobilenet_v2)")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--weights-backbone", metavar="FILE_OR_NAME", help="its weights: a file, or IMAGENET1K_V1")
    start.add_argument("--weights", type=Path, metavar="FILE", help="weights of a detector to start from")
    group.add_argument("--replace-predictor", action="store_true", help="those of --weights are for other classes")
    group.add_argument("--trainable-backbone-layers", type=int, metavar="N", help="stages not frozen, from the end")
    group.add_argument("--min-size", type=_at_least_one, help="shorter side of resized images in pixels")
    group.add_argument("--max-size", type=_at_least_one, help="longest longer side")
    group.add_argument(
        "--anchor-sizes",
        type=_numbers,
        metavar="32,64,128",
        help="sides in pixels; of a pyramid its finest level's first",
    )
    group.add_argument("--aspect-ratios", type=_numbers, metavar=".5,1,2", help="height over width")
    group.add_argument(
        "--set", type=_assignment, action="append", default=[], metavar="NAME=VALUE", help="a field of fastdet.Settings"
    )


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training", "What is left out is as the backbone's recipe has it.")
    group.add_argument("--epochs", type=int)
    group.add_argument(
        "--stop-after", type=_not_negative, metavar="N", help="end after N epochs, on the schedule of --epochs"
    )
    group.add_argument("--batch-size", type=int)
    group.add_argument("--optimizer", dest="optimizer_name", choices=("sgd", "adamw"))
    group.add_argument("--lr", type=float, help="learning rate")
    group.add_argument("--schedule", choices=("cosine", "step"))
    group.add_argument("--milestones", type=_whole_numbers, metavar="8,11", help="epochs after which 'step' lowers it")
    group.add_argument("--warmup-steps", type=int)
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--clip-norm", type=float, help="largest norm of the gradients; 0 does not clip")
    group.add_argument("--amp", choices=("bfloat16",), help="networks in mixed precision")
    group.add_argument("--no-flip", dest="flip", action="store_const", const=False, help="no mirrored images")
    group.add_argument("--seed", type=int)


def _voc(text: str) -> Path:
    kind, _, path = text.partition(":")
    if kind != "voc" or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form voc:PATH")
    return Path(path)


def _model_file(text: str) -> Path:
    if Path(text).suffix not in (".pt2", ".onnx"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .pt2 nor in .onnx")
    return Path(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers, by commas")
    return numbers


def _whole_numbers(text: str) -> tuple[int, ...]:
    numbers = _numbers(text)
    if any(number != int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, by commas")
    return tuple(map(int, numbers))


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return share


def _at_least_one(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: {value!r} is not a number, a tuple, True, False, None or a quoted text"
        ) from None
