"""Catches kernel launches as they are made and compiles them ahead of time, for devices that need not be present."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](**arguments)` that a launcher requested."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def source(self) -> ASTSource:
        """The same specialization that Triton's launcher would choose: types, constants, divisibility by 16."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            fixed = parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + _TYPES[value.dtype]
                aligned = value.data_ptr() % 16 == 0
            elif isinstance(value, bool):
                signature[parameter.name], aligned = "i1", False
            elif isinstance(value, int):
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = value % 16 == 0 and not fixed
            else:
                signature[parameter.name], aligned = "fp32", False
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)

    def options(self) -> dict[str, Any]:
        names = set(inspect.signature(self.kernel.fn).parameters)
        return {name: value for name, value in self.arguments.items() if name not in names}

    def compile(self, target: str) -> Any:
        return triton.compile(self.source(), target=TARGETS[target], options=self.options())


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collects the launches made inside, without running any."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert not args, f"{self.fn.__name__} is launched by keyword"
        launches.append(Launch(self, tuple(grid), kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """What `call` launches, the same specialization of a kernel once."""
    with record_launches() as launches:
        call()
    return list({(launch.source().hash(), str(launch.options())): launch for launch in launches}.values())
