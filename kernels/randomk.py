"""One element, drawn at random, of each of k strata of neighbours. A program owns ROWS strata, held as [ROWS, WIDTH], or one
that is too large for that, which it reads in pieces of WIDTH and, to encode, reads twice. Encode reads 8 and writes 4 bytes
a value."""

import triton
import triton.language as tl

from .codec import NAN, NON_FINITE, accumulate, float_of, keep, magnitude, narrow


@triton.jit
def strata(seed_low, seed_high, step, stream, each, longer, ROWS: tl.constexpr):
    """Strata of `each` elements, the first `longer` of them with one more. Of this program's strata, all [ROWS, 1]: which they are, their first element, their size and the element drawn."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    size = each + (row < longer).to(tl.int64)
    first = row * each + tl.minimum(row, longer)
    group = row // 4
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    c0, c1, c2, c3 = tl.philox_impl(
        low, (group >> 32).to(tl.uint32), tl.zeros_like(low) + step.to(tl.uint32, bitcast=True),
        tl.zeros_like(low) + stream.to(tl.uint32, bitcast=True),
        seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True), 7,
    )
    of = row % 4
    word = tl.where(of == 0, c0, tl.where(of == 1, c1, tl.where(of == 2, c2, c3)))
    return row, first, size, first + ((word.to(tl.int64) * size) >> 32)


@triton.jit
def piece(row, first, size, chunk, k, WIDTH: tl.constexpr):
    """The elements of piece `chunk` of each stratum, int64 [ROWS, WIDTH], and which of them exist."""
    column = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
    return first + column, (row < k) & (column < size)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "stream", "k", "each", "longer"])
def randomk_encode(
    x, residual, loss_scale, values, seed_low, seed_high, step, stream, k, each, longer, chunks,
    SCALED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    row, first, size, drawn = strata(seed_low, seed_high, step, stream, each, longer, ROWS)
    most = tl.zeros((ROWS,), tl.int32)
    for chunk in range(chunks):
        at, inside = piece(row, first, size, chunk, k, WIDTH)
        acc, kept = accumulate(x, residual, loss_scale, at, inside)
        most = tl.maximum(most, tl.max(magnitude(acc), 1))
    usable = (most < NON_FINITE)[:, None]
    value, _ = accumulate(x, residual, loss_scale, drawn, row < k)
    if SCALED:
        value = value * size.to(tl.float32)
    tl.store(values + row, tl.where(usable, value, float_of(tl.full((ROWS, 1), NAN, tl.int32))), mask=row < k)
    tl.debug_barrier()  # the residual of what was drawn has been read
    for chunk in range(chunks):
        at, inside = piece(row, first, size, chunk, k, WIDTH)
        acc, kept = accumulate(x, residual, loss_scale, at, inside)
        keep(residual, loss_scale, at, inside, tl.where(at == drawn, 0.0, acc), usable, kept)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "stream", "k", "each", "longer"])
def randomk_decode_sum(
    out, weight, values, seed_low, seed_high, step, stream, rows, stride, k, each, longer, chunks, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row, first, size, drawn = strata(seed_low, seed_high, step, stream, each, longer, ROWS)
    total = tl.load(values + row, mask=row < k, other=0.0)
    for _ in range(1, rows):
        values += stride
        total += tl.load(values + row, mask=row < k, other=0.0)
    for chunk in range(chunks):
        at, inside = piece(row, first, size, chunk, k, WIDTH)
        tl.store(out + at, narrow(tl.where(at == drawn, total, 0.0) * weight, out.dtype.element_ty), mask=inside)
