"""The upper bits of an ascending list in unary: the j-th entry, element p, sets bit (p >> BITS) + j of a stream.

To write it a program takes one index tile's entries, and to read it TILE bits, with the ones before them counted in a
first pass. A stream counts as going on in ones behind its length, so that there are k of them whatever it holds.
"""

import triton
import triton.language as tl

from .topk import INDEX_TILE, list_range


@triton.jit
def eliasfano_pack(index, starts, words, k, tiles, BITS: tl.constexpr, STEP: tl.constexpr):
    """words: int32, zero before."""
    tile = tl.program_id(0).to(tl.int64)
    begin, end = list_range(starts, k, tile, tiles, STEP)
    for first in range(begin, end, STEP):
        entry = first + tl.arange(0, STEP)
        live = entry < end
        within = tl.load(index + entry, mask=live, other=0).to(tl.int32) & 0xFFFF
        bit = ((tile * INDEX_TILE + within) >> BITS) + entry
        tl.atomic_or(words + bit // 32, 1 << (bit % 32).to(tl.int32), mask=live, sem="relaxed")


@triton.jit
def stream_tile(high, length, TILE: tl.constexpr):
    """The positions of this program's bits, int64 [TILE], and the bits, int32."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    byte = tl.load(high + at // 8, mask=at < length, other=0).to(tl.int32)
    return at, tl.where(at < length, (byte >> (at % 8).to(tl.int32)) & 1, 1)


@triton.jit
def eliasfano_count(high, ones, length, TILE: tl.constexpr):
    at, bit = stream_tile(high, length, TILE)
    tl.store(ones + tl.program_id(0), tl.sum(bit).to(tl.int64))


@triton.jit
def eliasfano_unpack(high, before, index, starts, length, k, tiles, BITS: tl.constexpr, TILE: tl.constexpr):
    """starts: 0 for the first tile and k for the others before. A zero ends a stretch of 2^BITS elements, perhaps a tile."""
    at, bit = stream_tile(high, length, TILE)
    entry = tl.load(before + tl.program_id(0)) + tl.cumsum(bit) - bit
    upper = at - entry
    live = (bit == 1) & (entry < k)
    low = tl.load(index + entry, mask=live, other=0).to(tl.int32) & ((1 << BITS) - 1)
    tl.store(index + entry, ((upper << BITS).to(tl.int32) | low).to(tl.int16), mask=live)
    stretches: tl.constexpr = INDEX_TILE >> BITS
    next = (upper + 1) // stretches
    ends = (bit == 0) & ((upper + 1) % stretches == 0) & (next < tiles)
    tl.store(starts + next, tl.minimum(entry, k), mask=ends)
