"""Files of torch, of today's format and of the older one, and plain pickles: checked, and read without torch's reader.

What is checked is what is read: two readers of archives take different records from one that is made for it.
"""

import io
import pickle
import zipfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdet.weights.limits import allowed, check_list
from fastdet.weights.pickle_contents import examine
from fastdet.weights.tensor_pickles import TensorUnpickler, arrays_to_tensors

_END, _END_64 = b"PK\x05\x06", b"PK\x06\x06"


def read_archive(data: bytes) -> Any:
    """Read a zip archive of records, which are not compressed: a pickle, and the storages that it refers to.

    Raises:
        UnpicklingError: a checksum is wrong, a storage has another size than the pickle gives it, or as `examine`.
        zipfile.BadZipFile, ...: it is damaged otherwise.
    """
    check_list(_directory_bytes(data), "directory")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {record.filename: record for record in archive.infolist()}
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
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


def _directory_bytes(data: bytes) -> int:
    """The length of an archive's directory, as its end gives it; after it is at most a comment."""
    end = data.rfind(_END, max(len(data) - (1 << 16), 0))
    length = int.from_bytes(data[end + 12 : end + 16], "little")
    if length < 0xFFFFFFFF:
        return length
    # An archive of more than 4 GB.
    end = data.rfind(_END_64, max(end - 1024, 0), end)
    return int.from_bytes(data[end + 40 : end + 48], "little")


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
    if type(keys) is not list or sorted(map(str, keys)) != sorted(storages):
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
