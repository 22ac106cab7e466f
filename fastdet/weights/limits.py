"""What reading a file of tensors may take: a few bytes can ask for all memory."""

import pickle

# So many times the file's size, and so many bytes more.
_FACTOR, _ALLOWANCE = 4, 64 << 20
# The header of safetensors, and the directory of an archive: of some 20,000 tensors.
_LONGEST_LIST = 2 << 20


class OutOfProportion(pickle.UnpicklingError):
    """Reading a file would take much more memory than the file has."""


def allowed(size: int) -> int:
    """Bytes that reading a file of `size` bytes may take."""
    return _FACTOR * size + _ALLOWANCE


def check_list(length: int, what: str) -> None:
    """Check the length of a list of tensors, which takes several times as much once it is read.

    Raises:
        OutOfProportion: naming it as `what`.
    """
    if length > _LONGEST_LIST:
        raise OutOfProportion(f"its {what} has more than {_LONGEST_LIST >> 20} MB")
