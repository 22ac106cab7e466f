"""RoI align: the mean of samples between the cells of each bin of each region of interest, from one map or a pyramid.

Sources: He et al. 2017 (arXiv:1703.06870), section 3, for the samples; Lin et al. 2017 (arXiv:1612.03144), equation 1,
for the level of the pyramid a region is pooled from. Both as torchvision computes them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torchvision.ops  # noqa: F401  (registers the operators that the CPU implementation calls)
from torch import Tensor

from . import _checks, _pyramid, _rois
from ._library import define

# Corners are held within this many cells: so far out neighbouring fp32 numbers are still an eighth of a cell apart.
FAR = float(1 << 20)
# Products in one call of torchvision's operator, which runs in one thread: about two milliseconds.
SLICE = 1 << 20
# torchvision's operator writes down the samples of a box, 32 bytes each: a box with more of them is pooled otherwise.
VAST = 1 << 20


def _cells(rois: Tensor, spatial_scale: float, num_images: int) -> Tensor:
    """The RoIs with corners in cells; padding becomes a point of image 0 far outside."""
    corners = (rois[:, 1:] * spatial_scale).clamp(-FAR, FAR)
    known = _rois.known(rois, num_images)
    images = rois[:, :1].where(known, rois.new_zeros(()))
    return torch.cat([images, corners.where(known, rois.new_full((), -FAR))], dim=1)


def _bins(low: Tensor, high: Tensor, num_bins: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """Where the first bin begins along one axis and how long each is, in cells."""
    start, end = (low - 0.5, high - 0.5) if aligned else (low, high)
    size = end - start
    return start, (size if aligned else size.clamp(min=1)) / num_bins


def _usual_and_vast(
    cells: Tensor, pooled_height: int, pooled_width: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """bool [K] twice: which boxes torchvision's operator can pool, and which have too many samples for it.

    Adaptive boxes alone can be vast, or have no sample at all: inverted ones, on whose counts that operator trips.
    """
    if sampling_ratio > 0:
        return torch.ones(len(cells), dtype=torch.bool), torch.zeros(len(cells), dtype=torch.bool)
    _, tall = _bins(cells[:, 2], cells[:, 4], pooled_height, aligned)
    _, wide = _bins(cells[:, 1], cells[:, 3], pooled_width, aligned)
    samples = tall.ceil().clamp(min=0) * pooled_height * wide.ceil().clamp(min=0) * pooled_width
    return (samples > 0) & (samples <= VAST), samples > VAST


def _weights(low: Tensor, high: Tensor, num_bins: int, limit: int, aligned: bool) -> Tensor:
    """What the bins of one box take of each cell along one axis, [num_bins, limit], with one sample a cell or more."""
    start, size = _bins(low, high, num_bins, aligned)
    count = max(int(size.ceil()), 1)
    index = torch.arange(num_bins, dtype=low.dtype)[:, None]
    place = start + index * size + (torch.arange(count, dtype=low.dtype) + 0.5) * size / count
    on_map = (place >= -1) & (place <= limit)
    held = place.clamp(0, limit - 1)
    near = held.long()
    share = held - near
    weights = low.new_zeros(num_bins, limit)
    weights.scatter_add_(1, near, (1 - share) * on_map)
    weights.scatter_add_(1, (near + 1).clamp(max=limit - 1), share * on_map)
    return weights / count


def _weights_of(cells: Tensor, bins: tuple[int, int], shape: Sequence[int], aligned: bool) -> tuple[Tensor, Tensor]:
    """What the bins of one row of cells [5] take of the rows and of the columns of a map of `shape` [.., H, W]."""
    _, left, top, right, bottom = cells
    down = _weights(top, bottom, bins[0], shape[-2], aligned)
    return down, _weights(left, right, bins[1], shape[-1], aligned)


def _parts(
    rois: Tensor, shapes: Sequence[Sequence[int]], scales: Sequence[float], edges: list[float]
) -> list[tuple[int, Tensor, Tensor]]:
    """For each level with a cell and a box: its number, which rows of `rois` are its own, and those rows in cells."""
    levels = _pyramid.levels(rois, edges)
    parts = []
    for level, (shape, scale) in enumerate(zip(shapes, scales, strict=True)):
        rows = (levels == level).nonzero()[:, 0]
        if len(rows) and math.prod(shape):
            parts.append((level, rows, _cells(rois[rows], scale, shape[0])))
    return parts


def roi_align_cpu(
    rois: Tensor,
    features: list[Tensor],
    scales: list[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> Tensor:
    bins = (pooled_height, pooled_width)
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], *bins)
    rois = rois.to(_rois.wide(features[0]).dtype)
    edges = _pyramid.edges(scales, canonical_scale, canonical_level, rois.dtype)
    step = SLICE // max(pooled.shape[1:].numel() * max(sampling_ratio, 1) ** 2, 1)
    for level, rows, cells in _parts(rois, [level.shape for level in features], scales, edges):
        map = _rois.wide(features[level]).contiguous()
        usual, vast = _usual_and_vast(cells, *bins, sampling_ratio, aligned)
        for row, cell in zip(rows[vast], cells[vast], strict=True):
            down, across = _weights_of(cell, bins, map.shape, aligned)
            pooled[row] = _between(down, map[int(cell[0])], across.t())
        rows, cells = rows[usual], cells[usual]

        def fill(first: int, last: int, map: Tensor = map, rows: Tensor = rows, cells: Tensor = cells) -> None:
            pooled[rows[first:last]] = torch.ops.torchvision.roi_align(
                map, cells[first:last], 1.0, *bins, sampling_ratio, aligned
            ).to(pooled.dtype)

        _rois.in_slices(len(rows), step, fill)
    return pooled


def roi_align_backward_cpu(
    grad: Tensor,
    rois: Tensor,
    sizes: list[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> list[Tensor]:
    shapes = _shapes(sizes)
    grads = [grad.new_zeros(shape) for shape in shapes]
    wide = _rois.wide(grad)
    rois = rois.to(wide.dtype)
    edges = _pyramid.edges(scales, canonical_scale, canonical_level, rois.dtype)
    bins = (grad.shape[2], grad.shape[3])
    for level, rows, cells in _parts(rois, shapes, scales, edges):
        _, channels, height, width = shapes[level]
        usual, vast = _usual_and_vast(cells, *bins, sampling_ratio, aligned)
        total = wide.new_zeros(shapes[level])
        part, others = wide[rows[usual]], cells[usual]

        # A slice of channels, never of RoIs: a cell's sum keeps its order.
        def fill(
            first: int,
            last: int,
            total: Tensor = total,
            part: Tensor = part,
            cells: Tensor = others,
            map: tuple[int, int] = (height, width),
        ) -> None:
            total[:, first:last] = torch.ops.torchvision._roi_align_backward(
                part[:, first:last], cells, 1.0, *bins, len(total), last - first, *map, sampling_ratio, aligned
            )

        _rois.in_slices(channels, SLICE // max(part[:, :1].numel() * max(sampling_ratio, 1) ** 2, 1), fill)
        for row, cell in zip(rows[vast], cells[vast], strict=True):
            down, across = _weights_of(cell, bins, shapes[level], aligned)
            total[int(cell[0])] += _between(down.t(), wide[row], across)
        grads[level].copy_(total)
    return grads


def _between(left: Tensor, maps: Tensor, right: Tensor) -> Tensor:
    """`left @ maps @ right`, in their own dtype under autocast too."""
    with torch.autocast("cpu", enabled=False):
        return left @ maps @ right


def roi_align_cuda(
    rois: Tensor,
    features: list[Tensor],
    scales: list[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> Tensor:
    from fastdet.kernels import roi_align as kernel

    pooled = _empty(features[0], (len(rois), features[0].shape[1], pooled_height, pooled_width), torch.channels_last)
    if pooled.numel():
        kernel.launch(
            [level.contiguous(memory_format=torch.channels_last) for level in features],
            rois.contiguous(),
            pooled,
            scales=scales,
            edges=_pyramid.edges(scales, canonical_scale, canonical_level, torch.float32),
            sampling_ratio=sampling_ratio,
            aligned=aligned,
        )
    return pooled


def roi_align_backward_cuda(
    grad: Tensor,
    rois: Tensor,
    sizes: list[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> list[Tensor]:
    from fastdet.kernels import roi_align_backward as kernel

    grads = [_empty(grad, shape, torch.channels_last) for shape in _shapes(sizes)]
    if not grad.numel() or not any(level.numel() for level in grads):
        return [level.zero_() for level in grads]
    num_rois, _, *pooled = grad.shape
    maps = [(level.shape[2], level.shape[3]) for level in grads]
    rows, columns = kernel.tiles(maps)
    cells = [max(side) for side in zip(*maps, strict=True)]
    kernel.launch(
        grad.contiguous(memory_format=torch.channels_last),
        rois.contiguous(),
        grads,
        images=grad.new_empty(num_rois, dtype=torch.int32),
        ranges=grad.new_empty(2, sum(pooled), num_rois, dtype=torch.int32),
        weights_h=grad.new_empty(num_rois, pooled[0], _whole_tiles(cells[0], kernel.TILE), dtype=torch.float32),
        weights_w=grad.new_empty(num_rois, pooled[1], _whole_tiles(cells[1], kernel.TILE), dtype=torch.float32),
        spans=grad.new_empty(2, rows + columns + 2, num_rois, dtype=torch.int32),
        bounds=grad.new_empty(sizes[0] * rows * columns, 2, dtype=torch.int64),
        visits=grad.new_empty(kernel.visits_bound(num_rois, maps, *pooled), dtype=torch.int32),
        scales=scales,
        edges=_pyramid.edges(scales, canonical_scale, canonical_level, torch.float32),
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    return grads


def _whole_tiles(cells: int, tile: int) -> int:
    return -(-cells // tile) * tile


def _empty(like: Tensor, shape: tuple[int, ...], layout: torch.memory_format) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.device.type == "cuda" else torch.contiguous_format


def _shapes(sizes: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The shape of each level of `sizes`: batch, channels, then height and width of one level after another."""
    batch, channels, *sides = sizes
    return [(batch, channels, *side) for side in zip(sides[::2], sides[1::2], strict=True)]


