"""Pickles of tensors and arrays, read without the constructors of torch and NumPy: they can name nothing but the
stand-ins below."""

import operator
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# An object that several contain is counted for each, and so many characters of a text as one.
_MOST_OBJECTS, _CHARACTERS = 1 << 20, 16
NAMESPACE = "argparse.Namespace"
# The storages of torch, which pickles refer to, and what they are made of.
STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.storage.UntypedStorage": torch.uint8,
}
# Those of dense tensors; of others torch has no arithmetic.
_DTYPES = {
    *STORAGES.values(),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
}


class TensorUnpickler(pickle.Unpickler):
    """Reads plain values, arrays of NumPy and tensors, for `arrays_to_tensors` to convert. Other names raise
    UnpicklingError.

    Args:
        program: a pickle that `pickle_contents.examine` has let through.
        read_storage: the bytes, uint8 [N], of the storage that has a key.
    """

    def __init__(self, program: bytes, read_storage: Callable[[str], Tensor] | None = None) -> None:
        # Written by Python 2, the bytes of an array are a string.
        super().__init__(BytesIO(program), encoding="latin1")
        self._read_storage, self._storages = read_storage, dict[str, Tensor]()

    def find_class(self, module: str, name: str) -> Any:
        full_name = full(module, name)
        if full_name == NAMESPACE:
            return _Namespace
        if full_name in STAND_INS:
            return _Callable(STAND_INS[full_name])
        if full_name in STORAGES:
            return STORAGES[full_name]
        if (dtype := dtype_of(full_name)) is not None:
            return dtype
        raise pickle.UnpicklingError(f"GLOBAL {full_name} is refused")

    def persistent_load(self, reference: Any) -> Tensor:
        """The elements of a storage, by ("storage", dtype, key, ...)."""
        if self._read_storage is None:
            raise pickle.UnpicklingError("a storage of torch in a plain pickle")
        _, dtype, key, *_ = reference
        if key not in self._storages:
            self._storages[key] = self._read_storage(key).view(dtype)
        storage = self._storages[key]
        if storage.dtype != dtype:
            raise pickle.UnpicklingError("a storage is referred to as two different ones")
        return storage


def full(module: str, name: str) -> str:
    """The full name of what a pickle names; of Python 2's builtins their later one."""
    return f"{'builtins' if module == '__builtin__' else module}.{name}"


def dtype_of(full_name: str) -> torch.dtype | None:
    """The dtype of torch that has this name, if it is one of dense tensors."""
    found = getattr(torch, full_name.removeprefix("torch."), None) if full_name.startswith("torch.") else None
    return found if isinstance(found, torch.dtype) and found in _DTYPES else None


class _Callable:
    """What a pickle may call but not change: a state that it gives to a class or function would outlive the reading."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state is given to something that has none")


class _Dict(dict[Any, Any]):
    """Stands in for OrderedDict. Attributes, in which a state dict has its modules' versions, are dropped: they could
    hide methods."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Namespace(dict[str, Any]):
    """Stands in for the options that a script has parsed, which torchvision's write beside the weights."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        self.update(state)


class _Counter(Counter[Any]):
    """Stands in for Counter, likewise."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """Stands in for numpy.dtype: numbers and booleans alone, no objects, records or strings."""

    __slots__ = ("_code", "_order")

    def __init__(self, code: str, *flags: Any) -> None:
        if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code:.20}) is refused")
        self._code = code
        self._order: Any = "="

    def __setstate__(self, state: Sequence[Any]) -> None:
        self._order = state[1]

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self._code).newbyteorder(self._order)


class _Array:
    """Stands in for numpy.ndarray: becomes a tensor once its state is known."""

    __slots__ = ("tensor",)

    def __init__(self, *description: Any) -> None:
        self.tensor: Tensor | None = None

    def __setstate__(self, state: Sequence[Any]) -> None:
        shape, dtype, fortran, data = state[-4:]
        self.tensor = _make_tensor(data, dtype, shape, "F" if fortran else "C")


def _make_tensor(data: bytes | str, dtype: _Dtype, shape: Iterable[int], order: Any) -> Tensor:
    content, sizes = data.encode("latin1") if isinstance(data, str) else data, tuple(shape)
    if any(size < 0 for size in sizes):
        raise pickle.UnpicklingError("an array with a size below 0")
    array = np.frombuffer(content, dtype.numpy()).reshape(sizes, order=order)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _make_array(data: bytes, dtype: _Dtype, shape: Iterable[int], order: str, axes: Any = None) -> _Array:
    array, tensor = _Array(), _make_tensor(data, dtype, shape, "C" if order == "K" else order)
    array.tensor = tensor if axes is None else tensor.permute(tuple(axes)).contiguous()
    return array


def _make_scalar(dtype: _Dtype, data: bytes | str) -> float | int | bool:
    return _make_tensor(data, dtype, (), "C").item()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stands in for _codecs.encode, with which pickles of an old protocol make bytes, always in this encoding."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"GLOBAL _codecs.encode to {encoding!r} is refused")
    return text.encode("latin1")


def _view(storage: Tensor, offset: int, sizes: Sequence[int], strides: Sequence[int], *_: Any) -> Tensor:
    """Stands in for torch's functions that rebuild a tensor: a part of a storage. Hooks and attributes are dropped."""
    tensor = storage.as_strided(tuple(sizes), tuple(strides), offset)
    reach = 0
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1 and stride <= reach:
            # Several elements in one place could not be written to.
            return tensor.clone(memory_format=torch.contiguous_format)
        reach += (size - 1) * stride if size > 1 else 0
    return tensor


