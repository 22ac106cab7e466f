"""Clipped boxes and their scores from the raw deltas and logits of a region proposal head, in one pass."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.boxes import load_boxes, store_rows_of_4


class Config(NamedTuple):
    """Anchors per block, a power of two, and warps."""

    block_n: int
    num_warps: int


def config(num_anchors: int) -> Config:
    """One anchor per thread, so that all loads are in flight at once; fewer per block where there are few anchors."""
    block_n = 128 if num_anchors >= 1 << 14 else 64
    return Config(block_n=block_n, num_warps=block_n // 32)


@triton.jit(
    do_not_specialize=[
        "num_candidates",
        "width",
        "stride_h",
        "stride_w",
        "deltas_stride_b",
        "deltas_stride_c",
        "deltas_stride_h",
        "deltas_stride_w",
        "logits_stride_b",
        "logits_stride_c",
        "logits_stride_h",
        "logits_stride_w",
    ]
)
def _decode_kernel(
    # Tensors; contiguous where they have no strides
    deltas_ptr,  # [B, A * 4, H, W] fp32, fp16 or bf16
    logits_ptr,  # [B, A * NUM_LOGITS, H, W] fp32, fp16 or bf16; of two logits the second is the object's
    cell_anchors_ptr,  # [A, 4] fp32, pixels
    sizes_ptr,  # [B, 2] int64, (height, width) of each image in pixels
    min_side_ptr,  # [B] fp32, pixels
    boxes_ptr,  # [B, H * W * A, 4] fp32, pixels, output
    scores_ptr,  # [B, H * W * A] fp32, output; -inf where the box is not finite or too small
    # Sizes
    num_candidates,  # H * W * A
    width,
    # Scalars
    stride_h,  # pixels per cell
    stride_w,
    clamp,  # upper limit of dw and dh
    # Strides
    deltas_stride_b,
    deltas_stride_c,
    deltas_stride_h,
    deltas_stride_w,
    logits_stride_b,
    logits_stride_c,
    logits_stride_h,
    logits_stride_w,
    # Constexprs
    NUM_ANCHORS: tl.constexpr,
    NUM_LOGITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block of consecutive anchors of one image; index = (h * width + w) * NUM_ANCHORS + a.

        deltas, logits: any layout       boxes, scores: row after row
             +---+---+---+
           h | a |   |   |  channels     |  BLOCK_N  |  BLOCK_N  |  ...
             +---+---+---+     ->        program (image and block)
               w

    The anchor is not read but computed: cell_anchors[a] moved by (w * stride_w, h * stride_h) pixels.
    """
    # The program's anchors, [BLOCK_N], and their cells.
    num_blocks = tl.cdiv(num_candidates, BLOCK_N)
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    index = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = index < num_candidates
    cell = index // NUM_ANCHORS
    anchor = index % NUM_ANCHORS
    h = cell // width
    w = cell % width

    # Load the deltas and the score, [BLOCK_N] each, widened to fp32.
    h64 = h.to(tl.int64)
    w64 = w.to(tl.int64)
    dx_ptr = deltas_ptr + batch * deltas_stride_b + h64 * deltas_stride_h + w64 * deltas_stride_w
    dx_ptr += (anchor * 4).to(tl.int64) * deltas_stride_c
    # One after another, as a multiple of the stride might exceed int32.
    dy_ptr = dx_ptr + deltas_stride_c
    dw_ptr = dy_ptr + deltas_stride_c
    dh_ptr = dw_ptr + deltas_stride_c
    dx = tl.load(dx_ptr, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr, mask=mask, other=0.0).to(tl.float32)
    dw = tl.load(dw_ptr, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr, mask=mask, other=0.0).to(tl.float32)
    logit_ptr = logits_ptr + batch * logits_stride_b + h64 * logits_stride_h + w64 * logits_stride_w
    logit_ptr += (anchor * NUM_LOGITS).to(tl.int64) * logits_stride_c
    score = tl.load(logit_ptr, mask=mask, other=0.0).to(tl.float32)
    if NUM_LOGITS == 2:
        score = tl.load(logit_ptr + logits_stride_c, mask=mask, other=0.0).to(tl.float32) - score

    # Compute the anchors.
    shift_x = w.to(tl.float32) * stride_w
    shift_y = h.to(tl.float32) * stride_h
    ax1, ay1, ax2, ay2 = load_boxes(cell_anchors_ptr, anchor, mask)
    ax1, ay1, ax2, ay2 = ax1 + shift_x, ay1 + shift_y, ax2 + shift_x, ay2 + shift_y

    # Decode the deltas, clamped by comparison, as tl.minimum would turn NaN into a number.
    dw = tl.where(dw > clamp, clamp, dw)
    dh = tl.where(dh > clamp, clamp, dh)
    anchor_width = ax2 - ax1
    anchor_height = ay2 - ay1
    center_x = dx * anchor_width + (ax1 + 0.5 * anchor_width)
    center_y = dy * anchor_height + (ay1 + 0.5 * anchor_height)
    half_width = 0.5 * (tl.exp(dw) * anchor_width)
    half_height = 0.5 * (tl.exp(dh) * anchor_height)
    x1 = center_x - half_width
    y1 = center_y - half_height
    x2 = center_x + half_width
    y2 = center_y + half_height
    infinity = float("inf")
    finite = (tl.abs(x1) < infinity) & (tl.abs(y1) < infinity) & (tl.abs(x2) < infinity) & (tl.abs(y2) < infinity)

    # Clip to the image; boxes that are not finite become zeros.
    limit_y = tl.load(sizes_ptr + batch * 2).to(tl.float32)
    limit_x = tl.load(sizes_ptr + batch * 2 + 1).to(tl.float32)
    x1 = tl.where(finite, tl.minimum(tl.maximum(x1, 0.0), limit_x), 0.0)
    y1 = tl.where(finite, tl.minimum(tl.maximum(y1, 0.0), limit_y), 0.0)
    x2 = tl.where(finite, tl.minimum(tl.maximum(x2, 0.0), limit_x), 0.0)
    y2 = tl.where(finite, tl.minimum(tl.maximum(y2, 0.0), limit_y), 0.0)
    # Reject small boxes by their score.
    min_side = tl.load(min_side_ptr + batch)
    valid = finite & (tl.abs(score) < infinity) & (x2 - x1 >= min_side) & (y2 - y1 >= min_side)

    out = batch * num_candidates + index
    store_rows_of_4(boxes_ptr, out, x1, y1, x2, y2, mask)
    tl.store(scores_ptr + out, tl.where(valid, score, -infinity), mask=mask)


