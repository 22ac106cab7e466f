"""From the raw output of a region proposal head to boxes inside their image, and scores.

Source of the encoding: Girshick et al. 2014 (arXiv:1311.2524), appendix C; of the anchors: Ren et al. 2015
(arXiv:1506.01497), section 3.1.1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastdet.ops import _checks
from fastdet.ops._library import define
from fastdet.ops.cpu.decode import decode_cpu, decode_planes

__all__ = ["Decoded", "decode", "decode_cpu", "decode_cuda", "decode_planes"]


class Decoded(NamedTuple):
    """The candidates of B images, N = H * W * A of each, in the order (h, w, a).

    boxes: fp32 [B, N, 4], clipped to the image; zeros where the box is not finite.
    scores: fp32 [B, N]; -inf for a candidate that must not be used.
    """

    boxes: Tensor
    scores: Tensor


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

    boxes, scores = decode_fake(deltas, logits, cell_anchors)
    if scores.numel():
        cell_anchors, sizes, min_side = cell_anchors.contiguous(), sizes.contiguous(), min_side.contiguous()
        stride = (stride_h, stride_w)
        kernel.launch(deltas, logits, cell_anchors, sizes, min_side, boxes, scores, stride=stride, clamp=clamp)
    return boxes, scores


def decode_fake(deltas: Tensor, logits: Tensor, cell_anchors: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
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
    """Boxes and scores of every anchor of a feature level. Carries no gradient.

    Args:
        deltas: [B, A * 4, H, W], fp32, fp16 or bf16 in any memory layout, as the convolution gave them; computed in
            fp32. Encoding: `fastdet.boxes.encode` without weights.
        logits: [B, A * L, H, W], likewise. With L = 1 the score is the logit; with L = 2 it is the object's (the
            second) less the background's.
        cell_anchors: [A, 4], x1, y1, x2, y2 in pixels: the anchors of the first cell.
        sizes: int64 [B, 2], (height, width) of each image in pixels, to which the boxes are clipped.
        stride: (down, across), in pixels: the distance between the anchors of neighboring cells.
        min_side: in pixels, a number or fp32 [B] with one for each image; None: 0.
        clamp: upper limit of the logarithms of the sides; None: without.

    Returns:
        Decoded: boxes [B, H * W * A, 4] in pixels and scores. The score is -inf if a side of the clipped box is below
        `min_side`, if the score is not finite, or if the box before clipping is not finite: that box is zeros.

    Raises:
        TypeError: an argument is not a tensor of the kind above, `stride` not a pair of ints.
        ValueError: shapes or devices that do not fit together; a stride that is not positive.
    """
    deltas, logits = _check_head_output("deltas", deltas).detach(), _check_head_output("logits", logits).detach()
    cell_anchors = _checks.boxes("cell_anchors", cell_anchors).detach()
    batch, channels, height, width = deltas.shape
    num_anchors = cell_anchors.shape[0]
    if channels != num_anchors * 4:
        raise ValueError(f"deltas must have {num_anchors * 4} channels for {num_anchors} anchors, got {channels}")
    if logits.shape not in [(batch, num_anchors * each, height, width) for each in (1, 2)]:
        expected = f"[{batch}, {num_anchors} or {num_anchors * 2}, {height}, {width}]"
        raise ValueError(f"logits must have the shape {expected}, got {list(logits.shape)}")
    _checks.tensor("sizes", sizes, (batch, 2), torch.int64)
    if not isinstance(min_side, Tensor) or min_side.ndim == 0:
        least = 0.0 if min_side is None else _checks.fp32("min_side", min_side)
        min_side = torch.full((batch,), least, dtype=torch.float32, device=deltas.device)
    min_side = _checks.tensor("min_side", _checks.floats("min_side", min_side), (batch,)).detach()
    _checks.same_device(deltas=deltas, logits=logits, cell_anchors=cell_anchors, sizes=sizes, min_side=min_side)
    if not isinstance(stride, tuple | list) or len(stride) != 2:
        raise TypeError(f"stride must be a pair (down, across), got {stride!r}")
    stride_h, stride_w = (_checks.integer("stride", step, least=1) for step in stride)
    limit = math.inf if clamp is None else _checks.fp32("clamp", clamp)
    return Decoded(*torch.ops.fastdet.decode(deltas, logits, cell_anchors, sizes, min_side, stride_h, stride_w, limit))


def _check_head_output(name: str, value: object) -> Tensor:
    """In its dtype: the kernel widens fp16 and bf16 as it reads."""
    tensor = _checks.tensor(name, value)
    if tensor.dtype not in _checks.FLOATS:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.ndim != 4:
        raise ValueError(f"{name} must have the shape [B, channels, H, W], got {list(tensor.shape)}")
    return tensor
