"""What a pickle of tensors, arrays and plain values may call, with the bytes that each call takes.

The functions here get and give stand-ins: nothing is called. They raise UnpicklingError where a call is refused, and an
error of Python's where it does not have the arguments that it needs.
"""

import math
import pickle
from types import NoneType
from typing import Any, NamedTuple

from fastdet.weights.pickle_instructions import Data
from fastdet.weights.tensor_pickles import NAMESPACE, STAND_INS, STORAGES, dtype_of, full

_VIEWS = tuple(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3"))
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_PAIRS = "collections.OrderedDict"
_CONTAINERS = (_PAIRS, NAMESPACE, "collections.Counter", "builtins.set", "builtins.frozenset")
# Of a reference, and of an entry of a dict or a set.
REFERENCE, _ENTRY = 8, 168
_MOST_DIMENSIONS = 64
_LARGEST_KEY = 1 << 31


class Name(NamedTuple):
    """Stands in for a callable or class."""

    full: str


class Made(NamedTuple):
    """Stands in for what a call gives."""

    by: str


class Storage(NamedTuple):
    """Stands in for a storage of torch."""

    kind: str
    elements: int

    @property
    def bytes(self) -> int:
        return self.elements * _item_size(self.kind)


class Entries:
    """Stands in for a dict or a set: the number of its entries."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, keys: list[Any]) -> int:
        """Add entries; the bytes of them."""
        for key in keys:
            _check_key(key)
        self.count += len(keys)
        return _ENTRY * len(keys)


def name(module: Any, attribute: Any) -> Name:
    if type(module) is not str or type(attribute) is not str:
        raise pickle.UnpicklingError("a name in it is none")
    return Name(full(module, attribute))


def storage(word: Any, kind: Any, key: Any, location: Any, count: Any, view: Any = None) -> tuple[str, Storage]:
    """The key of a storage of `count` elements, and the storage. `view`: of which other one older versions made it."""
    if word != "storage" or type(key) is not str or type(location) is not str or type(count) is not int:
        raise TypeError
    if count < 0 or view is not None:
        raise ValueError
    return key, Storage(kind.full, count)


def call(function: Any, arguments: Any) -> tuple[Any, int]:
    """What a call gives, and the bytes that it takes."""
    if type(function) is not Name or type(arguments) is not tuple:
        raise TypeError
    called = function.full
    if called not in (NAMESPACE, *STAND_INS):
        raise pickle.UnpicklingError(f"GLOBAL {called} is refused")
    # Each call can make its arguments anew.
    cost = sum(map(copied_bytes, arguments))
    if called in _VIEWS:
        cost += _view_bytes(called, *arguments)
    elif called in _CONTAINERS:
        made = Entries()
        return made, cost + sum(_fill(made, called, items) for items in arguments)
    elif called == _PARAMETER:
        # Of what is given, its cost is known by its kind: it is a tensor.
        if type(arguments[0]) is not Made or arguments[0].by not in _VIEWS:
            raise TypeError
    elif called == _SUBCLASS:
        inner, _, inner_arguments, _ = arguments
        if inner.full not in (*_VIEWS, _PARAMETER):
            raise pickle.UnpicklingError(f"GLOBAL {inner.full} is refused")
        return call(inner, inner_arguments)
    elif called == "torch.Size":
        (sizes,) = arguments
        _count_elements(sizes)
        return tuple(sizes), cost
    elif called == "_codecs.encode":
        # How bytes are written in protocols that have none. Other encodings take time, or make more.
        text, encoding = arguments
        if encoding != "latin1":
            raise pickle.UnpicklingError("GLOBAL _codecs.encode to another encoding than latin1 is refused")
        return Data(copied_bytes(text)), cost
    elif called == "numpy.dtype" and type(arguments[0]) is not str:
        raise TypeError
    elif called.endswith("_frombuffer"):
        _count_elements(arguments[2])
    return Made(called), cost


def build(made: Any, state: Any) -> int:
    """The bytes of giving something its state.

    Arrays, their dtypes and ordered dicts get one. That of a tensor could have any size, and is refused.
    """
    if type(made) is Entries and type(state) is Entries:
        return _ENTRY * state.count
    if type(made) is not Made or type(state) is not tuple:
        raise TypeError
    if made.by.endswith(("_reconstruct", ".ndarray")):
        _count_elements(state[-4])
    elif made.by != "numpy.dtype":
        raise TypeError
    return sum(map(copied_bytes, state))


def copied_bytes(value: Any) -> int:
    """Of what is copied where it is used."""
    if type(value) is Data:
        return value.size
    if type(value) in (list, tuple):
        return REFERENCE * len(value)
    return len(value) if type(value) is str else 0


def _fill(made: Entries, called: str, items: Any) -> int:
    if type(items) is Entries:
        made.count += items.count
        return _ENTRY * items.count
    if type(items) not in (list, tuple):
        raise TypeError
    if called != _PAIRS:
        return made.add(list(items))
    # How Python 2 wrote the content of an OrderedDict.
    if not all(type(pair) in (list, tuple) for pair in items):
        raise TypeError
    return made.add([pair[0] for pair in items])


def _check_key(key: Any) -> None:
    """Refuse what takes long to hash, or can be made to have the hash of others: long numbers, fractions, tuples."""
    if type(key) not in (str, int, bool, NoneType) or (type(key) is int and abs(key) > _LARGEST_KEY):
        raise pickle.UnpicklingError("a key in it is neither a short text nor a small whole number")


def _view_bytes(
    called: str, storage: Any, offset: Any, sizes: Any, strides: Any, _: Any = False, __: Any = None, *more: Any
) -> int:
    """The bytes of a tensor. Its elements can be more than those of the storage: several in one place."""
    dtype = more[0].full if called.endswith("v3") else storage.kind
    elements = _count_elements(sizes)
    _count_elements(strides)
    reach = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
    if type(offset) is not int or offset < 0 or (elements and reach * _item_size(dtype) > storage.bytes):
        raise pickle.UnpicklingError("a tensor in it reaches beyond its storage")
    return elements * _item_size(dtype)


def _count_elements(sizes: Any) -> int:
    if type(sizes) not in (tuple, list):
        raise TypeError
    if len(sizes) > _MOST_DIMENSIONS or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError
    return math.prod(sizes)


def _item_size(kind: str) -> int:
    """Of a storage or a dtype of torch."""
    dtype = STORAGES.get(kind) or dtype_of(kind)
    if dtype is None:
        raise pickle.UnpicklingError(f"GLOBAL {kind} is refused")
    return dtype.itemsize
