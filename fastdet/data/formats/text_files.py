"""Text and YAML files of data sets, which come from strangers: bounded, and with errors of one line."""

import io
import math
import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdet.data.images import error_at
from fastdet.safe_files import open_regular

_MAX_DEPTH, _MAX_DIRECTIVES = 16, 16
# Bytes of YAML that take a second at most to parse: with libyaml, and without it.
_MAX_YAML, _MAX_SLOW_YAML = 512 << 10, 128 << 10


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """What a file has.

    Raises:
        DataError: there is none, it is no file, cannot be read, or has more than `max_bytes`.
    """
    try:
        with open_regular(path) as file:
            is_too_large = os.fstat(file.fileno()).st_size > max_bytes
            content = b"" if is_too_large else file.read(max_bytes + 1)
    except FileNotFoundError:
        raise error_at(path, "no such file") from None
    except (OSError, ValueError) as error:
        raise error_at(path, f"the file cannot be read: {error}") from error
    if is_too_large or len(content) > max_bytes:
        size = f"{max_bytes >> 20} MB" if max_bytes >> 20 else f"{max_bytes >> 10} KB"
        raise error_at(path, f"the file has more than {size}")
    return content


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        DataError: as of `read_bytes`, or it is in another encoding.
    """
    content = read_bytes(path, max_bytes)
    try:
        # PowerShell writes UTF-16.
        return content.decode("utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig")
    except ValueError as error:
        raise error_at(path, f"the text is neither UTF-8 nor UTF-16 with a byte order mark: {error}") from error


def is_true(text: str) -> bool:
    """Whether it is a finite number other than 0, or "true" or "yes"; any other text is as if absent."""
    try:
        return math.isfinite(number := float(text)) and number != 0
    except ValueError:
        return text.strip().lower() in ("true", "yes")


def to_size(width: object, height: object) -> tuple[float, float] | None:
    """A size as an annotation has it, in numbers or texts; None where it is none."""
    try:
        size = float(str(width)), float(str(height))
    except ValueError:
        return None
    return size if all(0 < side < math.inf for side in size) else None


def read_lines(path: Path, max_bytes: int, max_lines: int) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, without spaces around them, and with their numbers from 1.

    Raises:
        DataError: as of `read_text`, or there are more than `max_lines`; before the first line.
    """
    text = read_text(path, max_bytes)
    if max(text.count("\n"), text.count("\r")) > max_lines:
        raise error_at(path, f"the file has more than {max_lines} lines")
    lines = enumerate(io.StringIO(text, newline=None), start=1)
    return ((number, stripped) for number, line in lines if (stripped := line.strip()))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file has: of texts, lists and mappings by texts.

    Scalars stay as they are written: what YAML takes for a number, a date or a truth value (no, 007, 1e3) can be a name
    as well. Anchors and aliases are refused, since a few of them can make billions of nodes.

    Raises:
        DataError: the file is not as of `read_text`, has more than 512 KB (128 KB where PyYAML is without libyaml),
            does not parse, is not one mapping, repeats a key, or is nested deeper than 16 levels.
    """
    # Here and not above, so that the detector can be had where there is no such package.
    import yaml

    fast_loader = getattr(yaml, "CSafeLoader", None)
    text = read_text(path, _MAX_YAML if fast_loader else _MAX_SLOW_YAML)
    try:
        if sum(line.startswith("%") for line in text.splitlines()) > _MAX_DIRECTIVES:
            raise ValueError(f"it has more than {_MAX_DIRECTIVES} directives, of which each is compared with all")
        events = yaml.parse(text, Loader=fast_loader or yaml.SafeLoader)
        mapping = None
        for event in events:
            if isinstance(event, yaml.NodeEvent) and mapping is None:
                mapping = _build(events, event, 0)
            elif isinstance(event, yaml.NodeEvent):
                raise ValueError(f"line {event.start_mark.line + 1} begins a second document")
    # OverflowError: the escape of a character beyond the last one.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise error_at(path, f"the YAML does not parse: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(mapping, dict):
        raise error_at(path, "the YAML is not a mapping")
    return mapping


def _build(events: Iterator[Any], event: Any, depth: int) -> Any:
    """The node that starts with `event`, of which `events` has the rest."""
    import yaml

    line = event.start_mark.line + 1
    if event.anchor is not None:
        raise ValueError(f"line {line} has an anchor or an alias, {event.anchor[:100]}, which are not read")
    if depth > _MAX_DEPTH:
        raise ValueError(f"line {line} is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(event, yaml.ScalarEvent):
        return event.value
    if isinstance(event, yaml.SequenceStartEvent):
        return [_build(events, inner, depth + 1) for inner in _until_end(events)]
    mapping: dict[str, Any] = {}
    for inner in _until_end(events):
        key = _build(events, inner, depth + 1)
        if not isinstance(key, str):
            raise ValueError(f"the mapping of line {line} has a key that is no text")
        if key in mapping:
            raise ValueError(f"the mapping of line {line} has the key {key!r:.100} twice")
        mapping[key] = _build(events, next(events), depth + 1)
    return mapping


def _until_end(events: Iterator[Any]) -> Iterator[Any]:
    """The first event of each node in a list or a mapping; whoever builds a node takes the others from `events`."""
    import yaml

    while not isinstance(event := next(events), yaml.CollectionEndEvent):
        yield event
