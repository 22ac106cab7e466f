"""Pairwise overlap of two batches of boxes: IoU and its generalized, distance and complete forms."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.boxes import intersection_union, ratio_or_zero


class Config(NamedTuple):
    """Rows and columns of a tile, the columns a power of two, and warps: up to four columns a thread."""

    block_n: int
    block_m: int
    num_warps: int


def config(num_boxes1: int, num_boxes2: int) -> Config:
    """Few rows a program while there are few programs, for then a program takes as long as its rows."""
    block_m = min(max(triton.next_power_of_2(num_boxes2), 32), 512)
    many = num_boxes1 * num_boxes2 >= 1 << 24
    return Config(block_n=32 if many else 8, block_m=block_m, num_warps=max(block_m // 128, 1))


@triton.jit
def _load_corners(boxes_ptr, index):
    """Corners of the boxes `index`, of any shape, of a contiguous [.., 4] array.

    Number by number, and so in whatever layout the tile is written: boxes loaded as a whole lie one to a thread, and
    would have to be dealt out again for every row.
    """
    corner = boxes_ptr + index * 4
    return tl.load(corner), tl.load(corner + 1), tl.load(corner + 2), tl.load(corner + 3)


@triton.jit(do_not_specialize=["num_boxes1", "num_boxes2"])
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
    IN_FOURS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One tile of one batch entry's matrix, written once, row after row.

                      boxes2
                  BLOCK_M  BLOCK_M
                 +--------+--------+
        BLOCK_N  | program|        |   program (tile of all batch entries, row by row)
    boxes1       +--------+--------+
        BLOCK_N  |        |        |   the boxes of its columns stay in registers
                 +--------+--------+

    boxes1_ptr [B, N, 4], boxes2_ptr [B, M, 4]: fp32 corners, pixels, contiguous.
    angle1_ptr [B, N], angle2_ptr [B, M]: fp32 atan(width / height), radians; read by KIND "complete" alone.
    out_ptr [B, N, M]: fp32, contiguous. IN_FOURS says that M is a multiple of 4: then four numbers are one store.
    """
    width = num_boxes2 // 4 * 4 if IN_FOURS else num_boxes2
    across = tl.cdiv(width, BLOCK_M)
    tiles = tl.cdiv(num_boxes1, BLOCK_N) * across
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    column = tile % across * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = column < width
    second = batch * width + tl.minimum(column, width - 1)
    bx1, by1, bx2, by2 = _load_corners(boxes2_ptr, second)
    if KIND == "complete":
        angle2 = tl.load(angle2_ptr + second)

    first_row = tile // across * BLOCK_N
    for row in range(first_row, tl.minimum(first_row + BLOCK_N, num_boxes1)):
        first = batch * num_boxes1 + row
        ax1, ay1, ax2, ay2 = _load_corners(boxes1_ptr, first)
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
                    turn = tl.load(angle1_ptr + first) - angle2
                    aspect = turn * turn * 0.4052847345693511  # 4 / pi^2
                    distance += tl.div_rn(aspect * aspect, 1.0 - value + aspect + eps)
                value -= distance
        tl.store(out_ptr + first * width + column, value, mask=mask)


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
    block_n, block_m, num_warps = config(num_boxes1, num_boxes2)
    # In one axis: the others may not be long.
    _box_iou_kernel[(batch * triton.cdiv(num_boxes1, block_n) * triton.cdiv(num_boxes2, block_m),)](
        boxes1_ptr=boxes1,
        boxes2_ptr=boxes2,
        angle1_ptr=angle1,
        angle2_ptr=angle2,
        out_ptr=out,
        num_boxes1=num_boxes1,
        num_boxes2=num_boxes2,
        eps=eps,
        KIND=kind,
        IN_FOURS=num_boxes2 % 4 == 0,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
