"""Codes of candidates, whose order is that in which they are sampled, and the search for the k smallest of them.

Keys are not read but computed, from the image's seed and the candidate's index in it alone, so that no order of the
work changes them, nor does what else is in the batch. A candidate's code is one int32: its key of KEY_BITS bits for a
positive, NEGATIVE more for a negative, IGNORED for the rest. Codes order the positives before the negatives before the
rest, and a bound for the k smallest is found bit by bit, in passes that count: about log2(N) of them, at most KEY_BITS.
"""

import triton
import triton.language as tl

KEY_BITS = tl.constexpr(29)
KEY_END = tl.constexpr(2**KEY_BITS.value)
NEGATIVE = tl.constexpr(0x40000000)
IGNORED = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _avalanche(words):
    """uint32 of which each bit depends on every bit of `words`.

    The 32-bit mixer `lowbias32` of C. Wellons, "Prospecting for hash functions" (2018).
    """
    words ^= words >> 16
    words *= 0x7FEB352D
    words ^= words >> 15
    words *= 0x846CA68B
    return words ^ (words >> 16)


@triton.jit
def _random_words(
    index,  # int32 or int64 of any shape, candidates of an image
    seed,  # int64
):
    """uint32 random words.

    The seed is mixed before it is combined with the index: otherwise similar seeds would choose alike.
    """
    low_word = _avalanche(seed.to(tl.uint32))
    high_word = _avalanche((seed >> 32).to(tl.uint32) ^ low_word)
    return _avalanche(((index.to(tl.uint32) ^ low_word) * 0x9E3779B1) ^ high_word)


@triton.jit
def load_codes(
    label_ptr,  # [B, K] int64; not read if HAS_CODES
    code_ptr,  # [B, K] int32; read if HAS_CODES
    first,  # index in [B, K] of the image's first candidate
    start,  # first candidate of the tile, counted in the image
    end,  # one past the last candidate to load
    seed,  # int64, of the image
    HAS_CODES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """int32 [BLOCK_K]: the codes of a tile of candidates, IGNORED from `end` on."""
    column = start + tl.arange(0, BLOCK_K)
    mask = column < end
    if HAS_CODES:
        return tl.load(code_ptr + first + column, mask=mask, other=IGNORED)
    else:
        label = tl.load(label_ptr + first + column, mask=mask, other=-1)
        key = (_random_words(column, seed) >> (32 - KEY_BITS)).to(tl.int32)
        return tl.where(label == 1, key, tl.where(label == 0, key + NEGATIVE, IGNORED))


@triton.jit
def count_below(
    bound,
    codes,  # [BLOCK_K] int32, those from `begin`
    label_ptr,  # as of `load_codes`, down to `seed`
    code_ptr,
    first,
    begin,
    end,
    seed,
    HAS_CODES: tl.constexpr,
    ONE_TILE: tl.constexpr,  # [begin, end) is one tile, whose `codes` stay in registers; else every pass reads anew
    BLOCK_K: tl.constexpr,
):
    """How many codes of the candidates [begin, end) are below `bound`."""
    count = 0
    for start in range(begin, begin + BLOCK_K if ONE_TILE else end, BLOCK_K):
        if ONE_TILE:
            tile = codes
        else:
            tile = load_codes(label_ptr, code_ptr, first, start, end, seed, HAS_CODES, BLOCK_K)
        count += tl.sum((tile < bound).to(tl.int32), axis=0)
    return count


@triton.jit
def find_bound(
    rank,
    lowest,  # 0 to search among the positives, NEGATIVE among the negatives
    num_lower,  # codes below `lowest`
    codes,  # as of `count_below`, down to `seed`
    label_ptr,
    code_ptr,
    first,
    begin,
    end,
    seed,
    HAS_CODES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A bound below which `rank` codes lie; or, where equal codes make that impossible, the code that they equal. And
    how many codes lie below it.

    There are more than `rank` codes below lowest + KEY_END. The bound is found bit by bit, until it separates the
    wanted codes from the next one: of N candidates after about log2(N) bits.
    """
    bound = lowest
    below = num_lower
    step = 1
    while step <= KEY_BITS:
        higher = bound + (KEY_END >> step)
        count = count_below(higher, codes, label_ptr, code_ptr, first, begin, end, seed, HAS_CODES, ONE_TILE, BLOCK_K)
        bound = tl.where(count <= rank, higher, bound)
        below = tl.where(count <= rank, count, below)
        step = tl.where(count == rank, KEY_BITS, step) + 1
    return bound, below
