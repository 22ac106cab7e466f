"""Host syncs with a GPU, detected on the CPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.costs import DATA_DEPENDENT


class RefuseHostSync(TorchDispatchMode):
    """Raises where an operator would be a host sync."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in DATA_DEPENDENT:
            raise AssertionError(f"{func} is a host sync")
        if name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise AssertionError(f"{func} with a boolean mask gives a shape that depends on data")
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_", "lift_fresh"):
            source = args[1] if name == "copy_" else args[0]
            if isinstance(result, torch.Tensor) and result.device != source.device:
                raise AssertionError(f"{func} copies from {source.device} to {result.device}")
        return result
