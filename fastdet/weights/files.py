"""Files of tensors, in and out: read without ever running what is in them, written whole or not at all."""

import math
import pickle
import re
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastdet.safe_files import FileError, StrPath, open_regular, replace_file
from fastdet.weights import limits, torch_files

# How torch's files begin: the newer are zip archives, the older have this number in their first bytes.
_ZIP = b"PK\x03\x04"
_OLD_TORCH = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


# The key of a checksum in the metadata of safetensors, and its value while the checksum is computed.
_CHECKSUM, _NO_CHECKSUM = "fastdet.crc32", "00000000"


class TensorFileError(FileError):
    """A file of tensors cannot be read or written; the message is one line naming the file."""


def read(path: StrPath, *, kind: str = "file of tensors") -> Any:
    """Read a file of tensors and plain values onto the CPU. Nothing in the file can run code.

    It may be a file of torch, of safetensors, or a plain pickle of NumPy arrays, which become tensors. The content
    decides which of them it is; the name only where it ends in .safetensors. Tensors are dense, and have no gradient,
    hooks or attributes; ordered dicts and the options that a script has parsed become dicts.

    Args:
        path: the file.
        kind: what the messages call it.

    Raises:
        TensorFileError: the file is missing, cut short, of another kind, or holds other objects.
    """
    try:
        with open_regular(path) as file:
            data = file.read()
        torch_files.verify_checksum(data)
        if data.startswith(_ZIP):
            return torch_files.read_archive(data)
        if _OLD_TORCH in data[:32]:
            return torch_files.read_old_archive(data)
        # They begin with the length of the header, of at most the format's 100 MB, and the header's brace.
        header = int.from_bytes(data[:8], "little")
        if (header <= 100_000_000 and data[8:9] == b"{") or Path(path).suffix == ".safetensors":
            from safetensors.torch import load

            limits.check_list(header, "header")
            _verify_checksum(data)
            return load(data)
        return torch_files.read_pickle(data)
    except FileNotFoundError:
        raise TensorFileError(f"{path}: no such {kind}") from None
    except OSError as error:
        raise TensorFileError(f"{path}: the {kind} cannot be read: {one_line(error)}") from error
    except limits.OutOfProportion as error:
        raise TensorFileError(f"{path}: not a {kind}: {error}, out of proportion to its size") from error
    except pickle.UnpicklingError as error:
        # Both unpicklers name the object so.
        found = re.search(r"GLOBAL (\S+)", str(error))
        refused = f": it holds objects other than tensors and plain values, refused ({found[1]})" if found else ""
        raise TensorFileError(f"{path}: not a {kind}{refused or f', or cut short: {one_line(error)}'}") from error
    # The bytes of a damaged file can lead an unpickler into any exception.
    except Exception as error:
        raise TensorFileError(f"{path}: not a {kind}, or cut short: {one_line(error)}") from error


def read_state_dict(path: StrPath) -> dict[str, Tensor]:
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
    if problem := describe_problem(content):
        raise TensorFileError(f"{path}: not a state dict: {problem}")
    return unwrap_prefixes(content)


def unwrap_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes that DistributedDataParallel and torch.compile put before every name."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def describe_problem(content: object) -> str:
    """Why an object is not a mapping of names to tensors; empty if it is one."""
    if not isinstance(content, Mapping):
        return f"it is a {type(content).__name__}, not a mapping of names to tensors"
    for name, value in content.items():
        if not isinstance(name, str):
            return f"its key {name!r} is not a name"
        if not isinstance(value, Tensor):
            return f"its entry {name!r} is a {type(value).__name__}, not a tensor"
        if value.layout != torch.strided or value.is_quantized:
            kind = "quantized" if value.is_quantized else str(value.layout)
            return f"its entry {name!r} is {kind}, not a plain tensor"
    return "" if content else "it is empty"


def describe_values(state: Mapping[str, Tensor]) -> str:
    """The first of the tensors that has values which are not finite; empty if none has."""
    for name, value in state.items():
        # One pass over the values. Where the sum of finite ones overflows, a second decides.
        if not value.is_floating_point() or value.is_meta or math.isfinite(value.detach().sum(dtype=torch.float32)):
            continue
        if bad := int((~value.isfinite()).sum()):
            return f"{name} has {bad} of {value.numel()} values that are not finite"
    return ""


def write_state_dict(path: StrPath, state: Mapping[str, Tensor]) -> None:
    """Write names and tensors: as safetensors if the name ends in .safetensors, else as torch does.

    Tensors that share memory are written each for itself into safetensors, a format without sharing. Either file has a
    checksum of all its bytes, in the metadata of safetensors and as the comment of torch's archive.

    Raises:
        TensorFileError: the file cannot be written, or `state` is not a mapping of names to tensors.
    """
    if problem := describe_problem(state):
        raise TensorFileError(f"{path}: the state dict cannot be written: {problem}")
    tensors = {name: value.detach().cpu() for name, value in state.items()}
    if Path(path).suffix != ".safetensors":
        write(path, partial(torch_files.save, tensors), kind="state dict")
        return
    try:
        # Others' loaders look for the word "pt".
        from safetensors.torch import save

        data = _add_checksum(save(_unshare(tensors), metadata={"format": "pt", _CHECKSUM: _NO_CHECKSUM}))
    except Exception as error:
        raise TensorFileError(f"{path}: the state dict cannot be written: {one_line(error)}") from error
    write(path, lambda file: file.write(data), kind="state dict")


def write(path: StrPath, content: Callable[[BinaryIO], object], *, kind: str = "file of tensors") -> None:
    """`replace_file`, whose errors are of one line.

    Args:
        kind: what the messages call the file.

    Raises:
        TensorFileError: the file cannot be written.
    """
    try:
        replace_file(path, content)
    except (OSError, RuntimeError) as error:
        # On a full disk, or interrupted, torch's writer cannot close its archive either, and raises that in its place.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise TensorFileError(f"{path}: the {kind} cannot be written: {one_line(reason)}") from error


def one_line(error: Exception) -> str:
    """The message of an error without line breaks, at most 300 characters of it, or the name of its class.

    Of an error of the system neither its number nor its path, which those who show it name themselves.
    """
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.split())[:300] or type(error).__name__


def _find_checksum(data: bytes) -> re.Match[bytes] | None:
    header = 8 + int.from_bytes(data[:8], "little")
    return re.search(rb'"%b":"([0-9a-f]{8})"' % re.escape(_CHECKSUM.encode()), data[: min(header, 1 << 20)])


def _checksum(data: bytes, found: re.Match[bytes]) -> bytes:
    """CRC-32 of the whole file, with zeros where it has the checksum itself."""
    start, end = found.span(1)
    view = memoryview(data)
    return b"%08x" % zlib.crc32(view[end:], zlib.crc32(_NO_CHECKSUM.encode(), zlib.crc32(view[:start])))


def _add_checksum(data: bytes) -> bytes:
    found = _find_checksum(data)
    assert found is not None
    return data[: found.start(1)] + _checksum(data, found) + data[found.end(1) :]


def _verify_checksum(data: bytes) -> None:
    found = _find_checksum(data)
    if found is not None and _checksum(data, found) != found[1]:
        raise pickle.UnpicklingError("its checksum is wrong")


def _unshare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make every tensor contiguous, in memory that no other one has."""
    pointers: set[int] = set()
    separate = {}
    for name, value in tensors.items():
        contiguous = value.contiguous()
        pointer = contiguous.untyped_storage().data_ptr()
        separate[name] = contiguous.clone() if pointer in pointers else contiguous
        pointers.add(pointer)
    return separate
