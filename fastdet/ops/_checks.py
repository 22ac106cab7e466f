"""What the public operations ask of their arguments before any work, in words that name the argument."""

import math
import numbers

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def boxes(name: str, value: object, ndim: int | None = 2, *, double: bool = False) -> Tensor:
    """`value` as boxes [..., 4] in the dtype of `floats`. `ndim` None takes any rank from 2 up."""
    value = floats(name, value, double=double)
    if value.ndim < 2 or value.shape[-1] != 4 or (ndim is not None and value.ndim != ndim):
        wanted = "[..., N, 4]" if ndim is None else "[" + "N, " * (ndim - 1) + "4]"
        raise ValueError(f"{name} must have the shape {wanted}, got {list(value.shape)}")
    return value


def floats(name: str, value: object, *, double: bool = False) -> Tensor:
    """`value` as an fp32 tensor; fp16 and bf16 are widened, float64 is refused or, with `double`, left as it is."""
    tensor = is_tensor(name, value)
    if double and tensor.dtype == torch.float64:
        return tensor
    if tensor.dtype not in FLOATS:
        allowed = "float32, float16, bfloat16 or float64" if double else "float32, float16 or bfloat16"
        raise TypeError(f"{name} must be {allowed}, got {tensor.dtype}")
    return tensor.float()


def is_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if value.is_nested else value.layout}")
    return value


def shape(name: str, value: object, expected: tuple[int, ...]) -> Tensor:
    tensor = is_tensor(name, value)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have the shape {list(expected)}, got {list(tensor.shape)}")
    return tensor


def booleans(name: str, value: object, expected: tuple[int, ...]) -> Tensor:
    tensor = shape(name, value, expected)
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {tensor.dtype}")
    return tensor


def integers(name: str, value: object, expected: tuple[int, ...]) -> Tensor:
    tensor = shape(name, value, expected)
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {tensor.dtype}")
    return tensor


def same_device(**tensors: Tensor) -> None:
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, but {first_name} is on {first.device}")


def same_dtype(**values: object) -> None:
    """Of the tensors among `values`, before any is widened: two formats compared are a mistake more often than not."""
    dtypes = [(name, value.dtype) for name, value in values.items() if isinstance(value, Tensor)]
    for name, dtype in dtypes[1:]:
        if dtype != dtypes[0][1]:
            raise TypeError(f"{name} is {dtype}, but {dtypes[0][0]} is {dtypes[0][1]}")


def number(name: str, value: object) -> float:
    """A number that is not NaN."""
    found = _real(name, value)
    # Comparisons alone: of a symbol torch.compile can ask no more.
    if not (found <= 0 or found >= 0):
        raise ValueError(f"{name} must not be NaN")
    return found


def threshold(name: str, value: object) -> float:
    """A number in [0, 1]."""
    found = _real(name, value)
    if not 0.0 <= found <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {found}")
    return float(found)


def positive(name: str, value: object) -> float:
    """A finite number above 0."""
    found = _real(name, value)
    if not 0.0 < found < math.inf:
        raise ValueError(f"{name} must be finite and positive, got {found}")
    return found


def _real(name: str, value: object) -> float:
    """A real number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value  # type: ignore[return-value]


def integer(name: str, value: object, least: int | None = None) -> int:
    """An int of 64 bits, not below `least`; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if isinstance(value, numbers.Integral) and not -(2**63) <= value < 2**63:  # type: ignore[operator]
        raise ValueError(f"{name} must fit 64 bits, got {value}")
    return value  # type: ignore[return-value]


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value
