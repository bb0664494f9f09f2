"""The k largest of every block of 1024, where a block is 32 lines of 32 elements spread over the gradient. A program owns
ROWS blocks as [ROWS, 1024]; the last block is the n % 1024 elements that are left. Encode reads 8 and writes 4 bytes a
value. The k-th largest key is found one bit at a time, with the block in registers."""

import triton
import triton.language as tl

from .codec import NON_FINITE, accumulate, canonical, keep, magnitude, narrow

BLOCK = tl.constexpr(1024)
LINE = tl.constexpr(32)


@triton.jit
def element(block, within, n):
    """The element of the gradient that stands at `within` in a block, and whether there is one."""
    blocks = n // BLOCK
    whole = block < blocks
    at = tl.where(whole, ((within // LINE) * blocks + block) * LINE + within % LINE, blocks * BLOCK + within)
    return at, (within >= 0) & (within < BLOCK) & (whole | ((block == blocks) & (at < n)))


@triton.jit
def block_list(block, k, count, n):
    """Where the entries of a block begin, and how many they are."""
    blocks = n // BLOCK
    return block * k, tl.where(block < blocks, k, tl.where(block == blocks, count - blocks * k, 0))


@triton.jit
def own_blocks(ROWS: tl.constexpr):
    return (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]


@triton.jit(do_not_specialize=["k", "count"])
def blocktopk_encode(x, residual, loss_scale, values, index, k, count, n, ROWS: tl.constexpr):
    block = own_blocks(ROWS)
    within = tl.arange(0, BLOCK)[None, :]
    at, inside = element(block, within, n)
    acc, kept = accumulate(x, residual, loss_scale, at, inside)
    key = tl.where(inside, magnitude(acc), -1)
    first, wanted = block_list(block, k, count, n)
    kth = tl.zeros((ROWS, 1), tl.int32)
    for i in range(31):
        trial = kth | (1 << (30 - i))
        kth = tl.where(tl.sum((key >= trial).to(tl.int32), 1)[:, None] >= wanted, trial, kth)
    larger, tie = key > kth, key == kth
    running = tl.cumsum(larger.to(tl.int32) | (tie.to(tl.int32) << 16), 1)  # two counts of at most 1024 in one scan
    ties = wanted - tl.sum(larger.to(tl.int32), 1)[:, None]
    rank = running >> 16
    chosen = inside & (wanted > 0) & (larger | (tie & (rank <= ties)))
    place = first + (running & 0xFFFF) + tl.minimum(rank, ties) - 1
    tl.store(values + place, acc, mask=chosen)
    tl.store(index + place, (within + tl.zeros((ROWS, 1), tl.int32)).to(tl.int16), mask=chosen)
    keep(residual, loss_scale, at, inside, tl.where(chosen, 0.0, acc), magnitude(acc) < NON_FINITE, kept)


@triton.jit
def highest(a, b):
    return tl.maximum(a, b)


@triton.jit
def add_blocks(total, values, index, factor, k, count, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """total[element] += value * factor for the entries of this program's blocks. An entry that does not lie beyond those
    before it is none, so that no element comes twice. WIDTH: a power of two, at least every block's entries and 2."""
    block = own_blocks(ROWS)
    first, wanted = block_list(block, k, count, n)
    entry = tl.arange(0, WIDTH)[None, :]
    live = entry < wanted
    within = tl.load(index + first + entry, mask=live, other=-1).to(tl.int32)
    before = tl.load(index + first + entry - 1, mask=live & (entry > 0), other=-1).to(tl.int32)
    at, inside = element(block, within, n)
    live = live & inside & (within > tl.associative_scan(tl.maximum(before, -1), 1, highest))
    value = tl.load(values + first + entry, mask=live, other=0.0) * factor
    tl.store(total + at, canonical(tl.load(total + at, mask=live, other=0.0) + value), mask=live)


@triton.jit(do_not_specialize=["k", "count"])
def blocktopk_decode_sum(
    out, total, weight, values, index, rows, value_stride, index_stride, k, count, n, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """total: float32 [n], which may be out itself."""
    at, inside = element(own_blocks(ROWS), tl.arange(0, BLOCK)[None, :], n)
    tl.store(total + at, tl.zeros((ROWS, BLOCK), tl.float32), mask=inside)
    tl.debug_barrier()
    for _ in range(rows):
        add_blocks(total, values, index, 1.0, k, count, n, ROWS, WIDTH)
        tl.debug_barrier()
        values += value_stride
        index += index_stride
    value = tl.load(total + at, mask=inside, other=0.0)
    tl.store(out + at, narrow(value * weight, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["k", "count"])
def blocktopk_add(residual, loss_scale, values, index, k, count, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    add_blocks(residual, values, index, tl.div_rn(1.0, tl.load(loss_scale)), k, count, n, ROWS, WIDTH)
