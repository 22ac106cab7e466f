"""Pairwise overlap of two batches of boxes: IoU and its generalized, distance and complete forms."""

import torch
import triton
import triton.language as tl

from .overlap import intersection_union, load_boxes, ratio_or_zero

BLOCK_N = 16
BLOCK_M = 128


@triton.jit
def _box_iou_kernel(
    boxes1_ptr,
    boxes2_ptr,
    angle1_ptr,
    angle2_ptr,
    out_ptr,
    num_boxes1,
    num_boxes2,
    eps,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One tile of one batch entry's matrix, written once.

                      boxes2
                  BLOCK_M  BLOCK_M
                 +--------+--------+
        BLOCK_N  | program|        |   program (tile, batch), tiles row by row
    boxes1       +--------+--------+
        BLOCK_N  |        |        |
                 +--------+--------+

    boxes1_ptr [B, N, 4], boxes2_ptr [B, M, 4]: fp32 corners, pixels, contiguous.
    angle1_ptr [B, N], angle2_ptr [B, M]: fp32 atan(width / height), radians; read by KIND "complete" alone.
    out_ptr [B, N, M]: fp32, contiguous.
    """
    batch = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(num_boxes2, BLOCK_M)
    row = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(0) % across * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < num_boxes1
    column_mask = column < num_boxes2
    first = batch * num_boxes1 + row
    second = batch * num_boxes2 + column
    ax1, ay1, ax2, ay2 = load_boxes(boxes1_ptr, first, row_mask)
    bx1, by1, bx2, by2 = load_boxes(boxes2_ptr, second, column_mask)
    ax1, ay1, ax2, ay2 = ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None]
    bx1, by1, bx2, by2 = bx1[None, :], by1[None, :], bx2[None, :], by2[None, :]

    inter, union = intersection_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    value = ratio_or_zero(inter, union)
    if KIND != "iou":
        hull_width = tl.maximum(tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1), 0.0)
        hull_height = tl.maximum(tl.maximum(ay2, by2) - tl.minimum(ay1, by1), 0.0)
        if KIND == "generalized":
            hull = hull_width * hull_height
            value -= ratio_or_zero(hull - union, hull)
        else:
            dx = (ax1 + ax2 - bx1 - bx2) * 0.5
            dy = (ay1 + ay2 - by1 - by2) * 0.5
            distance = tl.div_rn(dx * dx + dy * dy, hull_width * hull_width + hull_height * hull_height + eps)
            if KIND == "complete":
                angle1 = tl.load(angle1_ptr + first, mask=row_mask, other=0.0)
                angle2 = tl.load(angle2_ptr + second, mask=column_mask, other=0.0)
                turn = angle1[:, None] - angle2[None, :]
                aspect = turn * turn * 0.4052847345693511  # 4 / pi^2
                distance += tl.div_rn(aspect * aspect, 1.0 - value + aspect + eps)
            value -= distance

    out = out_ptr + first[:, None] * num_boxes2 + column[None, :]
    tl.store(out, value, mask=row_mask[:, None] & column_mask[None, :])


def launch(
    boxes1: torch.Tensor,
    boxes2: torch.Tensor,
    angle1: torch.Tensor,
    angle2: torch.Tensor,
    out: torch.Tensor,
    *,
    kind: str,
    eps: float,
) -> None:
    """Fill `out` [B, N, M] for `boxes1` [B, N, 4] and `boxes2` [B, M, 4]."""
    batch, num_boxes1, num_boxes2 = out.shape
    _box_iou_kernel[(triton.cdiv(num_boxes1, BLOCK_N) * triton.cdiv(num_boxes2, BLOCK_M), batch)](
        boxes1_ptr=boxes1,
        boxes2_ptr=boxes2,
        angle1_ptr=angle1,
        angle2_ptr=angle2,
        out_ptr=out,
        num_boxes1=num_boxes1,
        num_boxes2=num_boxes2,
        eps=eps,
        KIND=kind,
        BLOCK_N=BLOCK_N,
        BLOCK_M=BLOCK_M,
        enable_fp_fusion=False,
    )
