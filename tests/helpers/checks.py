"""Boxes that are awkward on purpose, tolerances, and the checks every operation goes through."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# One table of tolerances for floats, (relative, absolute). Indices are always compared exactly.
TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (8e-3, 8e-3),
}


def assert_close(
    actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, atol: float | None = None
) -> None:
    """Equal up to the tolerances of a dtype, or another absolute one."""
    rtol, usual = TOLERANCE[dtype]
    atol = usual if atol is None else atol
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False, equal_nan=True)


def random_boxes(*shape: int, side: float = 100.0, generator: torch.Generator | None = None) -> Tensor:
    """Well-formed boxes [*shape, 4] inside a square of `side` pixels."""
    corner = torch.rand(*shape, 2, generator=generator) * side * 0.7
    extent = torch.rand(*shape, 2, generator=generator) * side * 0.3
    return torch.cat([corner, corner + extent], dim=-1)


def awkward_boxes() -> Tensor:
    """Boxes [11, 4] that break naive code: identical, nested, touching, degenerate, inverted, NaN, infinite."""
    nan, inf = float("nan"), float("inf")
    return torch.tensor(
        [
            [0, 0, 10, 10],
            [0, 0, 10, 10],
            [2, 2, 4, 4],
            [10, 0, 20, 10],
            [5, 5, 5, 9],
            [5, 5, 5, 5],
            [9, 9, 3, 3],
            [nan, 0, 10, 10],
            [0, 0, inf, inf],
            [-inf, -inf, inf, inf],
            [-5, -5, 5, 5],
        ],
        dtype=torch.float32,
    )


def check_registration(op: Any, *args: Any) -> None:
    """torch's own checks of schema, fake and dispatch, with inputs as they are and with such that require gradients."""
    torch.library.opcheck(op.default, args)
    leaves = [
        arg.detach().requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args
    ]
    # The last one adds up all results, and fails where a whole number comes before a fraction.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.default, tuple(leaves), test_utils=utilities)


def check_operator(op: Any, *args: Any) -> None:
    """torch's own checks of schema, fake and dispatch, and one graph with dynamic shapes."""
    check_registration(op, *args)
    torch._dynamo.reset()

    def call(*tensors: Any) -> Any:
        return op(*tensors)

    compiled: Callable[..., Any] = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), op(*args), equal_nan=True)
