"""Decoding of the output of a region proposal head in plain torch."""

import torch
from torch import Tensor

from fastdet import boxes as box_algebra


def decode_cpu(
    deltas: Tensor, logits: Tensor, cell_anchors: Tensor, sizes: Tensor, min_side: Tensor, *stride_and_clamp: float
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = deltas.shape
    grid = (batch, height, width, len(cell_anchors))
    count = height * width * len(cell_anchors)
    boxes = deltas.new_empty(batch, count, 4, dtype=torch.float32)
    scores = deltas.new_empty(batch, count, dtype=torch.float32)
    if scores.numel():
        corners, score = decode_planes(deltas, logits, cell_anchors, sizes, min_side, *stride_and_clamp)
        for corner, column in zip(corners, boxes.view(*grid, 4).unbind(-1), strict=True):
            column.copy_(corner.permute(0, 2, 3, 1))
        scores.view(grid).copy_(score.permute(0, 2, 3, 1))
    return boxes, scores


def decode_planes(
    deltas: Tensor,
    logits: Tensor,
    cell_anchors: Tensor,
    sizes: Tensor,
    min_side: Tensor,
    stride_h: float,
    stride_w: float,
    clamp: float,
) -> tuple[list[Tensor], Tensor]:
    """The four corners and the score of every candidate, fp32 [B, A, H, W] each; arguments as of the operator."""
    # Coordinate by coordinate in the layout of the input; anchors broadcast: x by (a, w), y by (a, h).
    batch, _, height, width = deltas.shape
    num_anchors = cell_anchors.shape[0]
    x = torch.arange(width, dtype=torch.float32, device=deltas.device) * stride_w
    y = torch.arange(height, dtype=torch.float32, device=deltas.device)[:, None] * stride_h
    x1, y1, x2, y2 = cell_anchors[:, :, None, None].unbind(1)
    planes = deltas.float().reshape(batch, num_anchors, 4, height, width).unbind(2)
    corners = box_algebra.decode_planes(planes, (x1 + x, y1 + y, x2 + x, y2 + y), clamp=clamp)

    logit = logits.float().reshape(batch, num_anchors, logits.shape[1] // num_anchors, height, width)
    score = logit[:, :, 1] - logit[:, :, 0] if logit.shape[2] == 2 else logit[:, :, 0]
    finite = _all_finite(*corners)
    limit_y, limit_x = sizes.float()[:, :, None, None, None].unbind(1)
    x1, y1, x2, y2 = clipped = [
        torch.where(finite, torch.minimum(corner.clamp(min=0), limit), 0.0)
        for corner, limit in zip(corners, (limit_x, limit_y, limit_x, limit_y), strict=True)
    ]
    least = min_side[:, None, None, None]
    kept = finite & _all_finite(score) & (x2 - x1 >= least) & (y2 - y1 >= least)
    return clipped, torch.where(kept, score, float("-inf"))


def _all_finite(*values: Tensor) -> Tensor:
    """Whether all are: infinity less itself is NaN, and so is NaN. Quicker than `torch.isfinite`."""
    total = values[0] - values[0]
    for value in values[1:]:
        total = total + (value - value)
    return total == 0
