"""What reaches a threshold, up to k values of it, and the threshold of the next call. No program waits for another:

    threshold_sample   where none is carried: keys from all over the gradient
    threshold_begin    the threshold, by one program
    threshold_select   what reaches it, as one bit per value, and the residual of what does not      reads 8, writes 4.1 bytes a value
    threshold_finish   counts before each tile, and the next threshold, by one program
    threshold_emit     the list, in order, and the residual of what is in it or had no room           reads 0.1

A key is the magnitude of acc. The elements from `begin` on come first; a tile that holds `begin` counts for both.

head, int64, zero before: the threshold; whether any acc is not finite; how many reach the threshold from `begin` on, and
before it; counts by the distance from the threshold. counts, int64 [2, tiles]: both numbers of each tile, then of all
tiles before it. mask, uint8 [ceil(n / 8)].
"""

import triton
import triton.language as tl

from .codec import NAN, NON_FINITE, accumulate, float_of, magnitude
from .topk import INDEX_TILE

THRESHOLD = tl.constexpr(0)
BAD = tl.constexpr(1)
FOUND = tl.constexpr(2)  # and 3
COUNTS = tl.constexpr(4)
BINS = tl.constexpr(16)
WIDTH = tl.constexpr(19)
HEAD = tl.constexpr(20)


@triton.jit
def threshold_sample(x, residual, loss_scale, control, keys, n, m, TILE: tl.constexpr):
    if tl.load(control) != 0:
        return
    j = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = j < m
    spread = (j * n >> 16) + (((j * 2654435761) & 0xFFFFFFFF) * (n >> 16) >> 32)  # m is 65536 there
    at = tl.where(n == m, j, spread)
    acc, kept = accumulate(x, residual, loss_scale, at, inside)
    tl.store(keys + j, magnitude(acc), mask=inside)


@triton.jit(do_not_specialize=["rank"])
def threshold_begin(control, keys, head, rank, m, STEP: tl.constexpr):
    """rank: 0 where k is."""
    threshold = tl.load(control)
    if threshold == 0:
        for i in range(31):
            trial = threshold | (1 << (30 - i))
            reach = tl.full((), 0, tl.int64)
            for first in range(0, m, STEP):
                at = first + tl.arange(0, STEP)
                reach += tl.sum((tl.load(keys + at, mask=at < m, other=-1) >= trial).to(tl.int32))
            threshold = tl.where(reach >= rank, trial, threshold)
        threshold = tl.where(rank == 0, NON_FINITE, tl.minimum(tl.maximum(threshold, 1), NON_FINITE))
    tl.store(head + THRESHOLD, threshold.to(tl.int64))


