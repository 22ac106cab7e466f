"""The data.yaml of a data set in YOLO's layout."""

import os
import re
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from fastdet.data.formats.file_names import with_slashes
from fastdet.data.formats.text_files import read_yaml
from fastdet.data.images import error_at

# Beyond anything that people annotate.
_MAX_CLASSES = 1 << 16


class Config(NamedTuple):
    """A data.yaml.

    Attributes:
        path: the file.
        content: what it has, of texts; blank values are left out.
        root: the data set's folder, absolute.
        lost_path: what the file names as "path", if there is no such folder.
        names: of the classes, by their numbers.
        unnamed: the names that the file does not have, and that are the numbers.
        keypoint_values: how many values of keypoints a line of labels has behind the box.
    """

    path: Path
    content: dict[str, Any]
    root: Path
    lost_path: str
    names: dict[float, str]
    unnamed: list[str]
    keypoint_values: int


def read_config(path: Path) -> Config:
    """Read a data.yaml.

    Raises:
        DataError: the file is not as of `read_yaml`, or an entry is not what it has to be; splits are not looked at.
    """
    content = read_yaml(path)
    # null is a text here, as all scalars.
    content = {key: value for key, value in content.items() if value not in ("", "~", "null")}
    written = content.get("path", "")
    if not isinstance(written, str):
        raise error_at(path, f"path is {written!r:.100}, not a folder")
    folder = os.path.join(path.parent, with_slashes(written))
    root, lost_path = (folder, "") if os.path.isdir(folder) else (path.parent, written)
    names, unnamed = _read_names(path, content)
    keypoint_values = _count_keypoint_values(path, content)
    return Config(path, content, Path(os.path.abspath(root)), lost_path, names, unnamed, keypoint_values)


def _read_names(path: Path, content: dict[str, Any]) -> tuple[dict[float, str], list[str]]:
    """The names of the classes by their numbers, and which of them the file does not have."""
    written, unnamed = content.get("names"), list[str]()
    count = _to_count(path, "nc", content["nc"]) if "nc" in content else None
    if written is None and count is not None:
        written = unnamed = [str(number) for number in range(min(count, _MAX_CLASSES + 1))]
    if not isinstance(written, (list, dict)):
        raise error_at(path, f"names is {written!r:.100}, not a list of names or names by number")
    if not 0 < len(written) <= _MAX_CLASSES:
        raise error_at(path, f"there are {len(written)} classes, not 1 to {_MAX_CLASSES}")
    names: dict[float, str] = {}
    for key, name in written.items() if isinstance(written, dict) else enumerate(written):
        if not isinstance(name, str) or not name.strip() or _has_controls(name):
            raise error_at(path, f"names: {name!r:.100} of class {key} is not a name")
        number = _to_count(path, "names: the number of a class", str(key))
        if number in names:
            raise error_at(path, f"names: class {number} has two names")
        names[number] = name.strip()
    if count not in (None, len(names)):
        raise error_at(path, f"nc is {count}, but there are {len(names)} names")
    return names, unnamed


def _to_count(path: Path, what: str, value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch("[0-9]{1,6}", value):
        raise error_at(path, f"{what} is {value!r:.100}, not a whole number from 0 to 999999")
    return int(value)


def _has_controls(text: str) -> bool:
    """Whether it has control characters, parts of characters, or more than one line."""
    return not {"Cc", "Cs", "Zl", "Zp"}.isdisjoint(map(unicodedata.category, text))


def _count_keypoint_values(path: Path, content: dict[str, Any]) -> int:
    if "kpt_shape" not in content:
        return 0
    shape = content["kpt_shape"]
    if not isinstance(shape, list) or len(shape) != 2:
        raise error_at(path, f"kpt_shape is {shape!r:.100}, not two numbers")
    keypoints, values = (_to_count(path, "kpt_shape", side) for side in shape)
    return keypoints * values
