"""Anchors: boxes of a few sizes and shapes around every cell of a feature map (Ren et al. 2015, section 3.1.1)."""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Size = tuple[int, int]
# The longest side of an image, in pixels.
MAX_SIDE = 1 << 14
# Of sizes and aspect ratios: below, an anchor's side is 0 in float32.
_LEAST = 1e-6


@dataclass(frozen=True)
class AnchorGenerator:
    """The anchors of each feature level. The arguments of torchvision's `AnchorGenerator`, and three more.

    Args:
        sizes: for each level the square roots of the anchors' areas, in pixels of the resized image; a flat tuple
            gives each level one size.
        aspect_ratios: for each level the ratios height / width; one entry serves every level.
        strides: pixels between cells, one number a level. None takes the backbone's attribute `strides`; if it has
            none, the padded image's side over the feature map's, rounded down, as torchvision does.
        offset: where the first anchor's center lies, in pixels: 0 in torchvision, half a stride in the paper's code.
        rounded: whether corners are rounded to whole pixels before they are shifted, as torchvision does.
    """

    sizes: tuple[tuple[float, ...], ...] = ((128, 256, 512),)
    aspect_ratios: tuple[tuple[float, ...], ...] = ((0.5, 1.0, 2.0),)
    strides: tuple[int, ...] | None = None
    offset: float = 0.0
    rounded: bool = True

    def __post_init__(self) -> None:
        sizes = _per_level("sizes", self.sizes)
        ratios = _per_level("aspect_ratios", self.aspect_ratios)
        if len(ratios) == 1:
            ratios *= len(sizes)
        if len(ratios) != len(sizes):
            raise ValueError(f"aspect_ratios has {len(ratios)} levels, sizes has {len(sizes)}")
        most = max(len(side) * len(ratio) for side, ratio in zip(sizes, ratios, strict=True))
        if most > 1024:
            raise ValueError(f"sizes and aspect_ratios must give at most 1024 anchors a cell, got {most}")
        strides = self.strides
        if strides is not None:
            if not isinstance(strides, (tuple, list)) or not all(type(x) is int and 0 < x <= MAX_SIDE for x in strides):
                raise ValueError(f"strides must be whole numbers in 1..{MAX_SIDE}, got {strides!r:.200}")
            if len(strides) != len(sizes):
                raise ValueError(f"strides has {len(strides)} levels, sizes has {len(sizes)}")
            strides = tuple(strides)
        if type(self.offset) not in (int, float) or not abs(self.offset) <= MAX_SIDE:
            raise ValueError(f"offset must be a number of at most {MAX_SIDE}, got {self.offset!r:.200}")
        if not isinstance(self.rounded, bool):
            raise ValueError(f"rounded must be True or False, got {self.rounded!r:.200}")
        for name, value in (("sizes", sizes), ("aspect_ratios", ratios), ("strides", strides)):
            object.__setattr__(self, name, value)

    def with_default_strides(self, strides: Sequence[int] | None) -> "AnchorGenerator":
        """With the `strides` of a backbone where this generator has none of its own."""
        if strides is None or self.strides is not None:
            return self
        if len(strides) != len(self.sizes):
            raise ValueError(
                f"the backbone has {len(strides)} feature levels, but the anchors are for {len(self.sizes)}: give "
                "rpn_anchor_generator sizes for each level (settings=fastdet.VGG16 has them for one)"
            )
        return replace(self, strides=tuple(strides))

    def num_anchors_per_location(self) -> list[int]:
        return [len(sizes) * len(ratios) for sizes, ratios in zip(self.sizes, self.aspect_ratios, strict=True)]

    def cell_anchors(self) -> list[Tensor]:
        """For each level the anchors of cell (0, 0), fp32 [A, 4] on the CPU, ratios outermost."""
        cells = []
        for sizes, ratios in zip(self.sizes, self.aspect_ratios, strict=True):
            root = torch.tensor(ratios, dtype=torch.float32, device="cpu").sqrt()
            scale = torch.tensor(sizes, dtype=torch.float32, device="cpu")
            height, width = (root[:, None] * scale).flatten(), ((1 / root)[:, None] * scale).flatten()
            cell = torch.stack([-width, -height, width, height], dim=1) / 2
            cells.append((cell.round() if self.rounded else cell) + self.offset)
        return cells

    def level_strides(self, image_size: Size, grids: list[Size]) -> list[Size]:
        """Vertical and horizontal stride of each level, for a padded image and its feature maps' (height, width)."""
        if len(grids) != len(self.sizes):
            raise ValueError(
                f"the anchors are for {len(self.sizes)} feature levels (sizes {self.sizes}), "
                f"but the backbone gives {len(grids)} (of height x width {grids}): give rpn_anchor_generator"
            )
        if any(0 in grid for grid in grids):
            raise ValueError(f"an image of {image_size} pixels leaves no features: levels of height x width {grids}")
        if self.strides is not None:
            return [(stride, stride) for stride in self.strides]
        return [(image_size[0] // height, image_size[1] // width) for height, width in grids]


def _per_level(name: str, value: object) -> tuple[tuple[float, ...], ...]:
    levels = tuple(value) if isinstance(value, (tuple, list)) else ()
    if levels and all(_positive(number) for number in levels):
        levels = tuple((number,) for number in levels) if name == "sizes" else (levels,)
    for level in levels:
        if not isinstance(level, (tuple, list)) or not level or not all(_positive(number) for number in level):
            levels = ()
            break
    if not levels:
        wanted = f"numbers in {_LEAST}..{MAX_SIDE}"
        raise ValueError(f"{name} must hold for each feature level a tuple of {wanted}, got {value!r:.200}")
    return tuple(tuple(level) for level in levels)


def _positive(number: object) -> bool:
    return isinstance(number, (int, float)) and type(number) is not bool and _LEAST <= number <= MAX_SIDE


def grid_anchors(cell: Tensor, grid: Size, stride: Size) -> Tensor:
    """Every anchor of a level, fp32 [H * W * A, 4]: `cell` [A, 4] moved by the stride over `grid` (H, W) cells."""
    y = torch.arange(grid[0], device=cell.device, dtype=cell.dtype) * stride[0]
    x = torch.arange(grid[1], device=cell.device, dtype=cell.dtype) * stride[1]
    shift = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None], x[None, :], y[:, None]), dim=-1)
    return (shift[:, :, None] + cell).reshape(-1, 4)