def launch(
    deltas: torch.Tensor,
    logits: torch.Tensor,
    cell_anchors: torch.Tensor,
    sizes: torch.Tensor,
    min_side: torch.Tensor,
    boxes: torch.Tensor,
    scores: torch.Tensor,
    *,
    stride: tuple[int, int],
    clamp: float,
) -> None:
    """Fill `boxes` [B, H * W * A, 4] and `scores` [B, H * W * A]; `stride` is (vertical, horizontal) in pixels."""
    batch, num_candidates = scores.shape
    num_anchors = cell_anchors.shape[0]
    block_n, num_warps = config(batch * num_candidates)
    # Images and blocks share the first axis of the grid, the only one that is not limited to 65535.
    _decode_kernel[(batch * triton.cdiv(num_candidates, block_n),)](
        deltas_ptr=deltas,
        logits_ptr=logits,
        cell_anchors_ptr=cell_anchors,
        sizes_ptr=sizes,
        min_side_ptr=min_side,
        boxes_ptr=boxes,
        scores_ptr=scores,
        num_candidates=num_candidates,
        width=deltas.shape[3],
        stride_h=stride[0],
        stride_w=stride[1],
        clamp=clamp,
        deltas_stride_b=deltas.stride(0),
        deltas_stride_c=deltas.stride(1),
        deltas_stride_h=deltas.stride(2),
        deltas_stride_w=deltas.stride(3),
        logits_stride_b=logits.stride(0),
        logits_stride_c=logits.stride(1),
        logits_stride_h=logits.stride(2),
        logits_stride_w=logits.stride(3),
        NUM_ANCHORS=num_anchors,
        NUM_LOGITS=logits.shape[1] // num_anchors,
        BLOCK_N=block_n,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
