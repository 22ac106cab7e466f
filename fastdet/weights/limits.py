"""What reading a file of tensors would take, counted before it is read: a few bytes can ask for all memory.

A pickle is a program. Its instructions are gone through one by one without being run, and the memory of what they would
make is added up. An archive of torch is checked by its directory, and by the checksums in it, which torch leaves out.
"""

import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

# Reading may take so many times the file's size, and so many bytes more.
_FACTOR, _ALLOWANCE = 4, 64 << 20
# Python's objects, in bytes; of those that are left out here, a reference.
_COSTS = {
    **dict.fromkeys(("EMPTY_DICT", "DICT"), 64),
    **dict.fromkeys(("SETITEM", "SETITEMS"), 168),
    **dict.fromkeys(("EMPTY_LIST", "LIST", "APPENDS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), 64),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), 216),
    **dict.fromkeys(("REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "INST", "OBJ"), 500),
}
_REFERENCE, _OBJECT = 8, 64
# More instructions than any checkpoint has: to count them takes seconds.
_MOST_INSTRUCTIONS = 1 << 20
# Bytes of an element of torch's storages whose names begin so, in which pickles give their sizes.
_ITEM_SIZES = {"ComplexDouble": 16, "ComplexFloat": 8, "Double": 8, "Long": 8, "Float": 4, "Int": 4}
_HALVES = ("BFloat16", "Half", "Short")
# Callables that take a size, and make as much of nothing.
_MAKERS = ("bytearray", "bytes", "range", "repeat")


class OutOfProportion(pickle.UnpicklingError):
    """Reading a file would take much more memory than the file has."""


def allowed(size: int) -> int:
    """Bytes that reading a file of `size` bytes may take."""
    return _FACTOR * size + _ALLOWANCE


class _Name(NamedTuple):
    """A callable or class that a pickle names."""

    full: str


class _Reader:
    """A file of which no more can be asked for than is left in it: `read(n)` of others allocates n bytes first."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._size - self._file.tell():
            raise pickle.UnpicklingError("it ends before it should")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline()


def check_pickle(file: BinaryIO, size: int, allowance: int | None = None) -> Iterator[tuple[str, int]]:
    """Count what the pickle that begins at `file`'s position would take, in a file of `size` bytes.

    Yields:
        Of each storage of torch that it refers to the key, and the bytes that it is to have.

    Raises:
        OutOfProportion: more than `allowance` bytes, by default `allowed(size)`.
        UnpicklingError: it is damaged, or calls what makes memory of a number.
    """
    limit = allowed(size) if allowance is None else allowance
    total = 0
    memo: dict[int, Any] = {}
    # The constants since the last mark: a storage is referred to by a tuple of them.
    constants: list[Any] = []
    last: Any = None
    instructions: Any = pickletools.genops(_Reader(file, size))  # type: ignore[arg-type]
    for number, (opcode, argument, _) in enumerate(instructions):
        name = opcode.name
        total += _COSTS.get(name, _REFERENCE)
        if name in ("GET", "BINGET", "LONG_BINGET"):
            last = memo.get(int(argument))
            # A text can be encoded anew each time.
            total += len(last) if isinstance(last, str) else 0
            constants.append(last)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            # The memo is a list as long as its largest index.
            if int(argument) > 2 * number + 1024:
                raise OutOfProportion(f"its memo has an index of {argument}")
            memo[int(argument)] = last
        elif name == "MEMOIZE":
            memo[len(memo)] = last
        elif name == "MARK":
            constants = []
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ") if name == "GLOBAL" else constants[-2:]
            if not all(isinstance(part, str) and len(part) < 256 for part in parts):
                raise pickle.UnpicklingError("a name in it is none")
            full = ".".join(parts)
            if full.rpartition(".")[2] in _MAKERS and full not in ("builtins.bytes", "__builtin__.bytes"):
                raise pickle.UnpicklingError(f"GLOBAL {full} is refused")
            last = _Name(full)
            constants.append(last)
        elif name in ("BINPERSID", "PERSID"):
            if len(constants) >= 5 and isinstance(constants[4], int):
                yield str(constants[2]), constants[4] * _item_size(constants[1])
            last = None
        elif argument is not None:
            last = argument
            constants.append(argument)
            total += _OBJECT + (_text_size(argument) if isinstance(argument, str | bytes | bytearray) else 0)
        elif name != "TUPLE":
            last = None
        if number > _MOST_INSTRUCTIONS:
            raise OutOfProportion(f"its pickle has more than {_MOST_INSTRUCTIONS} instructions")
        if total > limit:
            raise OutOfProportion(f"reading it would take more than {limit >> 20} MB")


def _text_size(text: str | bytes | bytearray) -> int:
    return len(text) if isinstance(text, bytes | bytearray) or text.isascii() else 4 * len(text)


def _item_size(storage: object) -> int:
    kind = storage.full.rpartition(".")[2] if isinstance(storage, _Name) else ""
    if kind.startswith(_HALVES):
        return 2
    return next((size for start, size in _ITEM_SIZES.items() if kind.startswith(start)), 1)


def check_archive(file: BinaryIO) -> None:
    """Check a file of torch, a zip archive: its sizes, its pickle, and the checksum of every record.

    Raises:
        OutOfProportion: what it contains is out of proportion to its size.
        UnpicklingError: a checksum is wrong, or a storage has another size than the pickle gives it.
        zipfile.BadZipFile, ...: it is damaged otherwise.
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > allowed(size):
            raise OutOfProportion(f"its records have more than {allowed(size) >> 20} MB")
        sizes = {record.filename.partition("/data/")[2]: record.file_size for record in records}
        for record in records:
            if record.filename.endswith("/data.pkl"):
                with archive.open(record) as program:
                    for key, wanted in check_pickle(program, record.file_size, allowed(size)):  # type: ignore[arg-type]
                        if sizes.get(key) != wanted:
                            raise pickle.UnpicklingError(f"storage {key} has {sizes.get(key)} bytes, not {wanted}")
        if damaged := archive.testzip():
            raise pickle.UnpicklingError(f"the checksum of {damaged} is wrong")
    file.seek(0)


def check_old_archive(file: BinaryIO) -> None:
    """Check a file in torch's older format: pickles one after another, then the storages. Raises as `check_pickle`."""
    size = os.fstat(file.fileno()).st_size
    total = 0
    # A number, a version, properties of the machine, the content, and the keys of the storages.
    for _ in range(5):
        for _, wanted in check_pickle(file, size):
            total += wanted
    if total > size:
        raise OutOfProportion(f"its storages are to have {total} bytes")
    file.seek(0)


def check_plain_pickle(file: BinaryIO) -> None:
    """Check a pickle without storages. Raises as `check_pickle`."""
    for _ in check_pickle(file, os.fstat(file.fileno()).st_size):
        pass
    file.seek(0)
