"""Blocks that share a scale. A program owns ROWS whole blocks, held as [ROWS, WIDTH] with WIDTH the next power of two, or
one block too large for that, which it reads in CHUNKS pieces of WIDTH and, to encode, reads twice."""

import triton
import triton.language as tl

from .codec import NAN, accumulate, float_of, magnitude


@triton.jit
def block_tile(n, chunk, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The elements of piece `chunk` of this program's blocks as int64 [ROWS, WIDTH], and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = chunk * WIDTH + tl.arange(0, WIDTH)
    at = row[:, None] * BLOCK + column[None, :]
    inside = at < n
    if BLOCK % WIDTH != 0:
        inside = inside & (column < BLOCK)[None, :]
    return at, inside


@triton.jit
def packed_tile(n, chunk, PER: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The bytes that hold the elements of block_tile, PER to a byte, and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = chunk * (WIDTH // PER) + tl.arange(0, WIDTH // PER)
    at = row[:, None] * (BLOCK // PER) + column[None, :]
    inside = PER * at < n
    if BLOCK % WIDTH != 0:
        inside = inside & (PER * column < BLOCK)[None, :]
    return at, inside


@triton.jit
def pack(codes, PER: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Bytes [ROWS, WIDTH / PER] of the codes [ROWS, WIDTH], the first one lowest."""
    shifts = (tl.arange(0, PER) * (8 // PER))[None, None, :]
    return tl.sum(tl.reshape(codes, (ROWS, WIDTH // PER, PER)) << shifts, 2).to(tl.uint8)


@triton.jit
def unpack(packed, PER: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The codes [ROWS, WIDTH] of bytes [ROWS, WIDTH / PER], int32."""
    shifts = (tl.arange(0, PER) * (8 // PER))[None, None, :]
    return tl.reshape(packed.to(tl.int32)[:, :, None] >> shifts & ((1 << (8 // PER)) - 1), (ROWS, WIDTH))


@triton.jit
def block_absmax(
    x, residual, loss_scale, n, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
):
    """The largest magnitude of each block as bits, int32 [ROWS], and acc and the residual of the last piece."""
    at, inside = block_tile(n, 0, BLOCK, ROWS, WIDTH)
    acc, kept = accumulate(x, residual, loss_scale, at, inside)
    absmax = tl.max(magnitude(acc), 1)
    for chunk in range(1, CHUNKS):
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        acc, kept = accumulate(x, residual, loss_scale, at, inside)
        absmax = tl.maximum(absmax, tl.max(magnitude(acc), 1))
    return absmax, acc, kept


@triton.jit
def store_scales(scales, scale, finite, n, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(scales + row, tl.where(finite, scale, float_of(tl.full((ROWS,), NAN, tl.int32))), mask=row * BLOCK < n)


@triton.jit
def load_scales(scales, n, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return tl.load(scales + row, mask=row * BLOCK < n, other=0.0)[:, None]
