"""From the raw output of a region proposal head to boxes inside their image, and scores.

Source of the encoding: Girshick et al. 2014 (arXiv:1311.2524), appendix C; of the anchors: Ren et al. 2015
(arXiv:1506.01497), section 3.1.1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdet import boxes as algebra
from fastdet.ops import _checks
from fastdet.ops._library import define


class Decoded(NamedTuple):
    """The candidates of B images, N = H * W * A of each, in the order (h, w, a).

    boxes: fp32 [B, N, 4], clipped to the image; zeros where the box is not finite.
    scores: fp32 [B, N]; -inf for a candidate that must not be used.
    """

    boxes: Tensor
    scores: Tensor


def decode_cpu(
    deltas: Tensor,
    logits: Tensor,
    cell_anchors: Tensor,
    sizes: Tensor,
    min_side: Tensor,
    stride_h: int,
    stride_w: int,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    boxes, scores = decode_fake(deltas, logits, cell_anchors, sizes, min_side, stride_h, stride_w, clamp)
    if not scores.numel():
        return boxes, scores
    corners, score = decoded_planes(deltas, logits, cell_anchors, sizes, min_side, stride_h, stride_w, clamp)
    batch, num_anchors, height, width = score.shape
    grid = (batch, height, width, num_anchors)
    for corner, column in zip(corners, boxes.view(*grid, 4).unbind(-1), strict=True):
        column.copy_(corner.permute(0, 2, 3, 1))
    scores.view(grid).copy_(score.permute(0, 2, 3, 1))
    return boxes, scores


def decoded_planes(
    deltas: Tensor,
    logits: Tensor,
    cell_anchors: Tensor,
    sizes: Tensor,
    min_side: Tensor,
    stride_h: int,
    stride_w: int,
    clamp: float,
) -> tuple[list[Tensor], Tensor]:
    """The four corners and the score of every candidate, fp32 [B, A, H, W] each, in plain torch."""
    # Coordinate by coordinate in the layout of the input; anchors broadcast: x by (a, w), y by (a, h).
    batch, _, height, width = deltas.shape
    num_anchors = cell_anchors.shape[0]
    x = torch.arange(width, dtype=torch.float32, device=deltas.device) * stride_w
    y = torch.arange(height, dtype=torch.float32, device=deltas.device)[:, None] * stride_h
    x1, y1, x2, y2 = cell_anchors[:, :, None, None].unbind(1)
    planes = deltas.float().reshape(batch, num_anchors, 4, height, width).unbind(2)
    corners = algebra.decode_planes(planes, (x1 + x, y1 + y, x2 + x, y2 + y), clamp=clamp)

    logit = logits.float().reshape(batch, num_anchors, logits.shape[1] // num_anchors, height, width)
    score = logit[:, :, 1] - logit[:, :, 0] if logit.shape[2] == 2 else logit[:, :, 0]
    finite = _finite(*corners)
    limit_y, limit_x = sizes.float()[:, :, None, None, None].unbind(1)
    x1, y1, x2, y2 = held = [
        torch.where(finite, torch.minimum(corner.clamp(min=0), limit), 0.0)
        for corner, limit in zip(corners, (limit_x, limit_y, limit_x, limit_y), strict=True)
    ]
    least = min_side[:, None, None, None]
    kept = finite & _finite(score) & (x2 - x1 >= least) & (y2 - y1 >= least)
    return held, torch.where(kept, score, float("-inf"))


def _finite(*values: Tensor) -> Tensor:
    """Whether all are: infinity less itself is NaN, and so is NaN. Quicker than `torch.isfinite`."""
    total = values[0] - values[0]
    for value in values[1:]:
        total = total + (value - value)
    return total == 0


def decode_cuda(
    deltas: Tensor,
    logits: Tensor,
    cell_anchors: Tensor,
    sizes: Tensor,
    min_side: Tensor,
    stride_h: int,
    stride_w: int,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    from fastdet.kernels import decode as kernel

    boxes, scores = decode_fake(deltas, logits, cell_anchors, sizes, min_side, stride_h, stride_w, clamp)
    if scores.numel():
        cell_anchors, sizes, min_side = cell_anchors.contiguous(), sizes.contiguous(), min_side.contiguous()
        stride = (stride_h, stride_w)
        kernel.launch(deltas, logits, cell_anchors, sizes, min_side, boxes, scores, stride=stride, clamp=clamp)
    return boxes, scores


def decode_fake(
    deltas: Tensor,
    logits: Tensor,
    cell_anchors: Tensor,
    sizes: Tensor,
    min_side: Tensor,
    stride_h: int,
    stride_w: int,
    clamp: float,
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = deltas.shape
    count = height * width * cell_anchors.shape[0]
    boxes = deltas.new_empty(batch, count, 4, dtype=torch.float32)
    return boxes, deltas.new_empty(batch, count, dtype=torch.float32)


define(
    "decode(Tensor deltas, Tensor logits, Tensor cell_anchors, Tensor sizes, Tensor min_side, SymInt stride_h, "
    "SymInt stride_w, float clamp) -> (Tensor boxes, Tensor scores)",
    cpu=decode_cpu,
    cuda=decode_cuda,
    fake=decode_fake,
)


def decode(
    deltas: Tensor,
    logits: Tensor,
    cell_anchors: Tensor,
    sizes: Tensor,
    *,
    stride: tuple[int, int],
    min_side: Tensor | float | None = None,
    clamp: float | None = None,
) -> Decoded:
    """Boxes and scores of every anchor of a feature level.

    `deltas` [B, A * 4, H, W] and `logits` [B, A * L, H, W] are what the convolutions gave, in any memory layout. With
    L = 1 the score is the logit; with L = 2 it is the object's (the second) less the background's. `cell_anchors`
    [A, 4], pixels, are the anchors of the first cell; `stride` is by how many pixels (down, across) those of the next
    cell are moved. `sizes` int64 [B, 2] is (height, width) of each image. The logarithms of the sides are held to at
    most `clamp`. fp16 and bf16 are computed in fp32. Carries no gradient.

    The score is -inf if a side of the clipped box is below `min_side` (a number, or fp32 [B], one for each image), if
    the score is not finite, or if the box, before it is clipped, is not finite: that box is zeros.

    Raises:
        TypeError: an argument is not a tensor of the kind above.
        ValueError: shapes or devices that do not fit together; a stride that is not positive.
    """
    deltas, logits = _head("deltas", deltas).detach(), _head("logits", logits).detach()
    cell_anchors = _checks.boxes("cell_anchors", cell_anchors).detach()
    batch, channels, height, width = deltas.shape
    num_anchors = cell_anchors.shape[0]
    if channels != num_anchors * 4:
        raise ValueError(f"deltas must have {num_anchors * 4} channels for {num_anchors} anchors, got {channels}")
    if logits.shape not in [(batch, num_anchors * each, height, width) for each in (1, 2)]:
        wanted = f"[{batch}, {num_anchors} or {num_anchors * 2}, {height}, {width}]"
        raise ValueError(f"logits must have the shape {wanted}, got {list(logits.shape)}")
    _checks.integers("sizes", sizes, (batch, 2))
    if not isinstance(min_side, Tensor):
        least = 0.0 if min_side is None else _checks.number("min_side", min_side)
        min_side = torch.full((batch,), least, dtype=torch.float32, device=deltas.device)
    min_side = _checks.shape("min_side", _checks.floats("min_side", min_side), (batch,)).detach()
    _checks.same_device(deltas=deltas, logits=logits, cell_anchors=cell_anchors, sizes=sizes, min_side=min_side)
    if not isinstance(stride, tuple | list) or len(stride) != 2:
        raise TypeError(f"stride must be a pair (down, across), got {stride!r}")
    stride_h, stride_w = (_checks.integer("stride", step, least=1) for step in stride)
    bound = math.inf if clamp is None else float(_checks.number("clamp", clamp))
    out = torch.ops.fastdet.decode(deltas, logits, cell_anchors, sizes, min_side, stride_h, stride_w, bound)
    return Decoded(*out)


def _head(name: str, value: object) -> Tensor:
    """As it is: the kernel widens fp16 and bf16 as it reads."""
    tensor = _checks.is_tensor(name, value)
    if tensor.dtype not in _checks.FLOATS:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.ndim != 4:
        raise ValueError(f"{name} must have the shape [B, channels, H, W], got {list(tensor.shape)}")
    return tensor
