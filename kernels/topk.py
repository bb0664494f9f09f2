"""The k largest, exactly, decided on the device. Six kernels, no program waits for another:

    3 x topk_histogram   the k-th largest key, 11 + 10 + 10 of its 31 bits at a time, each pass among the keys that
                         agree with it so far                                               reads 8 bytes a value
    topk_count           keys above it and equal to it in each tile                         reads 8
    topk_scan            the same for all tiles before each tile, by one program
    topk_emit            the list, in order, and the residual                               reads 8, writes 4

A key is the magnitude of acc. Ties go to the lowest index because the equal keys are numbered in the order of the index.

workspace, int64: 4096 counters of the histograms, zero before the first; the k-th key; how many keys equal to it are
taken; keys above it per tile; keys equal to it per tile.
"""

import triton
import triton.language as tl

from .codec import NON_FINITE, accumulate, canonical, keep, magnitude, narrow

COUNTERS = tl.constexpr(4096)
KTH = tl.constexpr(4096)
TIES = tl.constexpr(4097)
ABOVE = tl.constexpr(4098)
INDEX_TILE = tl.constexpr(65536)


@triton.jit
def digit(histogram, need, BINS: tl.constexpr):
    """The largest digit that at least `need` keys reach, and how many keys with this very digit are needed."""
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + bins)
    reach = tl.sum(counts) - tl.cumsum(counts) + counts
    chosen = tl.sum((reach >= need).to(tl.int32)) - 1
    return chosen, need - tl.sum(tl.where(bins > chosen, counts, 0))


@triton.jit
def prefix(histogram, k, DIGITS: tl.constexpr):
    """The first digits of the k-th largest key, and how many keys that begin like it are needed. For k = 0 the key is
    0x7fffffff, above every magnitude, and the number is 0."""
    need = k.to(tl.int64)
    key = tl.full((), 0, tl.int32)
    if DIGITS >= 1:
        key, need = digit(histogram, need, 2048)
    if DIGITS >= 2:
        low, need = digit(histogram + 2048, need, 1024)
        key = (key << 10) | low
    if DIGITS >= 3:
        low, need = digit(histogram + 3072, need, 1024)
        key = (key << 10) | low
    return key, need


