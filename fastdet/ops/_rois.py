"""What the operations on regions of interest share: what they ask of their arguments, rows of boxes, threads."""

import functools
import numbers
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastdet.ops import _checks


def wide(tensor: Tensor) -> Tensor:
    """In the dtype that is computed in: float64 stays, the rest becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def features(value: object, name: str = "input") -> Tensor:
    """`value` as features [B, C, H, W] of a dtype that can be pooled."""
    tensor = _checks.is_tensor(name, value)
    if tensor.ndim != 4:
        raise ValueError(f"{name} must have the shape [B, C, H, W], got {list(tensor.shape)}")
    if tensor.dtype == torch.float64:
        if tensor.device.type == "cuda":
            raise TypeError(f"{name} must be float32, float16 or bfloat16 on a GPU, got torch.float64")
    elif tensor.dtype not in _checks.FLOATS:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    return tensor


def boxes(name: str, value: object, shape: tuple[str, ...], input: Tensor, holder: str = "input") -> Tensor:
    """`value` in the dtype that the operation computes in, its last dimension and rank as in `shape`.

    It comes in fp32 or in the dtype of `input`: corners in another half precision have lost what nobody meant to lose.
    `holder` is the name of the argument that `input` came from, here and below.
    """
    tensor = _checks.is_tensor(name, value)
    if tensor.dtype not in (torch.float32, input.dtype):
        raise TypeError(f"{name} must be float32 or as {holder}, {input.dtype}, got {tensor.dtype}")
    tensor = tensor.double() if input.dtype == torch.float64 else tensor.float()
    if tensor.ndim != len(shape) or tensor.shape[-1] != int(shape[-1]):
        raise ValueError(f"{name} must have the shape [{', '.join(shape)}], got {list(tensor.shape)}")
    _checks.same_device(**{holder: input, name: tensor})
    return tensor


def output_size(value: object) -> tuple[int, int]:
    """(height, width) of one positive number or two."""
    sizes = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(sizes, tuple | list):
        raise TypeError(f"output_size must be an int or a pair of them, got {value!r}")
    if len(sizes) != 2:
        raise ValueError(f"output_size must be one number or (height, width), got {value}")
    height, width = (_checks.integer("output_size", size, least=1) for size in sizes)
    return height, width


def of_any(value: object, input: Tensor, holder: str = "input") -> Tensor:
    """Boxes [K, 5] as they are, or one tensor [L, 4] an image, as rows [K, 5] of image index and corners."""
    if isinstance(value, list | tuple):
        return _of_list(value, input, holder)
    rois = boxes("boxes", value, ("K", "5"), input, holder)
    if rois.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_images(rois, input.shape[0], holder)
    return rois


def of_batch(value: object, valid: object, input: Tensor, holder: str = "input") -> Tensor:
    """Boxes [B, S, 4] as rows [B * S, 5] of image index and corners; the image is -1 where `valid` [B, S] is False."""
    corners = boxes("boxes", value, ("B", "S", "4"), input, holder)
    batch, num_boxes = corners.shape[:2]
    if batch != input.shape[0]:
        raise ValueError(f"boxes holds {batch} images, but {holder} holds {input.shape[0]}")
    images = torch.arange(batch, dtype=corners.dtype, device=corners.device)[:, None].expand(batch, num_boxes)
    if valid is not None:
        counted = _checks.booleans("valid", valid, (batch, num_boxes))
        _checks.same_device(**{holder: input, "valid": counted})
        images = images.masked_fill(~counted, -1)
    return torch.cat([images[..., None], corners], dim=2).reshape(batch * num_boxes, 5)


def _of_list(per_image: list[object] | tuple[object, ...], input: Tensor, holder: str) -> Tensor:
    if len(per_image) != input.shape[0]:
        raise ValueError(f"boxes must hold one tensor an image: got {len(per_image)} for {input.shape[0]} images")
    rois = [input.new_empty(0, 5, dtype=wide(input).dtype)]
    for image, value in enumerate(per_image):
        corners = boxes(f"boxes[{image}]", value, ("L", "4"), input, holder)
        rois.append(torch.nn.functional.pad(corners, (1, 0), value=image))
    return torch.cat(rois)


def _check_images(rois: Tensor, num_images: int, holder: str) -> None:
    """Raises ValueError for a row of `rois` [K, 5] whose image does not exist; looks at the values."""
    images = rois[:, 0]
    wrong = ~((images >= 0) & (images < num_images) & (images == images.floor()))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"boxes[{row}] lies in image {images[row].item():g}, but {holder} holds {num_images} images")


def known(rois: Tensor, num_images: int) -> Tensor:
    """bool [K, 1]: False for padding, an image outside [0, num_images) or a NaN."""
    images = rois[:, :1]
    return (images >= 0) & (images < num_images) & ~rois[:, 1:].isnan().any(1, keepdim=True)


def in_slices(count: int, step: int, fill: Callable[[int, int], None]) -> None:
    """Call `fill(first, last)` over [0, count) in slices of `step`, on as many threads as torch uses."""
    step = max(1, step)
    firsts = range(0, count, step)
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def run(first: int) -> None:
        # These states belong to a thread: without them a worker would record a second gradient, or be refused the
        # inference tensors that it fills.
        with torch.inference_mode(inference), torch._C._AutoDispatchBelowAutograd():
            fill(first, min(first + step, count))

    if min(threads, len(firsts)) < 2:
        for first in firsts:
            run(first)
        return
    list(_pool(os.getpid(), threads).map(run, firsts))


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One for each process: the threads of a pool do not survive the fork of a data loader's worker.

    Its threads share what they do with no others: a team of each would have more threads than there are cores, and
    OpenMP then sends them all to sleep after each operator, those of the caller's operators too.
    """
    pool = ThreadPoolExecutor(threads, initializer=_alone)
    everyone = threading.Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(everyone.wait)
        everyone.wait()
    except BaseException:
        # Such as an interruption: nobody waits for whom it keeps from coming.
        everyone.abort()
        raise
    # The number holds for the thread that sets it and for those to come.
    torch.set_num_threads(threads)
    return pool


def _alone() -> None:
    torch.set_num_threads(1)
    # A thread takes the number over when it first looks, and then keeps it.
    torch.get_num_threads()
