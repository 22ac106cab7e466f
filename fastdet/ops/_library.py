"""Registration of an operation with torch."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

_Function = TypeVar("_Function", bound=Callable[..., Any])


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
    shapes, dtypes and strides to tracing. Without `autograd` the results carry no gradient. Under `torch.vmap` the
    operation runs once for each entry.
    """
    name, signature = schema.split("(", 1)
    qualified = f"fastdet::{name}"

    def cuda_on_device(first: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(first):
            return cuda(first, *args)

    torch.library.define(qualified, f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CPU")(_as_implementation(cpu))
    torch.library.impl(qualified, "CUDA")(_as_implementation(cuda_on_device))
    torch.library.register_fake(qualified)(fake)
    op = getattr(torch.ops.fastdet, name).default
    torch.library.register_vmap(qualified, lambda info, in_dims, *args: _call_for_each(op, info, in_dims, args))
    if autograd is not None:
        torch.library.impl(qualified, "Autograd")(autograd)


def define_batched(schema: str, composite: Callable[..., Any], name: str, batched: Callable[..., Any]) -> None:
    """Register `composite`, made of other operations, as that of `schema`; and `batched`, which calls it, as operation
    `name` of the batched tensors of `torch.autograd.grad(is_grads_batched=True)`."""
    name_of_composite, signature = schema.split("(", 1)
    torch.library.define(f"fastdet::{name_of_composite}", f"({signature}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"fastdet::{name_of_composite}", "CompositeImplicitAutograd")(composite)
    torch.library.impl(f"fastdet::{name}", "Batched")(batched)


def _as_implementation(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` without gradients, which torch leaves on where none are registered; called between two graphs of
    torch.compile, it is not compiled too."""

    def call(*args: Any) -> Any:
        return function(*[arg.detach() if isinstance(arg, torch.Tensor) and arg.requires_grad else arg for arg in args])

    return torch.compiler.disable(call)


def call_below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """`op(*args)` by the implementation of the device, which records no gradient."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def call_in_forward(op: Callable[..., Any], *args: Any) -> Any:
    """`call_below_autograd` for the forward of a function, which has switched derivatives off: on again,
    for the levels of `torch.func`'s transforms that are still to come."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return call_below_autograd(op, *args)


def overridable(function: _Function) -> _Function:
    """A public function that arguments with `__torch_function__` take over, such as the proxies of `torch.fx`; but for
    subclasses of Tensor, which do so at the calls inside, as in torchvision: two kinds of them may come together."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if proxies := find_proxies([*args, *kwargs.values()]):
            return handle_torch_function(call, proxies, *args, **kwargs)
        return function(*args, **kwargs)

    return uncompiled(cast(_Function, call))


def uncompiled(function: _Function) -> _Function:
    """A public function that TorchScript can't compile: a scripted function that calls it calls it in Python."""
    way_out = f"script a function that calls {function.__name__}, with all arguments given"
    vars(function).update(__script_unsupported=f"fastdet's operations run in Python: {way_out}")
    return cast(_Function, torch.jit.ignore(function))


def find_proxies(values: Iterable[Any]) -> list[Any]:
    """Those of `values`, and of lists among them, that have `__torch_function__` and are no tensors."""
    every = [*values]
    for value in every[:]:
        if type(value) in (list, tuple):
            every += value
    if not has_torch_function(every):
        return []
    return [value for value in every if has_torch_function((value,)) and not isinstance(value, torch.Tensor)]


def needs_derivative(*tensors: torch.Tensor) -> bool:
    """Whether a gradient of one of them is recorded, or a forward-mode derivative may be carried by them."""
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    # Compiled code enters a level without a word to `forward_ad`, and so only in the transforms of `torch.func`.
    return recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def apply_function(function: Any, *args: Any) -> Any:
    """`function.apply` within an implementation at the autograd key, where the transforms of `torch.func` have called
    it for one of their levels, with tensors of that level. (`autograd.Function` would start again with all levels.)"""
    with enable_single_level_autograd_function():
        return function.apply(*args)


def _call_for_each(op: Callable[..., Any], info: Any, in_dims: Any, args: Any) -> tuple[Any, Any]:
    """The rule of `torch.vmap`: `op` called with each entry of `args` along `in_dims`; results stacked, and their dims.

    `in_dims` has the structure of `args`, and None for what has no entries. Of no entries at all the shapes of the
    results are those of one, of zeros.
    """
    values, structure = pytree.tree_flatten(args)
    dims = pytree.tree_leaves(in_dims, is_leaf=lambda dim: dim is None)
    if not info.batch_size:
        # Sums over nothing: zeros, to which a derivative has its way.
        values = [v if dim is None else v.sum(dim, True, dtype=v.dtype) for v, dim in zip(values, dims, strict=True)]
    results = []
    for entry in range(max(info.batch_size, 1)):
        chosen = [v if dim is None else v.select(dim, entry) for v, dim in zip(values, dims, strict=True)]
        results.append(op(*pytree.tree_unflatten(chosen, structure)))
    first = results[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(results)[: info.batch_size], 0
    stacked = [torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True)]
    return type(first)(stacked), type(first)([0] * len(stacked))
