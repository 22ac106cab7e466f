"""RoI align: the mean of samples between the cells of each bin of each region of interest, from one map or a pyramid.

Sources: He et al. 2017 (arXiv:1703.06870), section 3, for the samples; Lin et al. 2017 (arXiv:1612.03144), equation 1,
for the level of the pyramid a region is pooled from. Both as torchvision computes them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdet.ops import _checks, _rois
from fastdet.ops._library import define, define_batched, overridable
from fastdet.ops._pyramid import check_pyramid, level_edges
from fastdet.ops.cpu.roi_align import roi_align_backward_cpu, roi_align_cpu


def roi_align_cuda(
    rois: Tensor,
    features: list[Tensor],
    scales: list[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    *canonical: Any,
) -> Tensor:
    from fastdet.kernels import roi_align as kernel

    shape = (len(rois), features[0].shape[1], pooled_height, pooled_width)
    pooled = _rois.empty(features[0], shape, torch.channels_last)
    if pooled.numel():
        kernel.launch(
            [level.contiguous(memory_format=torch.channels_last) for level in features],
            rois.contiguous(),
            pooled,
            scales=scales,
            edges=level_edges(scales, *canonical, dtype=torch.float32),
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
    *canonical: Any,
) -> list[Tensor]:
    from fastdet.kernels import roi_align_backward as kernel

    grads = [_rois.empty(grad, shape, torch.channels_last) for shape in _rois.level_shapes(sizes)]
    if not grad.numel() or not any(level.numel() for level in grads):
        return [level.zero_() for level in grads]
    num_rois, _, *pooled = grad.shape
    maps = [(level.shape[2], level.shape[3]) for level in grads]
    rows, columns = kernel.tiles(maps)
    edges = level_edges(scales, *canonical, dtype=torch.float32)
    longest = kernel.visits_bound(num_rois, tuple(maps), tuple(scales), tuple(edges), *pooled)
    # The longest side of a level along each axis, in whole tiles.
    height, width = (-(-max(sides) // kernel.TILE) * kernel.TILE for sides in zip(*maps, strict=True))
    kernel.launch(
        grad.contiguous(memory_format=torch.channels_last),
        rois.contiguous(),
        grads,
        images=grad.new_empty(num_rois, dtype=torch.int32),
        ranges=grad.new_empty(2, sum(pooled), num_rois, dtype=torch.int32),
        weights_h=grad.new_empty(num_rois, pooled[0], height, dtype=torch.float32),
        weights_w=grad.new_empty(num_rois, pooled[1], width, dtype=torch.float32),
        extents=grad.new_empty(sizes[0], 3, dtype=torch.int64),
        spans=grad.new_empty(2, rows + columns + 2, num_rois, dtype=torch.int32),
        bounds=grad.new_empty(sizes[0] * rows * columns, 2, dtype=torch.int64),
        visits=grad.new_empty(longest, dtype=torch.int32),
        scales=scales,
        edges=edges,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )
    return grads


def roi_align_fake(rois: Tensor, features: list[Tensor], scales: list[float], *rules: Any) -> Tensor:
    return _rois.empty(features[0], (rois.shape[0], features[0].shape[1], *rules[:2]))


def roi_align_backward_fake(grad: Tensor, rois: Tensor, sizes: list[int], *_: Any) -> list[Tensor]:
    return [_rois.empty(grad, shape) for shape in _rois.level_shapes(sizes)]


define(
    "roi_align(Tensor rois, Tensor[] features, float[] scales, SymInt pooled_height, SymInt pooled_width,"
    " int sampling_ratio, bool aligned, float canonical_scale, int canonical_level) -> Tensor",
    cpu=roi_align_cpu,
    cuda=roi_align_cuda,
    fake=roi_align_fake,
    autograd=_rois.roi_align_autograd,
)


define(
    "roi_align_backward(Tensor grad, Tensor rois, SymInt[] sizes, float[] scales, int sampling_ratio, bool aligned,"
    " float canonical_scale, int canonical_level) -> Tensor[]",
    cpu=roi_align_backward_cpu,
    cuda=roi_align_backward_cuda,
    fake=roi_align_backward_fake,
    autograd=_rois.roi_align_backward_autograd,
)


# For the batched tensors of `torch.autograd.grad(is_grads_batched=True)`, older than those of `torch.vmap`, torch calls
# an operator for each entry if it takes and gives no lists: as these do, with the levels joined.
def _join(levels: Sequence[Tensor]) -> Tensor:
    return torch.cat([level.reshape(-1) for level in levels])


def _split(joined: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    shapes = _rois.level_shapes(sizes)
    return [part.reshape(shape) for part, shape in zip(joined.split([*map(math.prod, shapes)]), shapes, strict=True)]


def _align_joined(rois: Tensor, joined: Tensor, sizes: list[int], *arguments: Any) -> Tensor:
    return torch.ops.fastdet.roi_align(rois, _split(joined, sizes), *arguments)


def _align_backward_joined(*arguments: Any) -> Tensor:
    return _join(torch.ops.fastdet.roi_align_backward(*arguments))


def _align_batched(rois: Tensor, features: list[Tensor], *arguments: Any) -> Tensor:
    return torch.ops.fastdet.roi_align_joined(rois, _join(features), _rois.level_sizes(features), *arguments)


def _align_backward_batched(grad: Tensor, rois: Tensor, sizes: list[int], *arguments: Any) -> list[Tensor]:
    return _split(torch.ops.fastdet.roi_align_backward_joined(grad, rois, sizes, *arguments), sizes)


define_batched(
    "roi_align_joined(Tensor rois, Tensor joined, SymInt[] sizes, float[] scales, SymInt pooled_height, SymInt"
    " pooled_width, int sampling_ratio, bool aligned, float canonical_scale, int canonical_level) -> Tensor",
    _align_joined,
    "roi_align",
    _align_batched,
)
define_batched(
    "roi_align_backward_joined(Tensor grad, Tensor rois, SymInt[] sizes, float[] scales, int sampling_ratio,"
    " bool aligned, float canonical_scale, int canonical_level) -> Tensor",
    _align_backward_joined,
    "roi_align_backward",
    _align_backward_batched,
)


@overridable
def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int] | list[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """The mean of the samples in each bin of each box, [K, C, height, width]; torchvision's `roi_align`.

    Args:
        input: features [B, C, H, W], fp32, fp16 or bf16; float64 on the CPU. fp16 and bf16 are computed in fp32.
        boxes: [K, 5], index of the image and x1, y1, x2, y2 in pixels; or one [L, 4] for each image. Floating
            point, also of another dtype than `input`.
        output_size: bins along height and width, or one int for both.
        spatial_scale: cells per pixel.
        sampling_ratio: samples of a bin along each axis; 0 or less: as many as it has cells, rounded up.
        aligned: move boxes by half a cell, so that a cell's value lies at its center; if not, a box is at least
            a cell wide and high.

    A sample more than a cell outside the features is 0. Corners are clamped to 2**20 cells. A box with a NaN corner
    pools zeros, and so does one on the GPU whose image does not exist. Differentiable in `input`; the gradient has the
    same bits on every run.

    Raises:
        TypeError: an argument is not a floating-point tensor, `sampling_ratio` not an int or `aligned` not a bool;
            float64 on a GPU.
        ValueError: shapes or devices that do not fit, a list not as long as the batch, an output size below 1, a scale
            that is not positive; on the CPU, an image index outside the batch, or 2**31 features or more.
    """
    features, scale = _rois.check_features(input), _checks.positive("spatial_scale", spatial_scale)
    rules = _check_rules(output_size, sampling_ratio, aligned)
    return torch.ops.fastdet.roi_align(_rois.check_rois(boxes, features), [features], [scale], *rules)


@overridable
def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | list[Tensor],
    output_size: int | tuple[int, int] | list[int],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """`roi_align` of each box from the level of a pyramid that its area selects, [K, C, height, width].

    The level is floor(canonical_level + log2(sqrt(area) / canonical_scale)), clamped to the given ones; level k has
    2**-k cells per pixel. torchvision's `MultiScaleRoIAlign` chooses the same levels, to the last bit of the area.

    Args:
        features: one to five levels [B, C, H_l, W_l], finest first, all of one dtype: fp32, fp16 or bf16; float64 on
            the CPU. fp16 and bf16 are computed in fp32.
        boxes, output_size, sampling_ratio, aligned: as of `roi_align`.
        scales: cells per pixel of each level, powers of two; each half of the one before it. The last may repeat:
            those levels are never pooled from. Of a single level any positive scale.
        canonical_scale: side in pixels of the square box that is pooled from `canonical_level`.
        canonical_level: level k of that box, counted from the image, which is 0.

    The area of an inverted box counts without its sign; a box whose area is NaN is pooled from the finest level. All
    else as `roi_align`.

    Raises:
        TypeError: a level or `boxes` is not a floating-point tensor, levels of several dtypes, `sampling_ratio` or
            `canonical_level` not an int, `aligned` not a bool; else as `roi_align`.
        ValueError: no level or more than five, levels that differ in batch, channels or device, scales that are not as
            many, not positive or do not fall by halves; else as `roi_align`.
    """
    levels, cells_per_pixel = check_pyramid(features, scales)
    rules = _check_rules(output_size, sampling_ratio, aligned, canonical_scale, canonical_level)
    rois = _rois.check_rois(boxes, levels[0], "features")
    return torch.ops.fastdet.roi_align(rois, levels, cells_per_pixel, *rules)


def batched_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: int | tuple[int, int] | list[int],
    scales: Sequence[float],
    sampling_ratio: int = 2,
    aligned: bool = False,
    valid: Tensor | None = None,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """`multiscale_roi_align` of equally many boxes of each image, [B, S, C, height, width], without a host sync.

    Args:
        features, output_size, scales, sampling_ratio, aligned, canonical_scale, canonical_level: as of
            `multiscale_roi_align`.
        boxes: [B, S, 4], x1, y1, x2, y2 in pixels; floating point.
        valid: bool [B, S]; a box where it is False is padding, gives zeros and no gradient. None: all are valid.

    Raises:
        TypeError: as `multiscale_roi_align`, or `valid` is not bool.
        ValueError: as `multiscale_roi_align`, or `boxes` or `valid` of another shape.
    """
    levels, cells_per_pixel = check_pyramid(features, scales)
    rules = _check_rules(output_size, sampling_ratio, aligned, canonical_scale, canonical_level)
    rois = _rois.check_batched_rois(boxes, valid, levels[0], "features")
    return torch.ops.fastdet.roi_align(rois, levels, cells_per_pixel, *rules).unflatten(0, boxes.shape[:2])


def _check_rules(
    output_size: object,
    sampling_ratio: object,
    aligned: object,
    canonical_scale: object = 224,
    canonical_level: object = 4,
) -> tuple[int, int, int, bool, float, int]:
    """Arguments of the operator from the number of bins on. The last two matter only where there are several levels."""
    bins = _rois.check_output_size(output_size)
    return (
        *bins,
        _checks.integer("sampling_ratio", sampling_ratio, most=_rois.MOST_SAMPLES // max(bins)),
        _checks.flag("aligned", aligned),
        float(_checks.positive("canonical_scale", canonical_scale)),
        _checks.integer("canonical_level", canonical_level),
    )