@triton.jit(do_not_specialize=["k"])
def topk_histogram(x, residual, loss_scale, workspace, k, n, tiles, DIGITS: tl.constexpr, TILE: tl.constexpr):
    """Adds the digit after the first DIGITS to its histogram. A program takes every num_programs-th tile."""
    BINS: tl.constexpr = 2048 if DIGITS == 0 else 1024
    head, need = prefix(workspace, k, DIGITS)
    counts = tl.zeros((BINS,), tl.int32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
        inside = at < n
        acc, kept = accumulate(x, residual, loss_scale, at, inside)
        key = magnitude(acc)
        if DIGITS == 0:
            counts += tl.histogram(key >> 20, BINS, mask=inside)
        else:
            inside = inside & (key >> (30 - 10 * DIGITS) == head)
            counts += tl.histogram((key >> (20 - 10 * DIGITS)) & 1023, BINS, mask=inside)
    first: tl.constexpr = 0 if DIGITS == 0 else 1024 + 1024 * DIGITS
    tl.atomic_add(workspace + first + tl.arange(0, BINS), counts.to(tl.int64), mask=counts != 0, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def topk_count(x, residual, loss_scale, workspace, k, n, tiles, TILE: tl.constexpr):
    kth, ties = prefix(workspace, k, 3)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = tl.cast(tile, tl.int64) * TILE + tl.arange(0, TILE)
        inside = at < n
        acc, kept = accumulate(x, residual, loss_scale, at, inside)
        key = magnitude(acc)
        tl.store(workspace + ABOVE + tile, tl.sum((inside & (key > kth)).to(tl.int32)).to(tl.int64))
        tl.store(workspace + ABOVE + tiles + tile, tl.sum((inside & (key == kth)).to(tl.int32)).to(tl.int64))


@triton.jit(do_not_specialize=["k"])
def topk_scan(workspace, k, tiles, STEP: tl.constexpr):
    kth, ties = prefix(workspace, k, 3)
    tl.store(workspace + KTH, kth.to(tl.int64))
    tl.store(workspace + TIES, ties)
    above = tl.full((), 0, tl.int64)
    equal = tl.full((), 0, tl.int64)
    for first in range(0, tiles, STEP):
        at = workspace + ABOVE + first + tl.arange(0, STEP)
        inside = first + tl.arange(0, STEP) < tiles
        a = tl.load(at, mask=inside, other=0)
        e = tl.load(at + tiles, mask=inside, other=0)
        tl.store(at, above + tl.cumsum(a) - a, mask=inside)
        tl.store(at + tiles, equal + tl.cumsum(e) - e, mask=inside)
        above += tl.sum(a)
        equal += tl.sum(e)


@triton.jit
def topk_emit(x, residual, loss_scale, values, index, starts, workspace, n, tiles, TILE: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    kth = tl.load(workspace + KTH).to(tl.int32)
    ties = tl.load(workspace + TIES)
    above = tl.load(workspace + ABOVE + tile)
    equal = tl.load(workspace + ABOVE + tiles + tile)
    first = above + tl.minimum(equal, ties)
    if tile % (INDEX_TILE // TILE) == 0:
        tl.store(starts + tile // (INDEX_TILE // TILE), first)

    at = tile * TILE + tl.arange(0, TILE)
    inside = at < n
    acc, kept = accumulate(x, residual, loss_scale, at, inside)
    key = magnitude(acc)
    larger, tie = inside & (key > kth), inside & (key == kth)
    running = tl.cumsum(larger.to(tl.int32) | (tie.to(tl.int32) << 16))  # two counts, both of at most TILE, in one scan
    rank = running >> 16
    taken = tl.minimum(tl.maximum(ties - equal, 0), TILE).to(tl.int32)  # ties left for this tile
    chosen = larger | (tie & (rank <= taken))
    place = (running & 0xFFFF) + tl.minimum(rank, taken) - 1
    within = (tile % (INDEX_TILE // TILE) * TILE).to(tl.int32) + tl.arange(0, TILE)
    tl.store(values + first + place, acc, mask=chosen)
    tl.store(index + first + place, within.to(tl.int16), mask=chosen)
    keep(residual, loss_scale, at, inside, tl.where(chosen, 0.0, acc), key < NON_FINITE, kept)


@triton.jit
def list_range(starts, k, tile, tiles, STEP: tl.constexpr):
    """Where the list of an index tile begins and ends; empty where begin is beyond the end. A start outside the list or
    before its predecessor is taken as the nearest that is not, so that the lists of the tiles never overlap."""
    begin = tl.full((), 0, tl.int64)
    for first in range(0, tile + 1, STEP):
        at = first + tl.arange(0, STEP)
        begin = tl.maximum(begin, tl.max(tl.load(starts + at, mask=at <= tile, other=0)))
    end = tl.load(starts + tile + 1, mask=tile + 1 < tiles, other=k)
    return begin, tl.minimum(tl.maximum(begin, end), k)


@triton.jit
def add_list(total, values, index, begin, end, factor, base, n, STEP: tl.constexpr):
    """total[element] += value * factor for one tile's list. No element comes twice in an ascending list; a piece of a
    hostile one that does not ascend is added entry by entry."""
    for first in range(begin, end, STEP):
        entry = first + tl.arange(0, STEP)
        live = entry < end
        within = tl.load(index + entry, mask=live, other=0).to(tl.int32) & 0xFFFF
        before = tl.load(index + entry - 1, mask=live & (entry > first), other=0).to(tl.int32) & 0xFFFF
        ascends = (within > before) | (entry == first) | (entry >= end)
        if tl.min(ascends.to(tl.int32)) == 1:
            at = base + within
            live = live & (at < n)
            value = tl.load(values + entry, mask=live, other=0.0) * factor
            tl.store(total + at, canonical(tl.load(total + at, mask=live, other=0.0) + value), mask=live)
        else:
            for one in range(first, tl.minimum(first + STEP, end)):
                at = base + (tl.load(index + one).to(tl.int32) & 0xFFFF)
                sum = tl.load(total + at, mask=at < n, other=0.0) + tl.load(values + one) * factor
                tl.store(total + at, canonical(sum), mask=at < n)
                tl.debug_barrier()
        tl.debug_barrier()


@triton.jit
def topk_decode_sum(
    out, total, weight, values, index, starts, rows, value_stride, index_stride, start_stride, k, n, tiles, STEP: tl.constexpr
):
    """A program owns one index tile, which it clears, adds the rows to, in their order, and scales: 256 KB of total, a
    float32 [n] that may be out itself, so that only the last of these passes leaves the cache."""
    tile = tl.program_id(0).to(tl.int64)
    base = tile * INDEX_TILE
    for first in range(0, INDEX_TILE, STEP):
        at = base + first + tl.arange(0, STEP)
        tl.store(total + at, tl.zeros((STEP,), tl.float32), mask=at < n)
    tl.debug_barrier()
    for _ in range(rows):
        begin, end = list_range(starts, k, tile, tiles, STEP)
        add_list(total, values, index, begin, end, 1.0, base, n, STEP)
        values += value_stride
        index += index_stride
        starts += start_stride
    for first in range(0, INDEX_TILE, STEP):
        at = base + first + tl.arange(0, STEP)
        value = tl.load(total + at, mask=at < n, other=0.0)
        tl.store(out + at, narrow(value * weight, out.dtype.element_ty), mask=at < n)


@triton.jit
def sparse_add(residual, loss_scale, values, index, starts, k, n, tiles, STEP: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    begin, end = list_range(starts, k, tile, tiles, STEP)
    add_list(residual, values, index, begin, end, tl.div_rn(1.0, tl.load(loss_scale)), tile * INDEX_TILE, n, STEP)
