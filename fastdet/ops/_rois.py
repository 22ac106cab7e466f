"""What the operations on regions of interest share: argument checks, rows of boxes, outputs and threads."""

import functools
import numbers
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastdet.ops import _checks
from fastdet.ops._library import call_below_autograd


def widen(tensor: Tensor) -> Tensor:
    """In the dtype of the computation: float64 stays, the rest becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def empty(
    like: Tensor, shape: Sequence[int], layout: torch.memory_format | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """An unwritten [N, C, H, W]. `layout` None: that of the results of the device, on a GPU channels last."""
    if layout is None:
        layout = torch.channels_last if like.device.type == "cuda" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def check_features(value: object, name: str = "input") -> Tensor:
    """Features [B, C, H, W] of a dtype that can be pooled."""
    tensor = _checks.tensor(name, value)
    if tensor.ndim != 4:
        raise ValueError(f"{name} must have the shape [B, C, H, W], got {list(tensor.shape)}")
    if tensor.dtype == torch.float64:
        if tensor.device.type == "cuda":
            raise TypeError(f"{name} must be float32, float16 or bfloat16 on a GPU, got torch.float64")
    elif tensor.dtype not in _checks.FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    return tensor


def check_output_size(value: object) -> tuple[int, int]:
    """(height, width) of one positive int or two."""
    sizes = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(sizes, tuple | list):
        raise TypeError(f"output_size must be an int or a pair of them, got {value!r}")
    if len(sizes) != 2:
        raise ValueError(f"output_size must be one number or (height, width), got {value}")
    height, width = (_checks.integer("output_size", size, least=1) for size in sizes)
    return height, width


def _check_boxes(name: str, value: object, shape: tuple[str, ...], input: Tensor, input_name: str) -> Tensor:
    """Boxes in the dtype of the computation, of the rank and the last dimension of `shape`."""
    tensor = _checks.floats(name, value, double=True)
    tensor = tensor.double() if input.dtype == torch.float64 else tensor.float()
    if tensor.ndim != len(shape) or tensor.shape[-1] != int(shape[-1]):
        raise ValueError(f"{name} must have the shape [{', '.join(shape)}], got {list(tensor.shape)}")
    _checks.same_device(**{input_name: input, name: tensor})
    return tensor


def check_rois(boxes: object, input: Tensor, input_name: str = "input") -> Tensor:
    """Rows [K, 5] of image index and corners, from such rows or from one tensor [L, 4] for each image."""
    if isinstance(boxes, list | tuple):
        if len(boxes) != input.shape[0]:
            raise ValueError(f"boxes must hold one tensor an image: got {len(boxes)} for {input.shape[0]} images")
        rois = [input.new_empty(0, 5, dtype=widen(input).dtype)]
        for image, value in enumerate(boxes):
            corners = _check_boxes(f"boxes[{image}]", value, ("L", "4"), input, input_name)
            rois.append(torch.nn.functional.pad(corners, (1, 0), value=image))
        return torch.cat(rois)
    rows = _check_boxes("boxes", boxes, ("K", "5"), input, input_name)
    # The values are inspected only where that is no host sync.
    if rows.is_cpu and not _checks.is_recorded(rows):
        images, num_images = rows[:, 0], input.shape[0]
        wrong = ~((images >= 0) & (images < num_images) & (images == images.floor()))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            place = f"image {images[row].item():g}, but {input_name} holds {num_images} images"
            raise ValueError(f"boxes[{row}] lies in {place}")
    return rows


def check_batched_rois(boxes: object, valid: object, input: Tensor, input_name: str = "input") -> Tensor:
    """Rows [B * S, 5] of image index and corners, from boxes [B, S, 4]; image -1 where `valid` [B, S] is False."""
    corners = _check_boxes("boxes", boxes, ("B", "S", "4"), input, input_name)
    batch, num_boxes = corners.shape[:2]
    if batch != input.shape[0]:
        raise ValueError(f"boxes holds {batch} images, but {input_name} holds {input.shape[0]}")
    images = torch.arange(batch, dtype=corners.dtype, device=corners.device)[:, None].expand(batch, num_boxes)
    if valid is not None:
        mask = _checks.tensor("valid", valid, (batch, num_boxes), torch.bool)
        _checks.same_device(**{input_name: input, "valid": mask})
        images = images.masked_fill(~mask, -1)
    return torch.cat([images[..., None], corners], dim=2).reshape(batch * num_boxes, 5)


def rois_in_cells(rois: Tensor, corners: Tensor, num_images: int, limit: float) -> Tensor:
    """`rois` [K, 5] with `corners` [K, 4] in cells. Padding, an image outside [0, num_images) or a NaN corner becomes a
    point of image 0 at -`limit`, outside the features."""
    images = rois[:, :1]
    valid = (images >= 0) & (images < num_images) & ~rois[:, 1:].isnan().any(1, keepdim=True)
    return torch.cat([images.where(valid, 0.0), corners.where(valid, -limit)], dim=1)


def run_in_slices(count: int, step: int, fill: Callable[[int, int], None]) -> None:
    """Call `fill(first, last)` over [0, count) in slices of `step`, on as many threads as torch uses.

    One thread takes all at once: the memory of a slice's result would come from the system anew each time.
    """
    threads = torch.get_num_threads()
    step = max(1, step if threads > 1 else count)
    firsts = range(0, count, step)
    inference = torch.is_inference_mode_enabled()

    def run(first: int) -> None:
        # These states belong to a thread: without them a worker would record a second gradient, or be refused the
        # inference tensors that it fills.
        with torch.inference_mode(inference):
            call_below_autograd(fill, first, min(first + step, count))

    if min(threads, len(firsts)) < 2:
        for first in firsts:
            run(first)
    else:
        list(_thread_pool(os.getpid(), threads).map(run, firsts))


@functools.cache
def _thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One for each process: the threads of a pool do not survive the fork of a data loader's worker.

    Each worker uses one OpenMP thread: with a team for each there would be more threads than cores, and OpenMP then
    puts all of them to sleep after each operator, those of the caller's operators too.
    """
    pool = ThreadPoolExecutor(threads, initializer=_use_one_thread)
    started = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(started.wait)
        started.wait()
    except BaseException:
        # Such as an interruption: release the workers that stand at the barrier.
        started.abort()
        raise
    # The workers set the process-wide default; this sets it back, for this thread and those to come.
    torch.set_num_threads(threads)
    return pool


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    # A thread reads the setting at its first query, and then keeps it.
    torch.get_num_threads()