@triton.jit
def threshold_select(x, residual, loss_scale, head, counts, mask, begin, n, tiles, TILE: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    threshold = tl.load(head + THRESHOLD).to(tl.int32)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < n
    acc, kept = accumulate(x, residual, loss_scale, at, inside)
    key = magnitude(acc)
    taken = inside & (key >= threshold)
    if residual is not None:
        tl.store(residual + at, acc * tl.div_rn(1.0, tl.load(loss_scale)), mask=inside & (key < threshold))
    tl.store(counts + tile, tl.sum((taken & (at >= begin)).to(tl.int32)).to(tl.int64))
    tl.store(counts + tiles + tile, tl.sum((taken & (at < begin)).to(tl.int32)).to(tl.int64))
    bits = tl.reshape(taken.to(tl.int32), (TILE // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = tile * (TILE // 8) + tl.arange(0, TILE // 8)
    tl.store(mask + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte * 8 < n)
    found = tl.histogram(tl.minimum((key - threshold) >> WIDTH, BINS - 1), BINS, mask=taken)
    tl.atomic_add(head + COUNTS + tl.arange(0, BINS), found.to(tl.int64), mask=found != 0, sem="relaxed")
    bad = tl.max((taken & (key >= NON_FINITE)).to(tl.int64))
    tl.atomic_max(head + BAD, bad, mask=bad != 0, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def threshold_finish(head, counts, control, k, tiles, STEP: tl.constexpr):
    for half in range(2):
        before = tl.full((), 0, tl.int64)
        for first in range(0, tiles, STEP):
            tile = first + tl.arange(0, STEP)
            at = counts + half * tiles + tile
            here = tl.load(at, mask=tile < tiles, other=0)
            tl.store(at, before + tl.cumsum(here) - here, mask=tile < tiles)
            before += tl.sum(here)
        tl.store(head + FOUND + half, before)
    bins = tl.arange(0, BINS)
    found = tl.load(head + COUNTS + bins)
    c = tl.sum(found)
    reach = c - tl.cumsum(found) + found
    enough = c >= k
    j = tl.sum(tl.where(enough, reach >= k, 2 * reach >= c).to(tl.int32)) - 1
    here, beyond = tl.sum(tl.where(bins == j, found, 0)), tl.sum(tl.where(bins == j, reach, 0))
    here, c = tl.maximum(here, 1), tl.maximum(c, 1)
    threshold, last = tl.load(head + THRESHOLD), tl.load(control + 1).to(tl.int64)
    below = j.to(tl.int64) << WIDTH
    half_way = below + ((2 * beyond - c) << WIDTH) // (2 * here)
    lower = tl.maximum(threshold - half_way * (k - c) // c, 1)
    fitting = tl.where(enough, threshold + below + ((beyond - k) << WIDTH) // here, lower)
    next = fitting + tl.where(last != 0, (fitting - last) >> 1, 0)
    next = tl.minimum(tl.maximum(next, 1), NON_FINITE)
    known = (tl.load(head + BAD) == 0) & (k > 0) & (4 * tl.sum(found) >= k) & (tl.sum(tl.where(bins == BINS - 1, found, 0)) < k)
    tl.store(control, tl.where(known, next, 0).to(tl.int32))
    tl.store(control + 1, tl.where(known, fitting, 0).to(tl.int32))


@triton.jit(do_not_specialize=["k"])
def threshold_emit(x, residual, loss_scale, head, counts, mask, values, index, starts, begin, k, n, tiles, TILE: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    later = tl.minimum(tl.load(head + FOUND), k)  # of those from `begin` on, which come first, are sent
    earlier = tl.minimum(tl.load(head + FOUND + 1), k - later)
    above, under = tl.load(counts + tile), tl.load(counts + tiles + tile)
    if tile % (INDEX_TILE // TILE) == 0:
        tl.store(starts + tile // (INDEX_TILE // TILE), tl.minimum(above, later) + tl.minimum(under, earlier))
    at = tile * TILE + tl.arange(0, TILE)
    byte = tl.load(mask + at // 8, mask=at < n, other=0).to(tl.int32)
    taken = (byte >> (at % 8).to(tl.int32)) & 1
    second = at >= begin
    running = tl.cumsum(taken & second.to(tl.int32) | ((taken & (at < begin).to(tl.int32)) << 16))  # two counts, of at most TILE
    rank = tl.where(second, above + (running & 0xFFFF), under + (running >> 16)) - 1
    place = tl.where(second, earlier, 0) + rank
    acc, kept = accumulate(x, residual, loss_scale, at, taken == 1)
    finite = magnitude(acc) < NON_FINITE
    sent = (taken == 1) & (rank < tl.where(second, later, earlier))
    told = sent & (place == 0) & (tl.load(head + BAD) != 0)  # by this entry all see that something is not finite
    within = (tile % (INDEX_TILE // TILE) * TILE).to(tl.int32) + tl.arange(0, TILE)
    tl.store(values + place, tl.where(told, float_of(tl.full((TILE,), NAN, tl.int32)), acc), mask=sent)
    tl.store(index + place, within.to(tl.int16), mask=sent)
    if residual is not None:
        error = tl.where(sent & (told == 0), 0.0, acc)
        tl.store(residual + at, error * tl.div_rn(1.0, tl.load(loss_scale)), mask=(taken == 1) & finite)