def inside(anchors: Tensor, sizes: Tensor) -> Tensor:
    """bool [B, K]: which `anchors` [K, 4] lie wholly inside each image of `sizes` [B, 2] (height, width)."""
    height, width = sizes[:, 0, None], sizes[:, 1, None]
    x1, y1, x2, y2 = anchors.unbind(-1)
    return (x1 >= 0) & (y1 >= 0) & (x2 <= width) & (y2 <= height)


@functools.lru_cache(maxsize=1024)
def has_anchor_inside(generator: AnchorGenerator, size: Size) -> bool:
    """Whether an anchor lies wholly inside an image of this (height, width), in the first cell in which it can."""
    height, width = size
    for cell, stride in zip(generator.cell_anchors(), generator.strides or (), strict=True):
        for x1, y1, x2, y2 in cell.tolist():
            right, lower = (end + stride * math.ceil(max(-start, 0) / stride) for start, end in ((x1, x2), (y1, y2)))
            if right <= width and lower <= height:
                return True
    return False


def warn_of_images_without_anchors(generator: AnchorGenerator, sizes: Sequence[Size]) -> None:
    """Warn of images, of these (height, width) after resizing, inside which no anchor lies where only such train."""
    for i, size in enumerate(sizes if generator.strides else ()):
        if not has_anchor_inside(generator, size):
            warnings.warn(
                f"image {i} of {size[0]} x {size[1]} pixels after resizing has no anchor inside, so that region "
                "proposals learn nothing of it: smaller sizes in rpn_anchor_generator, a larger min_size or "
                "rpn_anchors_inside_only=False would give it some",
                stacklevel=5,
            )


def spatial_scale(stride: int) -> float:
    """Cells a pixel: of the power of two that is nearest to the stride, which rounding may have moved."""
    return 1 / (1 << max(round(math.log2(stride)), 0))
