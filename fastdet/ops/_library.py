"""Registration of an operation with torch."""

from collections.abc import Callable
from typing import Any

import torch


def define(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
) -> None:
    """Register `torch.ops.fastdet.<name>` from `schema` ("name(arguments) -> results").

    `cuda` launches the Triton kernel, on the device of its first argument, not on the current one. `fake` gives
    shapes, dtypes and strides to tracing. Without `autograd` the results carry no gradient.
    """
    name, signature = schema.split("(", 1)
    qualified = f"fastdet::{name}"

    def cuda_on_device(first: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(first):
            return cuda(first, *args)

    torch.library.define(qualified, f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CPU")(cpu)
    torch.library.impl(qualified, "CUDA")(cuda_on_device)
    torch.library.register_fake(qualified)(fake)
    if autograd is not None:
        torch.library.impl(qualified, "Autograd")(autograd)


def call_below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """`op(*args)` by the implementation of the device, which records no gradient."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
