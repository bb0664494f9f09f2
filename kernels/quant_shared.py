"""Integers with a scale that all ranks share. Absmax reads 8 bytes a value; encode reads 8 and writes 4 + BITS / 8, decode reads
BITS / 8 and writes 4."""

import triton
import triton.language as tl

from .blocks import block_absmax, block_tile, pack, packed_tile, unpack
from .codec import NAN, NON_FINITE, accumulate, float_of, keep, narrow
from .quant import rounded, scale_of


@triton.jit
def quant_absmax(
    x, residual, loss_scale, absmax, n, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
):
    most, _, _ = block_absmax(x, residual, loss_scale, n, BLOCK, ROWS, WIDTH, CHUNKS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(absmax + row, most, mask=row * BLOCK < n)


@triton.jit
def load_absmax(absmax, n, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The bits of the blocks' largest magnitudes, int32 [ROWS], and which of them are finite."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    most = tl.load(absmax + row, mask=row * BLOCK < n, other=0)
    return most, (most >= 0) & (most < NON_FINITE)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "stream"])
def quant_encode_shared(
    x, residual, loss_scale, absmax, codes, seed_low, seed_high, step, stream, n,
    LEVELS: tl.constexpr, BITS: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    most, finite = load_absmax(absmax, n, BLOCK, ROWS)
    scale, inverse = scale_of(most, finite, LEVELS, STOCHASTIC)
    usable = finite[:, None]
    for chunk in range(CHUNKS):
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        acc, kept = accumulate(x, residual, loss_scale, at, inside)
        scaled = tl.where(usable, acc * inverse[:, None], 0.0)
        q = rounded(scaled, seed_low, seed_high, step, stream, chunk, LEVELS, STOCHASTIC, BLOCK, ROWS, WIDTH)
        keep(residual, loss_scale, at, inside, acc - q * scale[:, None], usable, kept)
        code = tl.where(inside, q.to(tl.int32) + LEVELS, 0)
        if BITS == 4:
            at, inside = packed_tile(n, chunk, 2, BLOCK, ROWS, WIDTH)
            tl.store(codes + at, pack(code, 2, ROWS, WIDTH), mask=inside)
        else:
            tl.store(codes + at, code.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def quant_decode_shared(
    out, weight, codes, absmax, rows, n, LEVELS: tl.constexpr, BITS: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    most, finite = load_absmax(absmax, n, BLOCK, ROWS)
    scale, _ = scale_of(most, finite, LEVELS, STOCHASTIC)
    scale = tl.where(finite, scale, float_of(tl.full((ROWS,), NAN, tl.int32)))
    for chunk in range(CHUNKS):
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        if BITS == 4:
            byte, there = packed_tile(n, chunk, 2, BLOCK, ROWS, WIDTH)
            code = unpack(tl.load(codes + byte, mask=there, other=0), 2, ROWS, WIDTH)
        else:
            code = tl.load(codes + at, mask=inside, other=0).to(tl.int32) & ((1 << BITS) - 1)
        value = (code - rows * LEVELS).to(tl.float32) * scale[:, None]
        tl.store(out + at, narrow(value * weight, out.dtype.element_ty), mask=inside)
