"""Files of tensors, in and out: read without ever running what is in them, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastdet.weights import array_pickles

# How torch's files begin: the newer are zip archives, the older hold this number in their first bytes.
_ZIP = b"PK\x03\x04"
_OLD_TORCH = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


class TensorFileError(ValueError):
    """A file of tensors cannot be read or written; the message is one line naming the file."""


def read(path: str | os.PathLike[str], *, kind: str = "file of tensors") -> Any:
    """Read a file of tensors and plain values onto the CPU. Nothing in the file can run code.

    Known are torch's files (`weights_only=True`), safetensors, and plain pickles of NumPy arrays, which become
    tensors. The content decides which of them a file is; a name only where it says .safetensors.

    Args:
        path: the file.
        kind: what the messages call it.

    Raises:
        TensorFileError: the file is missing, cut short, of another kind, or holds other objects.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(32)
            file.seek(0)
            if start.startswith(_ZIP) or _OLD_TORCH in start:
                return array_pickles.finished(_load_torch(path))
            if _is_safetensors(start) or Path(path).suffix == ".safetensors":
                from safetensors.torch import load

                return load(file.read())
            # Written by Python 2, the bytes of an array are a string.
            return array_pickles.finished(array_pickles.ArrayUnpickler(file, encoding="latin1").load())
    except FileNotFoundError:
        raise TensorFileError(f"{path}: no such {kind}") from None
    except OSError as error:
        if error.errno == errno.EINVAL:
            # torch's reader, where the file ends before it should.
            raise TensorFileError(f"{path}: not a {kind}, or cut short") from error
        raise TensorFileError(f"{path}: the {kind} cannot be read: {error.strerror or one_line(error)}") from error
    except pickle.UnpicklingError as error:
        # Both unpicklers name the object so.
        found = re.search(r"GLOBAL (\S+)", str(error))
        refused = f"it holds objects other than tensors and plain values, refused ({found[1]})" if found else ""
        raise TensorFileError(f"{path}: not a {kind}: {refused or 'damaged or foreign'}") from error
    # The bytes of a damaged file can lead an unpickler into any exception.
    except Exception as error:
        raise TensorFileError(f"{path}: not a {kind}, or cut short: {one_line(error)}") from error


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read names and tensors: a state dict, or one that a checkpoint holds as its "model" or "state_dict".

    That is how fastdet, torchvision's reference scripts, detectron2 and simple-faster-rcnn-pytorch lay out their
    checkpoints. The prefixes that DistributedDataParallel and torch.compile give to every name are taken off.

    Raises:
        TensorFileError: as `read`; or what is left is not a mapping of names to tensors, or empty.
    """
    content = read(path)
    if isinstance(content, Mapping):
        inner = [content[name] for name in ("model", "state_dict") if isinstance(content.get(name), Mapping)]
        content = inner[0] if inner else content
    problem = not_a_state_dict(content)
    if problem:
        raise TensorFileError(f"{path}: not a state dict: {problem}")
    return unwrapped(content)


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that DistributedDataParallel and torch.compile put before every name."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def not_a_state_dict(content: object) -> str:
    """What keeps an object from being a mapping of names to tensors; empty if nothing does."""
    if not isinstance(content, Mapping):
        return f"it is a {type(content).__name__}, not a mapping of names to tensors"
    for name, value in content.items():
        if not isinstance(name, str):
            return f"its key {name!r} is not a name"
        if not isinstance(value, Tensor):
            return f"its entry {name!r} is a {type(value).__name__}, not a tensor"
        if value.layout != torch.strided or value.is_quantized:
            kind = "quantised" if value.is_quantized else str(value.layout)
            return f"its entry {name!r} is {kind}, not a plain tensor"
    return "" if content else "it is empty"


def write_state_dict(path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Write names and tensors: as safetensors if the name ends in .safetensors, else as torch does.

    Tensors that share memory are written each for itself into safetensors, which knows no sharing.

    Raises:
        TensorFileError: the file cannot be written, or `state` is not a mapping of names to tensors.
    """
    problem = not_a_state_dict(state)
    if problem:
        raise TensorFileError(f"{path}: the state dict cannot be written: {problem}")
    tensors = {name: value.detach().cpu() for name, value in state.items()}
    if Path(path).suffix != ".safetensors":
        write(path, lambda file: torch.save(tensors, file), kind="state dict")
        return
    try:
        # Others' loaders look for the word "pt".
        from safetensors.torch import save

        data = save(_unshared(tensors), metadata={"format": "pt"})
    except Exception as error:
        raise TensorFileError(f"{path}: the state dict cannot be written: {one_line(error)}") from error
    write(path, lambda file: file.write(data), kind="state dict")


def write(
    path: str | os.PathLike[str], content: Callable[[BinaryIO], object], *, kind: str = "file of tensors"
) -> None:
    """Write a file so that it is either the old one or the new one, never a part.

    The bytes go to a temporary file in the same folder, are forced to the disk, and then take the file's name in one
    move. A kill, a full disk or an error leaves the last good file as it was.

    Args:
        path: the file; its folder is made if it is not there.
        content: writes into the open file it is given.
        kind: what the messages call it.

    Raises:
        TensorFileError: the file cannot be written.
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
        _sync_folder(path.parent)
    # On a full disk torch's writer raises a RuntimeError of its own.
    except (OSError, RuntimeError) as error:
        # Interrupted, the writer cannot close its archive either, and says so in place of the interruption.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise TensorFileError(f"{path}: the {kind} cannot be written: {one_line(error)}") from error
    finally:
        # Gone already after the move; what else is left here is a part. It must not hide the error.
        _remove(temporary)


def one_line(error: Exception) -> str:
    """The message of an error with its line breaks and length taken out."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Force the move itself to the disk, where the system can: Windows cannot open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor contiguous and in memory of its own."""
    taken: set[int] = set()
    apart = {}
    for name, value in tensors.items():
        whole = value.contiguous()
        memory = whole.untyped_storage().data_ptr()
        apart[name] = whole.clone() if memory in taken else whole
        taken.add(memory)
    return apart


def _is_safetensors(start: bytes) -> bool:
    """Whether bytes are the length of a header, of at most the format's 100 MB, and the brace that begins it."""
    return int.from_bytes(start[:8], "little") <= 100_000_000 and start[8:9] == b"{"


def _load_torch(path: str | os.PathLike[str]) -> Any:
    # NumPy's numbers stand beside the weights in checkpoints that note a metric.
    stand_ins: list[Any] = [(value, name) for name, value in array_pickles.STAND_INS.items()]
    with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
        # It warns of foreign files before it refuses them.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)
