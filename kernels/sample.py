"""The candidates of the smallest random keys: positives up to a quota, then negatives.

One program per image could not count fast enough, so many candidates are first thinned, tile by tile and in parallel,
to those that may still be chosen.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastdet.kernels.common.sample_codes import IGNORED, KEY_END, NEGATIVE, count_below, find_bound, load_codes

MIN_BLOCK_K = 128
SMALL_BLOCK_K = 4096
MAX_BLOCK_K = 16384
MAX_SCAN_K = 4096
READ_BLOCK_K = 512


class Config(NamedTuple):
    """Candidates of a tile to count and of a tile to scan, powers of two, and warps."""

    block_k: int
    scan_k: int
    num_warps: int


def config(span: int) -> Config:
    """Sizes for programs of `span` candidates: one tile where possible, which then stays in registers, and is scanned
    at once where they suffice.

    Tiles that every pass reads anew are small, as their keys are computed anew too.
    """
    if span > MAX_BLOCK_K:
        return Config(READ_BLOCK_K, READ_BLOCK_K, 4)
    block = max(triton.next_power_of_2(span), MIN_BLOCK_K)
    return Config(block, min(block, MAX_SCAN_K), 8 if block <= 4096 else 16)


@triton.jit
def _pack_by_class(flag, is_negative):
    """1 for a flagged positive, 2^16 for a flagged negative, so that one scan or sum serves both classes."""
    return tl.where(flag, tl.where(is_negative, 0x10000, 1), 0)


@triton.jit
def _unpack_class(packed, is_negative):
    """The count of one class in a scan or sum of `_pack_by_class`."""
    return tl.where(is_negative, packed >> 16, packed) & 0xFFFF


@triton.jit(do_not_specialize=["num_candidates", "span", "num_slots", "max_positive"])
def _sample_kernel(
    # Tensors, all contiguous
    label_ptr,  # [B, K] int64, 1 positive, 0 negative; not read if HAS_CODES
    seed_ptr,  # [B] int64; not read if HAS_CODES
    code_ptr,  # [B, K] int32, codes that an earlier launch kept; read if HAS_CODES
    position_ptr,  # [B, K] int32, their candidates, counted in the image; read if HAS_CODES
    index_ptr,  # [B, num_slots] int64, output unless THIN: candidates, 0 in an empty slot
    weight_ptr,  # [B, num_slots] fp32, output unless THIN: 1, 0 in an empty slot
    thin_code_ptr,  # [B, spans, num_slots] int32, output if THIN: codes, IGNORED in an empty slot
    thin_position_ptr,  # [B, spans, num_slots] int32, output if THIN: candidates, counted in the image
    # Sizes
    num_candidates,  # K
    span,  # candidates per program
    num_slots,
    max_positive,
    # Constexprs
    HAS_CODES: tl.constexpr,
    THIN: tl.constexpr,
    ONE_TILE: tl.constexpr,  # span <= BLOCK_K
    BLOCK_K: tl.constexpr,
    SCAN_K: tl.constexpr,
):
    """Fills the slots of one span of one image: its positives of the smallest keys, then its negatives, then nothing.

    candidates  |  BLOCK_K  |  BLOCK_K  |  ...      program (image and span); the last launch has one span
                     |
    slots       | positives, ascending | negatives, ascending | empty |
    """
    # The program's candidates [begin, end) of its image, and their codes [BLOCK_K], or the first of them.
    num_spans = tl.maximum(tl.cdiv(num_candidates, tl.maximum(span, 1)), 1)
    batch = (tl.program_id(0) // num_spans).to(tl.int64)
    first = batch * num_candidates
    begin = tl.program_id(0) % num_spans * span
    end = tl.minimum(begin + span, num_candidates)
    seed = tl.full([], 0, dtype=tl.int64)
    if not HAS_CODES:
        seed = tl.load(seed_ptr + batch)
    codes = load_codes(label_ptr, code_ptr, first, begin, end, seed, HAS_CODES, BLOCK_K)

    # Count each class, and limit it to its quota.
    if ONE_TILE:
        packed = tl.sum(_pack_by_class(codes < IGNORED, codes >= NEGATIVE), axis=0)
        positives = _unpack_class(packed, False)
        both = positives + _unpack_class(packed, True)
    else:
        positives = count_below(
            NEGATIVE, codes, label_ptr, code_ptr, first, begin, end, seed, HAS_CODES, ONE_TILE, BLOCK_K
        )
        both = count_below(IGNORED, codes, label_ptr, code_ptr, first, begin, end, seed, HAS_CODES, ONE_TILE, BLOCK_K)
    num_positive = tl.minimum(positives, max_positive)
    num_negative = tl.minimum(both - positives, num_slots - num_positive)

    # The bound of each class: chosen are the codes below it, and of those equal to it the first `ties`.
    positive_bound = tl.full([], KEY_END, dtype=tl.int32)
    positive_ties = tl.full([], 0, dtype=tl.int32)
    if num_positive < positives:
        positive_bound, below = find_bound(
            num_positive, 0, 0, codes, label_ptr, code_ptr, first, begin, end, seed, HAS_CODES, ONE_TILE, BLOCK_K
        )
        positive_ties = num_positive - below
    negative_bound = tl.full([], NEGATIVE + KEY_END, dtype=tl.int32)
    negative_ties = tl.full([], 0, dtype=tl.int32)
    if positives + num_negative < both:
        rank = positives + num_negative
        negative_bound, below = find_bound(
            rank, NEGATIVE, positives, codes, label_ptr, code_ptr, first, begin, end, seed, HAS_CODES, ONE_TILE, BLOCK_K
        )
        negative_ties = rank - below

    # Write the chosen to their slots: one tile from registers, or smaller ones, read once more, as a scan needs many.
    out = tl.program_id(0).to(tl.int64) * num_slots
    next_positive = 0
    next_negative = num_positive
    ONE_SCAN: tl.constexpr = ONE_TILE and SCAN_K == BLOCK_K
    for start in range(begin, begin + SCAN_K if ONE_SCAN else end, SCAN_K):
        if ONE_SCAN:
            tile = codes
        else:
            tile = load_codes(label_ptr, code_ptr, first, start, end, seed, HAS_CODES, SCAN_K)  # [SCAN_K]
        is_negative = tile >= NEGATIVE
        bound = tl.where(is_negative, negative_bound, positive_bound)
        chosen = tile < bound
        if positive_ties + negative_ties > 0:
            # Choose the first of each class's ties, and advance those that are left.
            ties = tl.where(is_negative, negative_ties, positive_ties)
            tied = tile == bound
            packed_ties = _pack_by_class(tied, is_negative)
            chosen = chosen | (tied & (_unpack_class(tl.cumsum(packed_ties, axis=0), is_negative) <= ties))
            num_ties = tl.sum(packed_ties, axis=0)
            positive_ties = tl.maximum(positive_ties - _unpack_class(num_ties, False), 0)
            negative_ties = tl.maximum(negative_ties - _unpack_class(num_ties, True), 0)
        # Compute the slot of each chosen candidate: after those of its class before it.
        packed_chosen = _pack_by_class(chosen, is_negative)
        up_to = _unpack_class(tl.cumsum(packed_chosen, axis=0), is_negative)
        slot = tl.where(is_negative, next_negative, next_positive) + up_to - 1
        # Advance the next slots.
        num_chosen = tl.sum(packed_chosen, axis=0)
        next_positive += _unpack_class(num_chosen, False)
        next_negative += _unpack_class(num_chosen, True)
        position = start + tl.arange(0, SCAN_K)
        if HAS_CODES:
            position = tl.load(position_ptr + first + position, mask=chosen, other=0)
        if THIN:
            tl.store(thin_code_ptr + out + slot, tile, mask=chosen)
            tl.store(thin_position_ptr + out + slot, position, mask=chosen)
        else:
            tl.store(index_ptr + out + slot, position.to(tl.int64), mask=chosen)

    # Mark the empty slots.
    num_filled = num_positive + num_negative
    for start in range(0, num_slots, 128):
        slot = start + tl.arange(0, 128)
        empty = (slot >= num_filled) & (slot < num_slots)
        if THIN:
            tl.store(thin_code_ptr + out + slot, tl.full([128], IGNORED, dtype=tl.int32), mask=empty)
        else:
            tl.store(index_ptr + out + slot, tl.zeros([128], dtype=tl.int64), mask=empty)
            tl.store(weight_ptr + out + slot, (slot < num_filled).to(tl.float32), mask=slot < num_slots)


def thinning(num_candidates: int, num_samples: int) -> int:
    """Candidates that a program of the first launch thins to `num_samples`; 0 for no such launch.

    The smallest tile such that what all tiles keep fits one tile; else the largest tile, if it at least halves the
    candidates.
    """
    if num_candidates <= SMALL_BLOCK_K:
        return 0
    tile = SMALL_BLOCK_K
    while tile < MAX_BLOCK_K and triton.cdiv(num_candidates, tile) * num_samples > tile:
        tile *= 2
    return tile if triton.cdiv(num_candidates, tile) * num_samples * 2 <= num_candidates else 0


def launch_thin(
    label: torch.Tensor,
    seed: torch.Tensor,
    code: torch.Tensor,
    position: torch.Tensor,
    *,
    span: int,
    max_positive: int,
) -> None:
    """Fill `code` and `position` [B, spans, num_slots] with the candidates of each span that may still be chosen."""
    _launch(label, seed, None, None, None, None, code, position, span=span, max_positive=max_positive)


def launch(
    label: torch.Tensor,
    seed: torch.Tensor,
    code: torch.Tensor | None,
    position: torch.Tensor | None,
    index: torch.Tensor,
    weight: torch.Tensor,
    *,
    max_positive: int,
) -> None:
    """Fill `index` and `weight` [B, S] from `label` [B, K] and `seed` [B], or from what `launch_thin` kept."""
    span = label.shape[1] if code is None else code.shape[1] * code.shape[2]
    _launch(label, seed, code, position, index, weight, None, None, span=span, max_positive=max_positive)


def _launch(
    label: torch.Tensor,
    seed: torch.Tensor,
    code: torch.Tensor | None,
    position: torch.Tensor | None,
    index: torch.Tensor | None,
    weight: torch.Tensor | None,
    thin_code: torch.Tensor | None,
    thin_position: torch.Tensor | None,
    *,
    span: int,
    max_positive: int,
) -> None:
    slots = index if thin_code is None else thin_code
    assert slots is not None
    block_k, scan_k, num_warps = config(span)
    _sample_kernel[(slots.shape[0] * (1 if thin_code is None else thin_code.shape[1]),)](
        label_ptr=label,
        seed_ptr=seed,
        code_ptr=code,
        position_ptr=position,
        index_ptr=index,
        weight_ptr=weight,
        thin_code_ptr=thin_code,
        thin_position_ptr=thin_position,
        num_candidates=label.shape[1] if code is None else span,
        span=span,
        num_slots=slots.shape[-1],
        max_positive=max_positive,
        HAS_CODES=code is not None,
        THIN=thin_code is not None,
        ONE_TILE=span <= block_k,
        BLOCK_K=block_k,
        SCAN_K=scan_k,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
