"""Detections that do not depend on the images beside an image in its batch: what `Settings.mask_padding` does.

A batch is padded with zeros to one size. After the first convolution the padding is zero no more, and what is in it
leaks back over the border of the image: the larger its neighbours, the further. Masked, each image is seen as if it
were alone, padded to the next multiple of `size_divisible`: whatever looks at neighbouring cells finds zeros beyond.

It costs a pass over the input of every convolution wider than one cell, two over the features that are pooled, and
the fusions that this breaks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdet.models.anchors import Size
from fastdet.structures import Seen

_ONE_CELL = (1, (1, 1))
# Layers that mix cells in other ways than a window of zeros at the border.
_UNKNOWN = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.modules.conv._ConvTransposeNd,
    nn.Upsample,
    nn.AdaptiveMaxPool2d,
    nn.FractionalMaxPool2d,
    nn.LPPool2d,
)


def stride_of(pixels: int, cells: int) -> int:
    """The power of two nearest to pixels / cells: strides are such, but for what rounding made of them."""
    return 1 << max(round(math.log2(pixels / cells)), 0)


def extents(own: Tensor, image_size: Size, level: Size) -> Tensor:
    """Cells (rows, columns) of a feature level that belong to each image: int64 [B, 2].

    `own` int64 [B, 2] is the (height, width) of each image padded as if alone, `image_size` that of the whole batch.
    """
    rows = -(-own[:, 0] // stride_of(image_size[0], level[0]))
    columns = -(-own[:, 1] // stride_of(image_size[1], level[1]))
    return torch.stack([rows, columns], dim=1)


def belonging(extent: Tensor, level: Size) -> Tensor:
    """bool [B, H, W]: which cells of a level lie within `extent` [B, 2]."""
    rows = torch.arange(level[0], device=extent.device) < extent[:, :1]
    columns = torch.arange(level[1], device=extent.device) < extent[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def to_far_corner(features: Tensor, extent: Tensor) -> Tensor:
    """[B, C, H, W] with the `extent` [B, 2] of each image moved to the last rows and columns.

    There a box that reaches the border of the image reaches that of the map, and is pooled as if the image were alone.
    What comes before repeats the first row and column, as pooling itself does.
    """
    for axis, dimension in ((0, 2), (1, 3)):
        cells = features.shape[dimension]
        place = torch.arange(cells, device=extent.device) - (cells - extent[:, axis, None])
        shape = [features.shape[0], 1, 1, 1]
        shape[dimension] = cells
        index = place.clamp(min=0).reshape(shape).expand(features.shape)
        features = features.gather(dimension, index)
    return features


def require_multiples(coarsest: int, divisible: int, image_size: Size | None = None) -> None:
    """Raises ValueError unless padded sizes are multiples of the `coarsest` stride of the levels that are pooled."""
    if any(side % coarsest for side in (divisible, *(image_size or ()))):
        padded = "" if image_size is None else f" and the batch is padded to {image_size}"
        raise ValueError(
            f"mask_padding needs padded sizes that are multiples of {coarsest}, but size_divisible is "
            f"{divisible}{padded}"
        )


def masked(seen: Seen, own: Tensor, divisible: int) -> Seen:
    """What was seen, with what belongs to each image alone; `own` as in `extents`, rounded up to `divisible`.

    Raises:
        ValueError: the strides of the levels do not divide the padded sizes.
    """
    require_multiples(round(1 / min(seen.pooled_scales)), divisible, seen.image_size)

    def extent(level: Tensor) -> Tensor:
        return extents(own, seen.image_size, (level.shape[-2], level.shape[-1]))

    down, across = (seen.image_size[k] - own[:, k].float() for k in (0, 1))
    return seen._replace(
        pooled_levels=[to_far_corner(level, extent(level)) for level in seen.pooled_levels],
        pooled_shift=torch.stack([across, down, across, down], dim=1),
        cells=[belonging(extent(level), (level.shape[-2], level.shape[-1])) for level in seen.features],
    )


class Mask:
    """What the hooks of a model share: the batch that it is looking at, if that is to be masked."""

    def __init__(self) -> None:
        self.own: Tensor | None = None
        self.image_size: Size = (0, 0)

    def attach(self, *modules: nn.Module) -> None:
        """Mask from now on the inputs of all layers in `modules` that see more than one cell.

        What a module does to its features by functions instead of layers is not seen, but for the upsampling of
        torchvision's pyramid, which needs no mask.

        Raises:
            ValueError: a layer is one for which it is not known what lies beyond the border.
        """
        for module in modules:
            for name, layer in module.named_modules():
                if isinstance(layer, _UNKNOWN):
                    raise ValueError(f"mask_padding: {name} is a {type(layer).__name__}, which has no mask")
                if isinstance(layer, nn.AdaptiveAvgPool2d):
                    if layer.output_size not in _ONE_CELL:
                        raise ValueError(f"mask_padding: {name} pools to {layer.output_size}, which has no mask")
                    layer.register_forward_pre_hook(_ZeroPadding(self))
                    layer.register_forward_hook(_OwnMean(self))
                elif isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)) and layer.kernel_size not in _ONE_CELL:
                    layer.register_forward_pre_hook(_ZeroPadding(self))

    @contextmanager
    def over(self, own: Tensor, image_size: Size) -> Iterator[None]:
        """The hooks mask while this is open; `own` and `image_size` as in `extents`."""
        self.own, self.image_size = own, image_size
        try:
            yield
        finally:
            self.own = None

    def extent(self, features: Tensor) -> Tensor | None:
        """int64 [B, 2] for `features` [B, C, H, W]; None if nothing is masked now."""
        if self.own is None:
            return None
        return extents(self.own, self.image_size, (features.shape[-2], features.shape[-1]))


class _ZeroPadding:
    """Before a layer: what does not belong to an image is 0, as it is beyond the border of an image that is alone.

    For a maximum too: the layers before it end in a ReLU, so that 0 changes no maximum.
    """

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...] | None:
        features, *rest = args
        extent = self.mask.extent(features)
        if extent is None:
            return None
        inside = belonging(extent, (features.shape[-2], features.shape[-1]))
        return torch.where(inside[:, None], features, 0.0), *rest


class _OwnMean:
    """After a mean over all cells: over those of the image alone."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], mean: Tensor) -> Tensor | None:
        extent = self.mask.extent(args[0])
        if extent is None:
            return None
        cells = args[0].shape[-2] * args[0].shape[-1]
        return mean * (cells / extent.prod(1)).to(mean.dtype)[:, None, None, None]
