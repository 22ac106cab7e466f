"""Tensors larger than memory, and the few programs of a launch over them that a test can wait for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def sparse_zeros(
    folder: Path, *shape: int, dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Zeros that take memory only where they are written: they lie in a sparse file, which has no name left."""
    path = folder / "zeros"
    size = torch.Size(shape).numel()
    values = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    path.unlink()
    strides = torch.empty(shape, device="meta", memory_format=layout).stride()
    return values.as_strided(shape, strides)


@contextmanager
def only_programs(chosen: dict[str, Sequence[int]]) -> Iterator[None]:
    """Where Triton interprets, run of each kernel named in `chosen` these programs alone, by axis 0 of its grid; a
    negative index counts from the end, as in a list."""
    from triton.runtime import interpreter

    builder, launch = interpreter.interpreter_builder, interpreter.GridExecutor.__call__

    def launch_chosen(executor: Any, *args: Any, **kwargs: Any) -> None:
        size = (*executor.grid, 1, 1)[:3]
        indices = [range(size[0])[index] for index in chosen.get(executor.fn.__name__, range(size[0]))]
        executor.grid = (len(indices), *size[1:])

        def set_index(x: int, y: int, z: int) -> None:
            builder.grid_dim, builder.grid_idx = size, (indices[x], y, z)

        with mock.patch.object(builder, "set_grid_idx", set_index):
            launch(executor, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", launch_chosen):
        yield
