"""The options of the command line: what each command takes, and what its values may be."""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fastdet.data import DataError
from fastdet.data.images import MAX_PIXELS
from fastdet.engine import CheckpointError
from fastdet.models.backbones import NAMED
from fastdet.weights import TensorFileError, WeightsError
from fastdet.weights.files import one_line


class UserError(ValueError):
    """The value of an option cannot be used; the message is one line naming the option."""


@contextmanager
def raise_user_errors(option: str) -> Iterator[None]:
    """Turn an error of the library about a value into an error of the option that it came from."""
    try:
        yield
    except (UserError, DataError, CheckpointError):
        raise
    except (WeightsError, TensorFileError) as error:
        raise UserError(f"{option}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{option}: {one_line(error)}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; its result has the command's name in `command`. Raises UserError, does not exit."""
    parser = _Parser(prog="fastdet", description="Train and use two-stage object detectors.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, device: str = "") -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name != "demo":
            added.add_argument("--device", help=f"{device}cuda if there is one, else cpu")
        if name in ("eval", "detect", "export"):
            added.add_argument("--weights", type=Path, required=True, help="last.pth of a run")
        if name in ("train", "eval"):
            places = (
                "voc:PATH, a folder in the VOC layout; or coco:IMAGES,FILE, a folder and a JSON file in COCO's format"
            )
            added.add_argument("--data", type=_data, required=True, metavar="FORMAT:PATH", help=places)
            added.add_argument("--zero-based", action="store_true", help="VOC's corners are counted from 0, not from 1")
            turned = "turn images as EXIF tells: as the annotated sizes fit (auto), all (applied), or none (stored)"
            added.add_argument("--orientation", choices=("auto", "applied", "stored"), default="auto", help=turned)
            added.add_argument("--limit", type=_positive, metavar="N", help="only the first N images of each split")
            added.add_argument("--workers", type=_not_negative, default=0, help="processes that load images (0)")
        return added

    train = command("train", "Train a detector and evaluate it.")
    train.add_argument("--out", type=Path, required=True, help="folder for last.pth, metrics.csv, result.json, images")
    train.add_argument("--train-split", default="trainval", help="name of a file in ImageSets/Main (trainval)")
    train.add_argument("--val-split", default="test", help="likewise, to evaluate on (test)")
    train.add_argument("--val-data", type=_data, metavar="FORMAT:PATH", help="to evaluate on, if not a split of --data")
    train.add_argument("--classes", type=_names, help="names, by commas; those of the training split otherwise")
    _add_model_options(train)
    _add_recipe_options(train)
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in --out, other options unchanged")
    existing.add_argument("--overwrite", action="store_true", help="begin anew where --out has a run")

    _add_max_pixels(train)

    evaluation = command("eval", "Average precision of a trained detector.")
    evaluation.add_argument("--split", default="test", help="name of a file in ImageSets/Main (test)")
    evaluation.add_argument("--out", type=Path, help="folder for result.json and detections.png")

    detect = command("detect", "Draw the boxes found in images.")
    detect.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    detect.add_argument("--out", type=Path, required=True, help="folder for the drawn images")
    _add_max_pixels(evaluation)
    _add_max_pixels(detect)
    detect.add_argument("--score", type=_score, default=0.5, help="least score of a box (0.5)")

    doctor = command("doctor", "Describe this machine, check that the detector runs, measure the memory of a step.")
    doctor.add_argument("--backbone", choices=tuple(NAMED), default="mobilenet_v2", help="whose step (mobilenet_v2)")
    doctor.add_argument("--batch-size", type=_positive, default=1, help="images of the step (1)")
    doctor.add_argument("--height", type=_positive, default=608, help="of the padded images in pixels (608)")
    doctor.add_argument("--width", type=_positive, default=912, help="likewise (912)")

    text = "Write a trained detector for torch.export or ONNX: pixels in, suppressed boxes out."
    export = command("export", text, device="that a .pt2 runs on: ")
    to = ".pt2, loaded by torch.export.load after 'import fastdet'; or .onnx, in standard operators"
    export.add_argument("--to", type=_model_file, required=True, metavar="FILE", help=to)
    export.add_argument("--height", type=_positive, help="of the images it takes, in pixels (padded --min-size)")
    export.add_argument("--width", type=_positive, help="likewise (padded --max-size)")

    demo = command("demo", "Train a small detector of drawn shapes on the CPU, in about two minutes.")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (runs/demo)")
    return parser


def _add_max_pixels(parser: argparse.ArgumentParser) -> None:
    text = f"larger images are refused before they are decoded ({MAX_PIXELS})"
    parser.add_argument("--max-pixels", type=_positive, default=MAX_PIXELS, metavar="N", help=text)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--backbone", default="mobilenet_v2", help=f"{', '.join(NAMED)} (mobilenet_v2)")
    initial = group.add_mutually_exclusive_group()
    initial.add_argument("--weights-backbone", metavar="FILE_OR_NAME", help="its weights: a file, or IMAGENET1K_V1")
    initial.add_argument("--weights", type=Path, metavar="FILE", help="weights of a detector to start from")
    add("--replace-predictor", action="store_true", help="those of --weights are for other classes")
    add("--trainable-backbone-layers", type=int, metavar="N", help="stages not frozen, from the end")
    add("--min-size", type=_positive, help="shorter side of resized images in pixels")
    add("--max-size", type=_positive, help="longest longer side")
    sizes = "sides in pixels; of a pyramid its finest level's first"
    add("--anchor-sizes", type=_sizes, metavar="32,64,128", help=sizes)
    add("--aspect-ratios", type=_sizes, metavar=".5,1,2", help="height over width")
    add("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="a field of fastdet.Settings")


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training", "What is left out is as in the backbone's recipe.").add_argument
    add("--epochs", type=int)
    add("--stop-after", type=_not_negative, metavar="N", help="end after N epochs, on the schedule of --epochs")
    add("--batch-size", type=int)
    add("--optimizer", dest="optimizer_name", choices=("sgd", "adamw"))
    add("--lr", type=float, help="learning rate")
    add("--schedule", choices=("cosine", "step"))
    add("--milestones", type=_milestones, metavar="8,11", help="epochs after which 'step' lowers it")
    add("--warmup-steps", type=int)
    add("--weight-decay", type=float)
    add("--clip-norm", type=float, help="largest norm of the gradients; 0 does not clip")
    add("--amp", choices=("bfloat16",), help="networks in mixed precision")
    add("--no-flip", dest="flip", action="store_const", const=False, help="no mirrored images")
    add("--seed", type=int)


def _number(
    kind: Callable[[str], Any], is_valid: Callable[[Any], bool], expected: str, several: bool = False
) -> Callable[[str], Any]:
    """The type of an option: a number, or `several` by commas, all valid; the error is that it "is not" as expected."""

    def parse(text: str) -> Any:
        try:
            values = [kind(part) for part in (text.split(",") if several else [text])]
        except ValueError:
            values = []
        if not values or not all(map(is_valid, values)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return tuple(values) if several else values[0]

    return parse


_positive = _number(int, lambda value: value > 0, "a positive whole number")
_not_negative = _number(int, lambda value: value >= 0, "a whole number from 0 on")
_score = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
_sizes = _number(float, lambda value: 0 < value < math.inf, "a list of positive numbers, by commas", several=True)
_milestones = _number(int, lambda value: value > 0, "a list of positive whole numbers, by commas", several=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


class DataPlace(NamedTuple):
    """Where a data set is: a folder in the VOC layout; or of COCO's format the folder of images, and the JSON file."""

    folder: Path
    annotations: Path | None


def _data(text: str) -> DataPlace:
    kind, _, path = text.partition(":")
    folder, _, annotations = path.rpartition(",")
    if kind == "voc" and path:
        return DataPlace(Path(path), None)
    if kind == "coco" and folder and annotations:
        return DataPlace(Path(folder), Path(annotations))
    raise argparse.ArgumentTypeError(f"{text!r} is neither of the form voc:PATH nor coco:IMAGES,FILE")


def _model_file(text: str) -> Path:
    if Path(text).suffix not in (".pt2", ".onnx"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .pt2 nor in .onnx")
    return Path(text)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: {value!r} is not a number, a tuple, True, False, None or a quoted text"
        ) from None
