"""Pairwise overlap of two batches of boxes: IoU and its generalized, distance and complete forms."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.boxes import intersection_union, ratio_or_zero


class Config(NamedTuple):
    """Rows and columns of a tile, the columns a power of two, and warps: up to four columns per thread."""

    block_n: int
    block_m: int
    num_warps: int


def config(num_boxes1: int, num_boxes2: int) -> Config:
    """Few rows per program while there are few programs, as the time of a program is that of its rows."""
    block_m = min(max(triton.next_power_of_2(num_boxes2), 32), 512)
    is_large = num_boxes1 * num_boxes2 >= 1 << 24
    return Config(block_n=32 if is_large else 8, block_m=block_m, num_warps=max(block_m // 128, 1))


@triton.jit
def _load_corners(
    boxes_ptr,  # [.., 4] fp32, contiguous
    index,  # int64 of any shape, rows of it
):
    """Corners x1, y1, x2, y2 of boxes, loaded one by one, in the layout of the tile that is written.

    Boxes that are loaded whole lie one per thread, and would have to be redistributed for every row.
    """
    corner_ptr = boxes_ptr + index * 4
    return tl.load(corner_ptr), tl.load(corner_ptr + 1), tl.load(corner_ptr + 2), tl.load(corner_ptr + 3)


@triton.jit(do_not_specialize=["num_boxes1", "num_boxes2"])
def _box_iou_kernel(
    # Tensors, all contiguous
    boxes1_ptr,  # [B, N, 4] fp32, pixels
    boxes2_ptr,  # [B, M, 4] fp32, pixels
    angle1_ptr,  # [B, N] fp32, atan(width / height) in radians; read if KIND is "complete"
    angle2_ptr,  # [B, M] fp32, the same
    out_ptr,  # [B, N, M] fp32, output
    # Sizes
    num_boxes1,
    num_boxes2,
    # Scalars
    eps,
    # Constexprs
    KIND: tl.constexpr,  # "iou", "generalized", "distance" or "complete"
    VECTOR_STORES: tl.constexpr,  # M is a multiple of 4, so that four values are one store
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
    """
    # The program's batch entry, tile and columns.
    width = num_boxes2 // 4 * 4 if VECTOR_STORES else num_boxes2
    tile_columns = tl.cdiv(width, BLOCK_M)
    num_tiles = tl.cdiv(num_boxes1, BLOCK_N) * tile_columns
    batch = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    column = tile % tile_columns * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask = column < width

    # Load the boxes of the columns, [BLOCK_M] each.
    index2 = batch * width + tl.minimum(column, width - 1)
    bx1, by1, bx2, by2 = _load_corners(boxes2_ptr, index2)
    if KIND == "complete":
        angle2 = tl.load(angle2_ptr + index2)

    first_row = tile // tile_columns * BLOCK_N
    for row in range(first_row, tl.minimum(first_row + BLOCK_N, num_boxes1)):
        # One box of the rows, scalars, against those of the columns.
        index1 = batch * num_boxes1 + row
        ax1, ay1, ax2, ay2 = _load_corners(boxes1_ptr, index1)
        inter, union = intersection_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
        value = ratio_or_zero(inter, union)  # [BLOCK_M]
        if KIND != "iou":
            # Subtract the penalty, which is relative to the smallest box around both.
            hull_width = tl.maximum(tl.maximum(ax2, bx2) - tl.minimum(ax1, bx1), 0.0)
            hull_height = tl.maximum(tl.maximum(ay2, by2) - tl.minimum(ay1, by1), 0.0)
            if KIND == "generalized":
                hull = hull_width * hull_height
                uncovered = ratio_or_zero(hull - union, hull)
                # Of an inverted box with an infinite side it is infinite, and the IoU 0.
                value = tl.where(uncovered < float("inf"), value - uncovered, 0.0)
            else:
                dx = (ax1 + ax2 - bx1 - bx2) * 0.5
                dy = (ay1 + ay2 - by1 - by2) * 0.5
                penalty = tl.div_rn(dx * dx + dy * dy, hull_width * hull_width + hull_height * hull_height + eps)
                if KIND == "complete":
                    angle_difference = tl.load(angle1_ptr + index1) - angle2
                    aspect = angle_difference * angle_difference * 0.4052847345693511  # 4 / pi^2
                    penalty += tl.div_rn(aspect * aspect, 1.0 - value + aspect + eps)
                value -= penalty
        tl.store(out_ptr + index1 * width + column, value, mask=mask)


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
    # One axis, as the other axes of a grid are limited to 65535.
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
        VECTOR_STORES=num_boxes2 % 4 == 0,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
