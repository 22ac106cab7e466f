"""The operations that a detector uses in evaluation, in ONNX's standard operators. Importing this needs `onnxscript`.

Each function builds the nodes of one `torch.ops.fastdet` operator, of the same arguments; tensors here are names of
values in the graph. The standard's `RoiAlign` and `NonMaxSuppression` compute what the CPU implementations do. Of
`MaxRoiPool` it leaves open how corners round, so that they are rounded before, and which cells belong to a bin: ONNX
Runtime's are torchvision's, with the same results bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx import TensorProto
from onnx.helper import make_tensor
from onnxscript import opset18

from fastdet.ops.cpu.nms import round_threshold_down
from fastdet.ops.roi_align import level_edges

# A value in the graph, which Python has no type for.
Value = Any
op: Any = opset18


def nms(
    boxes: Value, valid: Value, iou_threshold: float, max_keep: int, scores: Value | None = None
) -> tuple[Value, Value]:
    """`boxes` [groups, N, 4] and `valid` [groups, N], in the order of their ranks or with `scores` [groups, N]
    -> index [groups, max_keep], count."""
    if scores is not None:
        _, order = op.TopK(op.Where(valid, scores, _float(-math.inf)), op.Shape(scores, start=1, end=2), axis=1)
        rows = op.Expand(op.Unsqueeze(order, _ints(2)), _ints(1, 1, 4))
        boxes, valid = op.GatherElements(boxes, rows, axis=1), op.GatherElements(valid, order, axis=1)
        index, count = nms(boxes, valid, iou_threshold, max_keep)
        places = op.Range(_int(0), _int(max_keep), _int(1))
        kept = op.Less(op.Unsqueeze(places, _ints(0)), op.Unsqueeze(count, _ints(1)))
        return op.Where(kept, op.GatherElements(order, index, axis=1), _int(0)), count
    finite = op.Not(op.Or(op.IsNaN(boxes), op.IsInf(boxes)))
    finite = op.ReduceMin(op.Cast(finite, to=TensorProto.INT32), _ints(2), keepdims=0)
    valid = op.And(valid, op.Cast(finite, to=TensorProto.BOOL))
    # An inverted box overlaps nothing, but NonMaxSuppression would swap its corners.
    x1, y1, x2, y2 = op.Split(boxes, axis=2, num_outputs=4)
    boxes = op.Where(op.And(op.Greater(x2, x1), op.Greater(y2, y1)), boxes, _float(0.0))

    # Scores that encode the ranks, exact below 2^24: the highest for the first box, and below the threshold of 0 for a
    # box that is not valid.
    length = op.Squeeze(op.Shape(boxes, start=1, end=2))
    ranks = op.Cast(op.Range(length, _int(0), _int(-1)), to=TensorProto.FLOAT)
    scores = op.Where(valid, ranks, _float(-1.0))
    threshold = _float(round_threshold_down(iou_threshold))
    kept = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, _ints(1)), _int(max_keep), threshold, _float(0.0))
    # Rows of (group, class, box) in an order that the standard leaves open.
    kept = op.Gather(kept, _ints(0, 2), axis=1)
    zeros = op.Expand(_float(0.0), op.Shape(scores))
    top, index = op.TopK(op.ScatterND(zeros, kept, op.GatherND(scores, kept)), _ints(max_keep), axis=1)
    found = op.Greater(top, _float(0.0))
    count = op.ReduceSum(op.Cast(found, to=TensorProto.INT64), _ints(1), keepdims=0)
    return op.Where(found, index, _int(0)), count


def roi_align(
    rois: Value,
    features: Sequence[Value],
    scales: Sequence[float],
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> Value:
    """`rois` [K, 5], each from its level of `features` [B, C, H, W] -> [K, C, pooled_height, pooled_width]."""
    image, x1, y1, x2, y2 = op.Split(rois, axis=1, num_outputs=5)
    area = op.Mul(op.Sub(x2, x1), op.Sub(y2, y1))
    valid = op.GreaterOrEqual(image, _float(0.0))
    # Of each level the boxes that reach its least area and not that of the next.
    edges = level_edges(scales, canonical_scale, canonical_level, dtype=torch.float32)
    reached = [valid, *(op.And(valid, op.GreaterOrEqual(area, _float(edge))) for edge in edges)]
    pooled = _zeros(rois, features[0], pooled_height, pooled_width)
    for level, selected in enumerate(reached):
        if level + 1 < len(reached):
            selected = op.And(selected, op.Not(reached[level + 1]))

        def pool(rows: Value, level: int = level) -> Value:
            return op.RoiAlign(
                features[level],
                op.Slice(rows, _ints(1), _ints(5), _ints(1)),
                op.Cast(op.Squeeze(op.Slice(rows, _ints(0), _ints(1), _ints(1)), _ints(1)), to=TensorProto.INT64),
                coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
                output_height=pooled_height,
                output_width=pooled_width,
                sampling_ratio=max(sampling_ratio, 0),
                spatial_scale=scales[level],
            )

        pooled = _scatter_rows(pooled, rois, selected, pool)
    return pooled


def roi_pool(
    input: Value, rois: Value, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[Value, Value]:
    """`rois` [K, 5] of `input` [B, C, H, W] -> [K, C, pooled_height, pooled_width], and that again.

    The second stands for the cells of the maxima, which evaluation does not use.
    """
    image, *corners = op.Split(rois, axis=1, num_outputs=5)
    # Half away from zero, as torchvision rounds; `Round` goes to the even number.
    corners = op.Mul(op.Concat(*corners, axis=1), _float(spatial_scale))
    size = op.Abs(corners)
    whole = op.Floor(size)
    half = op.GreaterOrEqual(op.Sub(size, whole), _float(0.5))
    cells = op.Mul(op.Sign(corners), op.Add(whole, op.Cast(half, to=TensorProto.FLOAT)))

    def pool(rows: Value) -> Value:
        return op.MaxRoiPool(input, rows, pooled_shape=[pooled_height, pooled_width], spatial_scale=1.0)

    valid = op.GreaterOrEqual(image, _float(0.0))
    pooled = _zeros(rois, input, pooled_height, pooled_width)
    pooled = _scatter_rows(pooled, op.Concat(image, cells, axis=1), valid, pool)
    return pooled, op.Identity(pooled)


def stable_sort(self: Value, stable: bool = True, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    """torch's `sort`. `TopK` puts the lower index first among equal values, as a stable sort does."""
    length = op.Gather(op.Shape(self), _ints(dim), axis=0)
    return op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)


