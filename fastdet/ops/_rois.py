"""What the operations on regions of interest ask of their arguments, in words that name the argument."""

import torch
from torch import Tensor

from . import _checks


def wide(tensor: Tensor) -> Tensor:
    """In the dtype that is computed in: float64 stays, the rest becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def features(value: object) -> Tensor:
    """`value` as features [B, C, H, W] of a dtype that can be pooled."""
    tensor = _checks.is_tensor("input", value)
    if tensor.ndim != 4:
        raise ValueError(f"input must have the shape [B, C, H, W], got {list(tensor.shape)}")
    if tensor.dtype == torch.float64:
        if tensor.device.type == "cuda":
            raise TypeError("input must be float32, float16 or bfloat16 on a GPU, got torch.float64")
    elif tensor.dtype not in _checks.FLOATS:
        raise TypeError(f"input must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    return tensor


def boxes(name: str, value: object, shape: tuple[str, ...], input: Tensor) -> Tensor:
    """`value` in the dtype that the operation computes in, its last dimension and rank as in `shape`."""
    tensor = _checks.is_tensor(name, value)
    if input.dtype == torch.float64 and tensor.is_floating_point():
        tensor = tensor.double()
    else:
        tensor = _checks.floats(name, tensor)
    if tensor.ndim != len(shape) or tensor.shape[-1] != int(shape[-1]):
        raise ValueError(f"{name} must have the shape [{', '.join(shape)}], got {list(tensor.shape)}")
    _checks.same_device(**{"input": input, name: tensor})
    return tensor


def output_size(value: object) -> tuple[int, int]:
    """(height, width) of one positive number or two."""
    sizes = (value, value) if isinstance(value, int) else value
    if not isinstance(sizes, tuple | list) or not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"output_size must be an int or a pair of them, got {value!r}")
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"output_size must be positive, one number or (height, width), got {value}")
    return sizes[0], sizes[1]


def of_list(per_image: list[Tensor] | tuple[Tensor, ...], input: Tensor) -> Tensor:
    """One tensor [L, 4] an image as rows [K, 5] of image index and corners."""
    if len(per_image) != input.shape[0]:
        raise ValueError(f"boxes must hold one tensor an image: got {len(per_image)} for {input.shape[0]} images")
    rois = [input.new_empty(0, 5, dtype=wide(input).dtype)]
    for image, value in enumerate(per_image):
        corners = boxes(f"boxes[{image}]", value, ("L", "4"), input)
        rois.append(torch.nn.functional.pad(corners, (1, 0), value=image))
    return torch.cat(rois)


def check_images(rois: Tensor, num_images: int) -> None:
    """Raises ValueError for a row of `rois` [K, 5] whose image does not exist; looks at the values."""
    images = rois[:, 0]
    wrong = ~((images >= 0) & (images < num_images))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"boxes[{row}] lies in image {images[row].item():g}, but input holds {num_images} images")
