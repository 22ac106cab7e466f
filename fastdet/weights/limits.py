"""What reading a file of tensors would take, counted before it is read: a few bytes can ask for all memory.

An archive of torch is checked by its directory, and by the checksums in it, which torch leaves out; pickles, in it and
others, by `pickle_contents`.
"""

import mmap
import os
import pickle
import zipfile
from typing import BinaryIO

from fastdet.weights.pickle_contents import OutOfProportion, examine

# Reading may take so many times the file's size, and so many bytes more.
_FACTOR, _ALLOWANCE = 4, 64 << 20
# Of safetensors: some 20,000 tensors. A header is several times as large once it is read.
_LONGEST_HEADER = 2 << 20


def allowed(size: int) -> int:
    """Bytes that reading a file of `size` bytes may take."""
    return _FACTOR * size + _ALLOWANCE


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
        sizes = {record.filename: record.file_size for record in records}
        if len(sizes) < len(records) or len({name.partition("/")[0] for name in sizes}) > 1:
            raise pickle.UnpicklingError("two of its records have one name, or they are of two archives")
        for name in sizes:
            if name.endswith("/data.pkl"):
                contents = examine(archive.read(name), allowed(size))
                for key, wanted in contents.storages.items():
                    found = sizes.get(f"{name.removesuffix('.pkl')}/{key}")
                    if found != wanted:
                        raise pickle.UnpicklingError(f"storage {key} has {found} bytes, not {wanted}")
        if damaged := archive.testzip():
            raise pickle.UnpicklingError(f"the checksum of {damaged} is wrong")
    file.seek(0)


def check_old_archive(file: BinaryIO) -> None:
    """Check a file in torch's older format: pickles one after another, then the storages. Raises as `check_pickle`."""
    size = os.fstat(file.fileno()).st_size
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end, cost = 0, 0
        wanted: dict[str, int] = {}
        # A number, a version, properties of the machine, the object, and the keys of the storages.
        for _ in range(5):
            contents = examine(content, allowed(size) - cost, end)
            end, cost = contents.end, cost + contents.cost
            wanted.update(contents.storages)
        keys = contents.value
        # torch fills those that are listed, and leaves others as the memory was.
        if type(keys) is not list or sorted(map(str, keys)) != sorted(wanted):
            raise pickle.UnpicklingError("its list of storages is not that of its object")
        # Each has the number of its elements first.
        if end + sum(8 + wanted[key] for key in keys) != size:
            raise pickle.UnpicklingError(f"its storages do not have the {sum(wanted.values())} bytes that they should")
    file.seek(0)


def check_pickle(file: BinaryIO) -> None:
    """Check a pickle without storages.

    Raises:
        OutOfProportion: what it makes is out of proportion to its size.
        UnpicklingError: it is damaged, or calls what is no part of arrays and plain values.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise pickle.UnpicklingError("it is empty")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        examine(content, allowed(size))


def check_header(length: int) -> None:
    """Check the length of the header of safetensors. Raises OutOfProportion."""
    if length > _LONGEST_HEADER:
        raise OutOfProportion(f"its header has more than {_LONGEST_HEADER >> 20} MB")
