"""RoI align: the mean of samples between the cells of each bin of each region of interest, from one map or a pyramid.

Sources: He et al. 2017 (arXiv:1703.06870), section 3, for the samples; Lin et al. 2017 (arXiv:1612.03144), equation 1,
for the level of the pyramid a region is pooled from. Both as torchvision computes them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdet.ops import _checks, _pyramid, _rois
from fastdet.ops._library import define
from fastdet.ops.cpu.roi_align import roi_align_backward_cpu, roi_align_cpu, shapes_of


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

    grads = [_empty(grad, shape, torch.channels_last) for shape in shapes_of(sizes)]
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
        extents=grad.new_empty(sizes[0], 3, dtype=torch.int64),
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


def roi_align_fake(
    rois: Tensor, features: list[Tensor], scales: list[float], pooled_height: int, pooled_width: int, *_: Any
) -> Tensor:
    first = features[0]
    return _empty(first, (rois.shape[0], first.shape[1], pooled_height, pooled_width), _layout(first))


def roi_align_backward_fake(grad: Tensor, rois: Tensor, sizes: list[int], *_: Any) -> list[Tensor]:
    return [_empty(grad, shape, _layout(grad)) for shape in shapes_of(sizes)]


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
        boxes: [K, 5], index of the image and x1, y1, x2, y2 in pixels; or one [L, 4] for each image. fp32, or
            the dtype of `input`.
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
        boxes: [K, 5], index of the image and x1, y1, x2, y2 in pixels; or one [L, 4] for each image. fp32, or
            the dtype of `features`.
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
        boxes: [B, S, 4], x1, y1, x2, y2 in pixels; fp32, or the dtype of `features`.
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
    return _checks.integer("sampling_ratio", sampling_ratio), _checks.flag("aligned", aligned)


def _canonical(scale: object, level: object) -> tuple[float, int]:
    return float(_checks.positive("canonical_scale", scale)), _checks.integer("canonical_level", level)
