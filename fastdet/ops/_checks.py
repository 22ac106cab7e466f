"""Argument checks of the public operations: each returns the value or raises an error that names it."""

import math
import numbers
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling

# What `torch.jit.is_tracing` calls, which takes three times as long.
_tracing_state = torch._C._get_tracing_state

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def tensor(name: str, value: object, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A dense tensor, of `shape` and `dtype` where they are given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        kind = "a nested one" if value.is_nested else value.dtype if value.is_quantized else value.layout
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {value.dtype}")
    return value


def floats(name: str, value: object, *, double: bool = False, whole: bool = False) -> Tensor:
    """An fp32 tensor; fp16, bf16 and, with `whole`, whole numbers are converted; float64 is refused or, with `double`,
    left as it is."""
    found = tensor(name, value)
    if double and found.dtype == torch.float64:
        return found
    if found.dtype not in FLOATS and not (whole and found.dtype in INTEGERS):
        allowed = ["float32", "float16", "bfloat16", *["float64"] * double, *["uint8", "a signed integer"] * whole]
        raise TypeError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {found.dtype}")
    return found.float()


def boxes(name: str, value: object, ndim: int | None = 2, *, double: bool = False, whole: bool = False) -> Tensor:
    """Boxes [..., 4] in the dtype of `floats`; with `whole` whole numbers too. `ndim` None takes any rank from 2 up."""
    found = floats(name, value, double=double, whole=whole)
    if found.ndim < 2 or found.shape[-1] != 4 or (ndim is not None and found.ndim != ndim):
        expected = "[..., N, 4]" if ndim is None else "[" + "N, " * (ndim - 1) + "4]"
        raise ValueError(f"{name} must have the shape {expected}, got {list(found.shape)}")
    return found


def is_recorded(value: Tensor) -> bool:
    """Whether a program is recorded, or transformed, from what is done with `value`: its values can't decide then."""
    return is_recording() or isinstance(value, FakeTensor)


def is_recording() -> bool:
    """`is_recorded` of plain tensors."""
    active = is_compiling() or _tracing_state() is not None or torch._C._are_functorch_transforms_active()
    return active or torch._C._len_torch_dispatch_stack() > 0


def same_device(**tensors: Tensor | None) -> None:
    """Of those that are not None."""
    first_name, device = "", None
    for name, value in tensors.items():
        if value is None:
            continue
        if device is None:
            first_name, device = name, value.device
        elif value.device != device:
            raise ValueError(f"{name} is on {value.device}, but {first_name} is on {device}")


def group_arrays(boxes: Tensor, scores: Tensor, idxs: Tensor) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None:
    """Boxes fp32 [N, 4], scores [N] and groups [N] as arrays that share their memory; None if they are no such ones."""
    try:
        arrays = boxes.numpy(), scores.numpy(), idxs.numpy()
    # On other devices, in other layouts, with a gradient.
    except (RuntimeError, TypeError):
        return None
    count = idxs.numel()
    fits = (arrays[0].shape, arrays[1].shape, arrays[2].shape) == ((count, 4), (count,), (count,))
    return arrays if fits and scores.dtype is torch.float32 and idxs.dtype is torch.int64 else None


def number(name: str, value: object) -> float:
    """A number that is not NaN."""
    found = _real(name, value)
    # Comparisons alone: torch.compile supports no other test of a symbolic number.
    if not (found <= 0 or found >= 0):
        raise ValueError(f"{name} must not be NaN")
    return found


def fp32(name: str, value: object) -> float:
    """A number that is not NaN, and infinite or such as fp32 holds."""
    found = number(name, value)
    if not _is_fp32(found) and abs(found) < math.inf:
        raise ValueError(f"{name} must be a number that fp32 holds, got {found}")
    return float(found)


def threshold(name: str, value: object) -> float:
    """A number in [0, 1]."""
    found = _real(name, value)
    if not 0.0 <= found <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {found}")
    return float(found)


def positive(name: str, value: object) -> float:
    """A number above 0 that fp32 holds."""
    found = _real(name, value)
    if not (found > 0.0 and _is_fp32(found)):
        raise ValueError(f"{name} must be finite in fp32 and positive, got {found}")
    return found


def integer(name: str, value: object, least: int = -(2**31), most: int = 2**31 - 1) -> int:
    """An int from `least` to `most`, by default what 32 bits hold, as counts do in the kernels; and no bool."""
    # The first test is for speed: those of an abstract class take a microsecond.
    if type(value) is not int:
        value = _unpack(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
            raise TypeError(f"{name} must be an int, got {_described(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {_shown(value)}")
    # Of a symbolic number the graph would have to check it.
    if not isinstance(value, torch.SymInt) and value > most:  # type: ignore[operator]
        raise ValueError(f"{name} must be at most {most}, got {_shown(value)}")
    return value  # type: ignore[return-value]


def flag(name: str, value: object) -> bool:
    """A bool, also NumPy's, or 0 or 1."""
    if type(value) is not bool:
        value = _unpack(value)
        if not isinstance(value, bool | np.bool_ | int) or value not in (0, 1):
            raise TypeError(f"{name} must be a bool, got {_described(value)}")
    return bool(value)


def _real(name: str, value: object) -> float:
    """A real number that a float can hold, and no bool."""
    if type(value) is not float:
        value = _unpack(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymFloat | torch.SymInt):
            raise TypeError(f"{name} must be a number, got {_described(value)}")
        if type(value) is int and abs(value) > 1e308:
            raise ValueError(f"{name} must be a number that a float holds, got {_shown(value)}")
    return value  # type: ignore[return-value]


def _is_fp32(value: float) -> bool:
    """Whether it is finite there too. The largest is written out: a variable would be an input of compiled code."""
    return abs(value) <= 3.4028234663852886e38


def _unpack(value: object) -> object:
    """The number in a tensor without dimensions, which torch's operators take for one too."""
    has_value = isinstance(value, Tensor) and value.ndim == 0 and not (value.is_meta or is_recorded(value))
    return value.item() if has_value else value  # type: ignore[attr-defined]


def _described(value: object) -> str:
    """It as written; of a tensor its shape, as compiled code has no more of it."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"a tensor of the shape {list(value.shape)}" if value.ndim else "a tensor whose value is not known"


def _shown(value: object) -> str:
    """Of a whole number its digits, unless they would fill the screen."""
    return f"{value}" if abs(value) < 2**64 else f"one of {int(value).bit_length()} bits"  # type: ignore
