"""What the values of options may be, and errors about them."""

from __future__ import annotations

import argparse
import ast
import csv
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os.path import expanduser
from pathlib import Path
from typing import Any

from fastdet.data import DataError
from fastdet.engine import CheckpointError
from fastdet.safe_files import StrPath
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


positive = _number(int, lambda value: value > 0, "a positive whole number")
not_negative = _number(int, lambda value: value >= 0, "a whole number from 0 on")
share = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1")
score = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
sizes = _number(float, lambda value: 0 < value < math.inf, "a list of positive numbers, by commas", several=True)
milestones = _number(int, lambda value: value > 0, "a list of positive whole numbers, by commas", several=True)


def names(text: str) -> tuple[str, ...]:
    """Different names, as of a line of CSV."""
    try:
        fields = next(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error:
        fields = []
    given = tuple(name.strip() for name in fields if name.strip())
    if not given or len(set(given)) < len(given):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different names, by commas")
    return given


def model_file(text: str) -> Path:
    """A file to export to."""
    if Path(text).suffix not in (".pt2", ".onnx"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .pt2 nor in .onnx")
    return Path(text)


def read_arguments(path: StrPath) -> list[str]:
    """The arguments of `train` that a run's settings.json holds."""
    try:
        arguments = json.loads(Path(path).read_bytes())["arguments"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--settings: {path} is not the settings.json of a run: {one_line(error)}") from error
    if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
        raise UserError(f"--settings: {path} is not the settings.json of a run")
    return [argument for argument in arguments[1:] if argument not in ("--resume", "--overwrite")]


def coco_folder(text: str) -> Path:
    """A folder to convert to."""
    kind, _, path = text.partition(":")
    if kind != "coco" or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form coco:DIR")
    return Path(expanduser(path))


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: {value!r} is not a number, a tuple, True, False, None or a quoted text"
        ) from None