def _zeros(rois: Value, features: Value, height: int, width: int) -> Value:
    shape = op.Concat(op.Shape(rois, start=0, end=1), op.Shape(features, start=1, end=2), _ints(height, width), axis=0)
    return op.Expand(_float(0.0), shape)


def _scatter_rows(pooled: Value, rois: Value, selected: Value, pool: Callable[[Value], Value]) -> Value:
    """`pooled` [K, ...] with the results of `pool` in the rows of `rois` [K, 5] that are `selected`, bool [K, 1]."""
    rows = op.Transpose(op.NonZero(op.Squeeze(selected, _ints(1))), perm=[1, 0])
    return op.ScatterND(pooled, rows, pool(op.GatherND(rois, rows)))


def _float(value: float) -> Value:
    return op.Constant(value=make_tensor("", TensorProto.FLOAT, [], [value]))


def _int(value: int) -> Value:
    return op.Constant(value=make_tensor("", TensorProto.INT64, [], [value]))


def _ints(*values: int) -> Value:
    return op.Constant(value=make_tensor("", TensorProto.INT64, [len(values)], values))


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.fastdet.nms.default: nms,
    torch.ops.fastdet.roi_align.default: roi_align,
    torch.ops.fastdet.roi_pool.default: roi_pool,
    torch.ops.aten.sort.stable: stable_sort,
}
