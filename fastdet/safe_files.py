"""Files that strangers name: opened only if they are files, replaced whole, and with names that a terminal can show."""

import contextlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

StrPath = str | os.PathLike[str]


class FileError(ValueError):
    """An error about a file, of one line: control characters of names are escaped, and long ones cut."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, 2000))


def open_regular(path: StrPath) -> BinaryIO:
    """Open a regular file to be read, or a link to one.

    A pipe would stop the process until someone writes, and to open a device can have effects.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is a folder, a pipe, a device or a socket; or as `open`.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{_kind(os.stat(path).st_mode)}, not a file")
    # It may have become something else since: O_NONBLOCK does not wait for a pipe's writer.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise OSError(f"{_kind(mode)}, not a file")
    return os.fdopen(number, "rb")


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def replace_file(path: StrPath, content: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is either the old one or the new one, never a part.

    The bytes go to a temporary file in the same folder, are forced to the disk, and then take the file's name in one
    move. A kill, a full disk or an error leaves the last good file as it was.

    Args:
        path: the file; its folder is made if it is not there.
        content: writes into the open file it is given.

    Raises:
        OSError, or what `content` raises.
    """
    path = Path(path)
    # In the same folder, because a move between file systems is a copy; with the process's id, so that two writers
    # of the same name do not write into one file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # Windows cannot open folders.
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        # Gone already after the move; what else is left here is a part. Its removal must not hide the error.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: StrPath, content: Any, *, indent: int | None = 2) -> None:
    """Write plain values as JSON, with `replace_file`.

    Raises:
        FileError: the file cannot be written.
    """
    text = json.dumps(content, indent=indent)
    try:
        replace_file(path, lambda file: file.write(f"{text}\n".encode()))
    except OSError as error:
        raise FileError(f"{path}: the file cannot be written: {error}") from error


def printable(text: object, most: int = 1000) -> str:
    """A text as one line that a terminal shows and does not obey, at most so many characters of it.

    Control characters, marks of the direction of writing and bytes that are no letters are escaped.
    """
    shown = str(text)
    shown = shown if len(shown) <= most else f"{shown[:most]}... ({len(shown)} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
