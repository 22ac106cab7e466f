"""Files of torch, of today's format and of the older one, and plain pickles: checked, and read without torch's reader.

What is checked is what is read: two readers of archives take different records from one that is made for it.
"""

import io
import os
import pickle
import zipfile
import zlib
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastdet.weights.limits import allowed, check_list
from fastdet.weights.pickle_contents import examine
from fastdet.weights.tensor_pickles import TensorUnpickler, arrays_to_tensors

_END, _END_64, _END_64_LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
# The comment at the end of an archive of ours, after its length of two bytes: this and eight digits.
_CHECKSUM, _DIGITS = b"fastdet.crc32=", 8
_COMMENT = (len(_CHECKSUM) + _DIGITS).to_bytes(2, "little") + _CHECKSUM


def save(content: Any, file: BinaryIO) -> None:
    """`torch.save`, with a checksum of the whole file as the archive's comment, which torch's reader ignores.

    Args:
        content: what torch can write.
        file: open and empty; not a pipe.
    """
    summed = _Summed(file)
    torch.save(content, summed)  # type: ignore[arg-type]
    # Its end has the length of the comment, which is 0 so far.
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT + _digits(summed.crc))


class _Summed:
    """What `torch.save` needs of a file, with the CRC-32 of what has been written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc, self.flush = file, 0, file.flush

    def write(self, data: bytes) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return self.file.write(data)


def verify_checksum(data: bytes) -> None:
    """Raises UnpicklingError if a file ends as those of `save`, and one of its bytes is not what was written."""
    end = _comment_start(data)
    if end < len(data) and _digits(zlib.crc32(bytes(2), zlib.crc32(memoryview(data)[: end - 2]))) != data[-_DIGITS:]:
        raise pickle.UnpicklingError("its checksum is wrong")


def _comment_start(data: bytes) -> int:
    """Where the comment of `save` begins; without one, the length."""
    start = len(data) - len(_CHECKSUM) - _DIGITS
    return start if data[-_DIGITS - len(_COMMENT) : -_DIGITS] == _COMMENT else len(data)


def _digits(crc: int) -> bytes:
    return b"%0*x" % (_DIGITS, crc)


def read_archive(data: bytes) -> Any:
    """Read a zip archive of records, which are not compressed: a pickle, and the storages that it refers to.

    Raises:
        UnpicklingError: a checksum is wrong, a storage has another size than the pickle gives it, or as `examine`.
        zipfile.BadZipFile, ...: it is damaged otherwise.
    """
    _check_end(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {record.filename: record for record in archive.infolist()}
        if any(r.compress_type != zipfile.ZIP_STORED or r.compress_size != r.file_size for r in records.values()):
            raise pickle.UnpicklingError("its records are compressed")
        if sum(record.file_size for record in records.values()) > len(data):
            raise pickle.UnpicklingError("its records have more bytes than the file")
        programs = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1 or len(records) < len(archive.infolist()):
            raise pickle.UnpicklingError("it has not one data.pkl, or two records of one name")
        program, folder = programs[0], programs[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in records and archive.read(f"{folder}byteorder") != b"little":
            raise pickle.UnpicklingError("it is big-endian")
        content = archive.read(program)
        for key, storage in examine(content, allowed(len(data))).storages.items():
            record = records.get(f"{folder}data/{key}")
            found = None if record is None else record.file_size
            if found != storage.bytes:
                raise pickle.UnpicklingError(f"storage {key} has {found} bytes, not {storage.bytes}")

        def read_storage(key: str) -> Tensor:
            # Reading verifies the checksum.
            return _to_tensor(archive.read(f"{folder}data/{key}"))

        return arrays_to_tensors(TensorUnpickler(content, read_storage).load())


def _check_end(data: bytes) -> None:
    """Check the end of an archive, which has the length of its directory: the directory is read whole."""
    length = _comment_start(data)
    end = data[max(length - 98, 0) : length]
    if end[-22:-18] != _END or (length == len(data) and end[-2:] != bytes(2)):
        raise pickle.UnpicklingError("its end is missing, or has a comment")
    check_list(int.from_bytes(end[-10:-6], "little") % 0xFFFFFFFF, "directory")
    # Of an archive of more than 4 GB its length is in a record before that, to which another points.
    if end[-42:-38] == _END_64_LOCATOR:
        if int.from_bytes(end[-34:-26], "little") != length - 98 or end[-98:-94] != _END_64:
            raise pickle.UnpicklingError("its end is not where it should be")
        check_list(int.from_bytes(end[-58:-50], "little"), "directory")


def read_old_archive(data: bytes) -> Any:
    """Read a file in torch's older format: pickles one after another, then the storages. Raises as `examine`."""
    pieces, end, cost = [], 0, 0
    # A number, a version, properties of the machine, the object, and the keys of the storages.
    for _ in range(5):
        contents = examine(data, allowed(len(data)) - cost, end)
        pieces.append((data[end : contents.end], contents.storages))
        end, cost = contents.end, cost + contents.cost
    properties = TensorUnpickler(pieces[2][0]).load()
    if isinstance(properties, dict) and not properties.get("little_endian", True):
        raise pickle.UnpicklingError("it is big-endian")
    (program, storages), keys = pieces[3], contents.value
    # A storage that is not listed would have no values.
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise pickle.UnpicklingError("its list of storages is not that of its object")
    places = {}
    for key in keys:
        # The number of its elements comes first.
        start, storage = end + 8, storages[key]
        end = start + storage.bytes
        if end > len(data) or int.from_bytes(data[start - 8 : start], "little") != storage.elements:
            raise pickle.UnpicklingError(f"storage {key} does not have the {storage.bytes} bytes that it should")
        places[key] = slice(start, end)
    return arrays_to_tensors(TensorUnpickler(program, lambda key: _to_tensor(data[places[key]])).load())


def read_pickle(data: bytes) -> Any:
    """Read a pickle without storages. Raises as `examine`."""
    examine(data, allowed(len(data)))
    return arrays_to_tensors(TensorUnpickler(data).load())


def _to_tensor(content: bytes) -> Tensor:
    tensor = torch.empty(len(content), dtype=torch.uint8, device="cpu")
    tensor.numpy()[:] = np.frombuffer(content, np.uint8)
    return tensor
