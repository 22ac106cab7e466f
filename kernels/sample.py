"""The candidates of the smallest random keys: positives up to a quota, then negatives.

Keys are not read but computed, from the seed and the candidate's number alone, so that no order of the work changes
them. A candidate is one int32, its code: the key of KEY_BITS bits for a positive, 2^30 more for a negative, IGNORED for
the rest. Codes order the positives before the negatives before the rest, and a bound for the k smallest is found bit by
bit, in passes that count: some log2(N) of them, KEY_BITS at most.

One program on one image could not count fast enough, so many candidates are first thinned, tile by tile and in
parallel, to those that may still be chosen.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

KEY_BITS = tl.constexpr(29)
KEY_END = tl.constexpr(2**KEY_BITS.value)
NEGATIVE = tl.constexpr(0x40000000)
IGNORED = tl.constexpr(0x7FFFFFFF)

MIN_BLOCK_K = 128
SMALL_BLOCK_K = 4096
MAX_BLOCK_K = 16384
MAX_SCAN_K = 1024


class Config(NamedTuple):
    """Candidates of a tile that a program counts and of one that it scans, powers of two, and its warps."""

    block_k: int
    scan_k: int
    num_warps: int


def config(span: int) -> Config:
    """Sizes for programs of `span` candidates: in one tile, if that can be, which then stays in registers.

    Tiles that are read again and again are small, since their keys are computed anew each time.
    """
    if span > MAX_BLOCK_K:
        return Config(MAX_SCAN_K, MAX_SCAN_K, 4)
    block = max(triton.next_power_of_2(span), MIN_BLOCK_K)
    return Config(block, min(block, MAX_SCAN_K), 8 if block <= 8192 else 16)


@triton.jit
def _avalanche(words):
    """uint32 of which each bit hangs on every bit of `words`.

    The 32-bit mixer `lowbias32` of C. Wellons, "Prospecting for hash functions" (2018).
    """
    words ^= words >> 16
    words *= 0x7FEB352D
    words ^= words >> 15
    words *= 0x846CA68B
    return words ^ (words >> 16)


@triton.jit
def _keys(number, seed):
    """int32 of KEY_BITS bits from a candidate's `number` and the int64 `seed`.

    The seed is mixed before it meets the number: otherwise seeds that are near would choose alike.
    """
    first = _avalanche(seed.to(tl.uint32))
    second = _avalanche((seed >> 32).to(tl.uint32) ^ first)
    mixed = _avalanche(((number.to(tl.uint32) ^ first) * 0x9E3779B1) ^ second)
    return (mixed >> (32 - KEY_BITS)).to(tl.int32)


@triton.jit
def _load_codes(
    label_ptr, seed, code_ptr, first, start, num_candidates, HAS_CODES: tl.constexpr, BLOCK_K: tl.constexpr
):
    """int32 [BLOCK_K], the codes of the candidates from `start` of the image that begins at `first`."""
    column = start + tl.arange(0, BLOCK_K)
    mask = column < num_candidates
    if HAS_CODES:
        return tl.load(code_ptr + first + column, mask=mask, other=IGNORED)
    else:
        label = tl.load(label_ptr + first + column, mask=mask, other=-1)
        key = _keys(first + column, seed)
        return tl.where(label == 1, key, tl.where(label == 0, key + NEGATIVE, IGNORED))


@triton.jit
def _next_codes(
    codes,
    label_ptr,
    seed,
    code_ptr,
    first,
    start,
    num_candidates,
    HAS_CODES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The only tile stays in registers; several are read again in every pass."""
    if ONE_TILE:
        return codes
    else:
        return _load_codes(label_ptr, seed, code_ptr, first, start, num_candidates, HAS_CODES, BLOCK_K)


