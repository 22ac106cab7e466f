"""The folder of a training run: it belongs to one process at a time, which ends in order when it is asked to; and the
rows of its metrics file."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from fastdet.engine.checkpoint import CheckpointError
from fastdet.models.losses import NAMES as LOSSES
from fastdet.weights import files

COLUMNS = ("epoch", "step", "lr", "loss", *LOSSES, "images_per_second", "data_wait")

VALIDATION_COLUMNS = ("epoch", "step", "AP", "AP50", "AP75", "val_loss", *LOSSES)

Row = dict[str, float]

_LOCK = ".lock"


class Terminated(Exception):
    """A run was asked to end, by SIGTERM, and has saved its state first."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes from a run's folder, which is made if it is not there; remove what a killed one left.

    The lock ends with the process, however that ends. On Windows there is none; on a file system without locks there
    is a warning.

    Raises:
        CheckpointError: another process has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        yield
        return
    import fcntl

    with (folder / _LOCK).open("a+") as file:
        try:
            # Of this process alone: workers that outlive it for a moment do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise CheckpointError(
                f"{folder}: another run, of process {file.read(20).strip() or 'unknown'}, writes into the folder"
            ) from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            warnings.warn(f"{folder}: the folder cannot be locked ({reason}): keep other runs out of it", stacklevel=4)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        for part in folder.glob(".*.[0-9]*.tmp"):
            part.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def notice_sigterm() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come since: it does not end the process here. Only in the main thread, as signals do."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def note(*_: Any) -> None:
        came.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def raise_at_sigterm(message: str) -> Iterator[None]:
    """Within `notice_sigterm`, a part that SIGTERM ends at once, as Terminated with this message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: FrameType | None) -> None:
        if callable(before):
            # Where an exception is lost, as in a finalizer, it is noticed still.
            before(number, frame)
        raise Terminated(message)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class MetricsFile:
    """The rows of a metrics file, up to a step and those that are added; a context manager.

    Args:
        path: of the file; rows after the step, which an interrupted run has left, are dropped.
        last_step: 0 begins anew.
        writes: False neither reads nor writes a file.
    """

    def __init__(self, path: Path, last_step: int, writes: bool) -> None:
        self.rows = read_rows(path, last_step) if writes and last_step else []
        self._path = path if writes else None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> MetricsFile:
        if self._path is not None:
            files.write(self._path, lambda file: file.write(to_csv(self.rows, header=True)), kind="metrics")
            self._file = self._path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self._file is not None:
            self._file.write(to_csv([row]))
            self._file.flush()


def write_validation(path: Path, row: Row) -> None:
    """Add a row to the file of evaluations, in place of those from its step on, which a killed run has left."""
    new = {name: row.get(name, math.nan) for name in VALIDATION_COLUMNS}
    rows = [*read_rows(path, int(row["step"]) - 1, VALIDATION_COLUMNS), new]
    files.write(path, lambda file: file.write(to_csv(rows, VALIDATION_COLUMNS, header=True)), kind="metrics")


def has_rows(path: Path) -> bool:
    """Whether there is a metrics file with a row."""
    return path.exists() and path.read_bytes().count(b"\n") > 1


def to_csv(rows: list[Row], columns: Sequence[str] = COLUMNS, *, header: bool = False) -> bytes:
    """Lines of a metrics file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_rows(path: Path, last_step: int, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """The rows of a metrics file up to a step; an interrupted run repeats those after its checkpoint.

    A file with rows that cannot be read is kept under another name, with a warning; the last may be cut short.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\0", "").splitlines()
    rows, damaged = [], []
    for number, line in enumerate(csv.DictReader(lines), start=2):
        try:
            row = {name: (int if name in ("epoch", "step") else float)(line[name]) for name in columns}
        except (KeyError, TypeError, ValueError):
            damaged.append(number)
        else:
            rows.append(row)
    if damaged and damaged != [len(lines)]:
        copy = path.with_suffix(".damaged.csv")
        shutil.copyfile(path, copy)
        shown = ", ".join(map(str, damaged[:5]))
        warnings.warn(f"{path}: {len(damaged)} lines cannot be read ({shown}, ...): see {copy.name}", stacklevel=2)
    return [row for row in rows if row["step"] <= last_step]