def roi_align_fake(
    rois: Tensor, features: list[Tensor], scales: list[float], pooled_height: int, pooled_width: int, *_: Any
) -> Tensor:
    first = features[0]
    return _empty(first, (rois.shape[0], first.shape[1], pooled_height, pooled_width), _layout(first))


def roi_align_backward_fake(grad: Tensor, rois: Tensor, sizes: list[int], *_: Any) -> list[Tensor]:
    return [_empty(grad, shape, _layout(grad)) for shape in _shapes(sizes)]


class _RoiAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rois: Tensor, scales: list[float], bins: tuple[int, int], rules: tuple[Any, ...], *features: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rois)
        sides = [side for level in features for side in level.shape[2:]]
        ctx.arguments = ([*features[0].shape[:2], *sides], scales, *rules)
        return _below_autograd(rois, list(features), scales, *bins, *rules)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.fastdet.roi_align_backward(grad, *ctx.saved_tensors, *ctx.arguments)
        return None, None, None, None, *grads


def _below_autograd(*args: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.fastdet.roi_align(*args)


def roi_align_autograd(
    rois: Tensor, features: list[Tensor], scales: list[float], pooled_height: int, pooled_width: int, *rules: Any
) -> Tensor:
    if torch.is_grad_enabled() and any(level.requires_grad for level in features):
        return _RoiAlign.apply(rois, scales, (pooled_height, pooled_width), rules, *features)
    return _below_autograd(rois, features, scales, pooled_height, pooled_width, *rules)


define(
    "roi_align(Tensor rois, Tensor[] features, float[] scales, SymInt pooled_height, SymInt pooled_width,"
    " int sampling_ratio, bool aligned, float canonical_scale, int canonical_level) -> Tensor",
    cpu=roi_align_cpu,
    cuda=roi_align_cuda,
    fake=roi_align_fake,
    autograd=roi_align_autograd,
)
define(
    "roi_align_backward(Tensor grad, Tensor rois, SymInt[] sizes, float[] scales, int sampling_ratio, bool aligned,"
    " float canonical_scale, int canonical_level) -> Tensor[]",
    cpu=roi_align_backward_cpu,
    cuda=roi_align_backward_cuda,
    fake=roi_align_backward_fake,
)


def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """The mean of the samples in each bin of each box, [K, C, height, width]; torchvision's `roi_align`.

    Args:
        input: features [B, C, H, W], fp32, fp16 or bf16; float64 on the CPU. fp16 and bf16 are computed in fp32.
        boxes: [K, 5], index of the image and x1, y1, x2, y2 in pixels; or one [L, 4] for each image. fp16 and bf16 are
            widened to fp32.
        output_size: bins along height and width, or one number for both.
        spatial_scale: cells per pixel.
        sampling_ratio: samples of a bin along each axis; 0 or less: as many as it has cells, rounded up.
        aligned: move boxes by half a cell, so that a cell's value lies at its centre; if not, a box counts as a cell
            wide and high at the least.

    A sample more than a cell outside the features is 0. Corners further than 2**20 cells out are held there. A box with
    a NaN corner pools zeros, and so does one on the GPU whose image does not exist. Differentiable once, in `input`;
    the gradient has the same bits on every run.

    Raises:
        TypeError: an argument is not a floating-point tensor, `sampling_ratio` not an int or `aligned` not a bool;
            float64 on a GPU, or float64 boxes of another input.
        ValueError: shapes or devices that do not fit, a list not as long as the batch, an output size below 1, a scale
            that is not positive; on the CPU, an image index outside the batch.
    """
    features = _rois.features(input)
    bins = _rois.output_size(output_size)
    scale = _checks.positive("spatial_scale", spatial_scale)
    sampling = _sampling(sampling_ratio, aligned)
    rois = _rois.of_any(boxes, features)
    return torch.ops.fastdet.roi_align(rois, [features], [scale], *bins, *sampling, 224.0, 4)


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """`roi_align` of each box from the level of a pyramid that its area asks for, [K, C, height, width].

    The level is floor(canonical_level + log2(sqrt(area) / canonical_scale)), held within those there are; level k has
    2**-k cells per pixel. torchvision's `MultiScaleRoIAlign` takes each box from the same level, to the last bit of its
    area.

    Args:
        features: one to five levels [B, C, H_l, W_l], finest first, all of one dtype: fp32, fp16 or bf16; float64 on
            the CPU. fp16 and bf16 are computed in fp32.
        boxes: [K, 5], index of the image and x1, y1, x2, y2 in pixels; or one [L, 4] for each image. fp16 and bf16 are
            widened to fp32.
        output_size: bins along height and width, or one number for both.
        scales: cells per pixel of each level, powers of two; each half of the one before it. The last may repeat:
            those levels are never pooled from. Of a single level any positive scale.
        sampling_ratio: samples of a bin along each axis; 0 or less: as many as it has cells, rounded up.
        aligned: as in `roi_align`.
        canonical_scale: side in pixels of the square box that is pooled from `canonical_level`.
        canonical_level: level k of that box, counted from the image, which is 0.

    A box whose area is negative or NaN is pooled from the finest level. All else as `roi_align`.

    Raises:
        TypeError: a level or `boxes` is not a floating-point tensor, levels of several dtypes, `sampling_ratio` or
            `canonical_level` not an int, `aligned` not a bool; else as `roi_align`.
        ValueError: no level or more than five, levels that differ in batch, channels or device, scales that are not as
            many, not positive or do not fall by halves; else as `roi_align`.
    """
    levels, cells_per_pixel = _pyramid.of(features, scales)
    bins = _rois.output_size(output_size)
    sampling = _sampling(sampling_ratio, aligned)
    canonical = _canonical(canonical_scale, canonical_level)
    rois = _rois.of_any(boxes, levels[0], "features")
    return torch.ops.fastdet.roi_align(rois, levels, cells_per_pixel, *bins, *sampling, *canonical)


def batched_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: int | tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    valid: Tensor | None = None,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """`multiscale_roi_align` of equally many boxes of each image, [B, S, C, height, width], without a wait.

    Args:
        features, output_size, scales, sampling_ratio, aligned, canonical_scale, canonical_level: as in
            `multiscale_roi_align`.
        boxes: [B, S, 4], x1, y1, x2, y2 in pixels; fp16 and bf16 are widened to fp32.
        valid: bool [B, S]; a box where it is False is padding, gives zeros and takes no gradient. None: all count.

    Raises:
        TypeError: as `multiscale_roi_align`, or `valid` is not bool.
        ValueError: as `multiscale_roi_align`, or `boxes` or `valid` of another shape.
    """
    levels, cells_per_pixel = _pyramid.of(features, scales)
    bins = _rois.output_size(output_size)
    sampling = _sampling(sampling_ratio, aligned)
    canonical = _canonical(canonical_scale, canonical_level)
    rois = _rois.of_batch(boxes, valid, levels[0], "features")
    pooled = torch.ops.fastdet.roi_align(rois, levels, cells_per_pixel, *bins, *sampling, *canonical)
    return pooled.unflatten(0, boxes.shape[:2])


def _sampling(sampling_ratio: object, aligned: object) -> tuple[int, bool]:
    if not isinstance(sampling_ratio, int) or isinstance(sampling_ratio, bool):
        raise TypeError(f"sampling_ratio must be an int, got {sampling_ratio!r}")
    if not isinstance(aligned, bool):
        raise TypeError(f"aligned must be a bool, got {aligned!r}")
    return sampling_ratio, aligned


def _canonical(scale: float, level: object) -> tuple[float, int]:
    if not isinstance(level, int) or isinstance(level, bool):
        raise TypeError(f"canonical_level must be an int, got {level!r}")
    return float(_checks.positive("canonical_scale", scale)), level
