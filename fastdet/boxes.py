"""Box algebra in plain torch: boxes are x1, y1, x2, y2 in pixels, continuous (no + 1).

fp16 and bf16 are widened to fp32. No function has a host sync, and shapes depend on shapes alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Weights = tuple[float, float, float, float]


def to_corners(boxes: Any) -> Any:
    """Boxes as a plain tensor x1, y1, x2, y2: torchvision's `BoundingBoxes` by their format, others as given."""
    if type(boxes) is Tensor:
        return boxes
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional

    if isinstance(boxes, tv_tensors.BoundingBoxes):
        boxes = functional.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    return boxes.as_subclass(Tensor) if isinstance(boxes, tv_tensors.TVTensor) else boxes


def encode(reference: Tensor, boxes: Tensor, weights: Weights = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The deltas [..., 4] from `reference` [..., 4] to `boxes` [..., 4], the targets of a regressor; the two broadcast.

    With (x, y, w, h) the center and the sides: (w_x (x - x_a) / w_a, w_y (y - y_a) / h_a, w_w log(w / w_a),
    w_h log(h / h_a)), the factors being `weights`. Girshick et al. 2014 (arXiv:1311.2524), appendix C. A box or a
    reference with a side of 0 gives infinities or NaN: mask such rows.
    """
    ax, ay, aw, ah = _center_and_sides(_widen(reference).unbind(-1))
    x, y, w, h = _center_and_sides(_widen(boxes).unbind(-1))
    wx, wy, ww, wh = weights
    parts = (wx * (x - ax) / aw, wy * (y - ay) / ah, ww * torch.log(w / aw), wh * torch.log(h / ah))
    return torch.stack(parts, dim=-1)


def decode(
    deltas: Tensor,
    reference: Tensor,
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
    clamp: float | None = None,
) -> Tensor:
    """The boxes [..., 4] at `deltas` [..., 4] from `reference` [..., 4]: the inverse of `encode`; the two broadcast.

    The logarithms of the sides are limited to `clamp` (after the division by the weights), so that an exponential
    cannot overflow; None: no limit.
    """
    planes = decode_planes(_widen(deltas).unbind(-1), _widen(reference).unbind(-1), weights, clamp)
    return torch.stack(planes, dim=-1)


def decode_planes(
    deltas: Sequence[Tensor],
    reference: Sequence[Tensor],
    weights: Weights = (1.0, 1.0, 1.0, 1.0),
    clamp: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`decode` on four tensors of one coordinate each, fp32 at least; they broadcast."""
    ax, ay, aw, ah = _center_and_sides(reference)
    dx, dy, dw, dh = (part if weight == 1 else part / weight for part, weight in zip(deltas, weights, strict=True))
    if clamp is not None:
        dw, dh = dw.clamp(max=clamp), dh.clamp(max=clamp)
    x, y = dx * aw + ax, dy * ah + ay
    half_w, half_h = 0.5 * (torch.exp(dw) * aw), 0.5 * (torch.exp(dh) * ah)
    return x - half_w, y - half_h, x + half_w, y + half_h


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """`boxes` [B, ..., 4] clipped to 0..width and 0..height, of which `sizes` [B, 2] is (height, width); NaN stays."""
    boxes = _widen(boxes)
    limit = sizes.flip(-1).repeat(1, 2).to(boxes.dtype)
    limit = limit.reshape(sizes.shape[0], *(1,) * (boxes.ndim - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limit)


def sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height, [...] each, of `boxes` [..., 4]; negative where a box is inverted."""
    x1, y1, x2, y2 = _widen(boxes).unbind(-1)
    return x2 - x1, y2 - y1


def are_as_large(boxes: Tensor, least: float | Tensor) -> Tensor:
    """bool [...]: which of `boxes` [..., 4] are at least `least` pixels wide and high; of a tensor, each its own."""
    width, height = sides(boxes)
    return (width >= least) & (height >= least)


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _center_and_sides(corners: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = corners
    w, h = x2 - x1, y2 - y1
    return x1 + 0.5 * w, y1 + 0.5 * h, w, h