def _view_as(
    storage: Tensor, offset: int, sizes: Sequence[int], strides: Sequence[int], _: Any, __: Any, dtype: Any, *___: Any
) -> Tensor:
    return _view(storage.view(dtype), offset, sizes, strides)


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _subclass(rebuild: Callable[..., Tensor], _: Any, arguments: Sequence[Any], __: Any) -> Tensor:
    return rebuild(*arguments)


def _not_called(*_: Any) -> None:
    raise pickle.UnpicklingError("a class is called that stands only for itself")


# What a file names -> what it gets.
STAND_INS: dict[str, Any] = {
    "collections.OrderedDict": _Dict,
    "collections.Counter": _Counter,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_as,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter"), _not_called),
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
    # Pickles of an old protocol call the class for empty bytes.
    "builtins.bytes": lambda: b"",
    # NumPy 2 renamed `core`.
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _make_scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _make_array for core in ("core", "_core")},
}


def arrays_to_tensors(value: Any) -> Any:
    """What an unpickler gave, with its arrays as tensors; dicts and lists are changed in place.

    Each object is converted once, however many others contain it. Raises UnpicklingError where they are nested deeper
    than Python calls functions, contain themselves, or contain others so often that to go through them takes seconds.
    """
    try:
        return _convert(value, {}).value
    except RecursionError:
        raise pickle.UnpicklingError("its objects are nested too deep") from None


class _Converted(NamedTuple):
    value: Any
    # Of objects in it, each counted as often as it is contained.
    objects: int


def _convert(value: Any, done: dict[int, _Converted | None]) -> _Converted:
    """`done`: what became of the objects that contain others, by their identity; None while it is being found."""
    if isinstance(value, _Array):
        if value.tensor is None:
            raise pickle.UnpicklingError("an array without content")
        return _Converted(value.tensor, 1)
    if isinstance(value, (_Callable, _Dtype)):
        raise pickle.UnpicklingError("GLOBAL of NumPy that is no array is refused")
    if isinstance(value, str | bytes | bytearray):
        return _Converted(value, 1 + len(value) // _CHARACTERS)
    if not isinstance(value, dict | list | tuple):
        return _Converted(value, 1)
    if id(value) in done:
        found = done[id(value)]
        if found is None:
            raise pickle.UnpicklingError("one of its objects contains itself")
        return found
    identity = id(value)
    done[identity] = None
    parts = [_convert(item, done) for item in (value.values() if isinstance(value, dict) else value)]
    items, count = [part.value for part in parts], 1 + sum(part.objects for part in parts)
    if count > _MOST_OBJECTS:
        raise pickle.UnpicklingError(f"it contains more than {_MOST_OBJECTS} objects")
    if isinstance(value, dict):
        for key, item in zip(value, items, strict=True):
            value[key] = item
        value = {_Dict: dict, _Namespace: dict, _Counter: Counter}.get(type(value), lambda same: same)(value)
    elif isinstance(value, list):
        value[:] = items
    elif not all(map(operator.is_, items, value)):
        value = tuple(items)
    done[identity] = converted = _Converted(value, count)
    return converted