@triton.jit
def _count_below(
    bound,
    codes,
    label_ptr,
    seed,
    code_ptr,
    first,
    begin,
    end,
    HAS_CODES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    count = 0
    for start in range(begin, begin + BLOCK_K if ONE_TILE else end, BLOCK_K):
        here = _next_codes(codes, label_ptr, seed, code_ptr, first, start, end, HAS_CODES, ONE_TILE, BLOCK_K)
        count += tl.sum((here < bound).to(tl.int32), axis=0)
    return count


@triton.jit
def _smallest(
    rank,
    lowest,
    codes,
    label_ptr,
    seed,
    code_ptr,
    first,
    begin,
    end,
    HAS_CODES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A bound that as many codes lie below as `rank`, counted from 1; or where equal codes leave none, their code.

    There are so many codes of positives or negatives from `lowest` up. It is found bit by bit, and as soon as the next
    code is told from the wanted ones: of N candidates after some log2(N) bits.
    """
    bound = lowest
    step = 1
    while step <= KEY_BITS:
        higher = bound + (KEY_END >> step)
        count = _count_below(higher, codes, label_ptr, seed, code_ptr, first, begin, end, HAS_CODES, ONE_TILE, BLOCK_K)
        bound = tl.where(count <= rank, higher, bound)
        step = tl.where(count == rank, KEY_BITS, step) + 1
    return bound


@triton.jit
def _pair(flag, is_negative):
    """1 for a flagged positive, 2^16 for a flagged negative, so that one scan or sum serves both classes."""
    return tl.where(flag, tl.where(is_negative, 0x10000, 1), 0)


@triton.jit
def _of_class(pair, is_negative):
    return tl.where(is_negative, pair >> 16, pair) & 0xFFFF


@triton.jit(do_not_specialize=["num_candidates", "span", "num_slots", "max_positive"])
def _sample_kernel(
    label_ptr,
    seed_ptr,
    code_ptr,
    position_ptr,
    index_ptr,
    weight_ptr,
    thin_code_ptr,
    thin_position_ptr,
    num_candidates,
    span,
    num_slots,
    max_positive,
    HAS_CODES: tl.constexpr,
    THIN: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCAN_K: tl.constexpr,
):
    """Fills the slots of one span of one image: its positives of the smallest keys, then its negatives, then nothing.

        candidates  |  BLOCK_K  |  BLOCK_K  |  ...      program (span, image); the last launch has one span
                         |
        slots       | positives, ascending | negatives, ascending | empty |

    label_ptr [B, K]: int64, 1 positive, 0 negative. seed_ptr [1]: int64. With HAS_CODES these are not read but code_ptr
    and position_ptr [B, K], both int32: what an earlier launch kept, and where in the image it was.
    THIN writes those: thin_code_ptr, thin_position_ptr [B, spans, num_slots], the code of an empty slot being IGNORED.
    Else index_ptr [B, num_slots]: int64, weight_ptr [B, num_slots]: fp32, both 0 in an empty slot.
    num_candidates: K; span: candidates of one program. All contiguous.
    """
    batch = tl.program_id(1).to(tl.int64)
    first = batch * num_candidates
    begin = tl.program_id(0) * span
    end = tl.minimum(begin + span, num_candidates)
    seed = tl.full([], 0, dtype=tl.int64)
    if not HAS_CODES:
        seed = tl.load(seed_ptr)
    codes = _load_codes(label_ptr, seed, code_ptr, first, begin, end, HAS_CODES, BLOCK_K)

    positives = _count_below(
        NEGATIVE, codes, label_ptr, seed, code_ptr, first, begin, end, HAS_CODES, ONE_TILE, BLOCK_K
    )
    both = _count_below(IGNORED, codes, label_ptr, seed, code_ptr, first, begin, end, HAS_CODES, ONE_TILE, BLOCK_K)
    num_positive = tl.minimum(positives, max_positive)
    num_negative = tl.minimum(both - positives, num_slots - num_positive)
    positive_bound = tl.full([], KEY_END, dtype=tl.int32)
    positive_ties = tl.full([], 0, dtype=tl.int32)
    if num_positive < positives:
        positive_bound = _smallest(
            num_positive, 0, codes, label_ptr, seed, code_ptr, first, begin, end, HAS_CODES, ONE_TILE, BLOCK_K
        )
        positive_ties = num_positive - _count_below(
            positive_bound, codes, label_ptr, seed, code_ptr, first, begin, end, HAS_CODES, ONE_TILE, BLOCK_K
        )
    negative_bound = tl.full([], NEGATIVE + KEY_END, dtype=tl.int32)
    negative_ties = tl.full([], 0, dtype=tl.int32)
    if positives + num_negative < both:
        rank = positives + num_negative
        negative_bound = _smallest(
            rank, NEGATIVE, codes, label_ptr, seed, code_ptr, first, begin, end, HAS_CODES, ONE_TILE, BLOCK_K
        )
        negative_ties = rank - _count_below(
            negative_bound, codes, label_ptr, seed, code_ptr, first, begin, end, HAS_CODES, ONE_TILE, BLOCK_K
        )

    # Smaller tiles, read once more: a scan needs many registers.
    out = (batch * tl.num_programs(0) + tl.program_id(0)) * num_slots
    seen_positive = 0
    seen_negative = num_positive
    for start in range(begin, end, SCAN_K):
        here = _load_codes(label_ptr, seed, code_ptr, first, start, end, HAS_CODES, SCAN_K)
        is_negative = here >= NEGATIVE
        bound = tl.where(is_negative, negative_bound, positive_bound)
        ties = tl.where(is_negative, negative_ties, positive_ties)
        tied = here == bound
        tie = _pair(tied, is_negative)
        chosen = (here < bound) | (tied & (_of_class(tl.cumsum(tie, axis=0), is_negative) <= ties))
        taken = _pair(chosen, is_negative)
        before = _of_class(tl.cumsum(taken, axis=0), is_negative)
        slot = tl.where(is_negative, seen_negative, seen_positive) + before - 1
        sum_tie = tl.sum(tie, axis=0)
        sum_taken = tl.sum(taken, axis=0)
        positive_ties -= _of_class(sum_tie, False)
        negative_ties -= _of_class(sum_tie, True)
        seen_positive += _of_class(sum_taken, False)
        seen_negative += _of_class(sum_taken, True)
        position = start + tl.arange(0, SCAN_K)
        if HAS_CODES:
            position = tl.load(position_ptr + first + position, mask=chosen, other=0)
        if THIN:
            tl.store(thin_code_ptr + out + slot, here, mask=chosen)
            tl.store(thin_position_ptr + out + slot, position, mask=chosen)
        else:
            tl.store(index_ptr + out + slot, position.to(tl.int64), mask=chosen)

    num_chosen = num_positive + num_negative
    for start in range(0, num_slots, 128):
        slot = start + tl.arange(0, 128)
        empty = (slot >= num_chosen) & (slot < num_slots)
        if THIN:
            tl.store(thin_code_ptr + out + slot, tl.full([128], IGNORED, dtype=tl.int32), mask=empty)
        else:
            tl.store(index_ptr + out + slot, tl.zeros([128], dtype=tl.int64), mask=empty)
            tl.store(weight_ptr + out + slot, (slot < num_chosen).to(tl.float32), mask=slot < num_slots)


def thinning(num_candidates: int, num_samples: int) -> int:
    """Candidates a program of the first launch thins to `num_samples`; 0 for no such launch.

    The smallest tile whose survivors, of all tiles together, are no more than a tile themselves; the largest tile if
    it at least halves the candidates.
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
    """Fill `index` and `weight` [B, S] from `label` [B, K] and `seed` [1], or from what `launch_thin` kept of them."""
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
    _sample_kernel[(1 if thin_code is None else thin_code.shape[1], slots.shape[0])](
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
