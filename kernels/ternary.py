"""One of three values each, five to a byte. A block of 5 m elements is five pieces of block_tile, WIDTH = m, and byte j of
it holds element j of each piece. Encode reads 8 and writes 4.2 bytes a value and reads x and residual a second time from the cache."""

import triton
import triton.language as tl

from .blocks import block_absmax, block_tile, load_scales
from .codec import accumulate, keep, narrow
from .quant import put_scales, rounded


@triton.jit
def bytes_tile(n, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The bytes of this program's blocks as int64 [ROWS, WIDTH], and which of them exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], (row * BLOCK < n)[:, None]


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "stream"])
def ternary_encode(
    x, residual, loss_scale, codes, scales, seed_low, seed_high, step, stream, n,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    absmax, acc, kept = block_absmax(x, residual, loss_scale, n, BLOCK, ROWS, WIDTH, CHUNKS)
    scale, inverse, usable = put_scales(absmax, scales, n, 1, STOCHASTIC, BLOCK, ROWS)
    byte = tl.zeros((ROWS, WIDTH), tl.int32)
    for i in range(CHUNKS):
        digit = CHUNKS - 1 - i
        at, inside = block_tile(n, digit, BLOCK, ROWS, WIDTH)
        acc, kept = accumulate(x, residual, loss_scale, at, inside)
        scaled = tl.where(usable, acc * inverse[:, None], 0.0)
        q = rounded(scaled, seed_low, seed_high, step, stream, digit, 1, STOCHASTIC, BLOCK, ROWS, WIDTH)
        byte = byte * 3 + q.to(tl.int32) + 1
        keep(residual, loss_scale, at, inside, acc - q * scale[:, None], usable, kept)
    at, inside = bytes_tile(n, BLOCK, ROWS, WIDTH)
    tl.store(codes + at, byte.to(tl.uint8), mask=inside)


@triton.jit
def digits(codes, at, inside, POWER: tl.constexpr):
    """q of the digit that counts POWER. A byte above 242, which no encoder writes, has 3 for its last digit."""
    digit = tl.load(codes + at, mask=inside, other=0).to(tl.int32) // POWER
    if POWER < 81:
        digit = digit % 3
    return (digit - 1).to(tl.float32)


@triton.jit
def ternary_decode_sum(
    out, weight, codes, scales, rows, code_stride, scale_stride, n,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    byte_at, byte_inside = bytes_tile(n, BLOCK, ROWS, WIDTH)
    for digit in tl.static_range(CHUNKS):
        code, scale = codes, scales
        total = digits(code, byte_at, byte_inside, 3**digit) * load_scales(scale, n, BLOCK, ROWS)
        for _ in range(1, rows):
            code += code_stride
            scale += scale_stride
            total += digits(code, byte_at, byte_inside, 3**digit) * load_scales(scale, n, BLOCK, ROWS)
        at, inside = block_tile(n, digit, BLOCK, ROWS, WIDTH)
        tl.store(out + at, narrow(total * weight, out.dtype.element_ty), mask=inside)
