"""8, 4 or 2 bits a value with a scale per block. Encode reads 8 and writes 4 + BITS / 8 bytes a value, decode the reverse.
Resum reads BITS / 8 of each row and 4 and writes 4 + BITS / 8; of blocks too large for one piece it reads the rows twice."""

import triton
import triton.language as tl

from .blocks import block_absmax, block_tile, load_scales, pack, packed_tile, store_scales, unpack
from .codec import NON_FINITE, accumulate, float_of, keep, magnitude, narrow, nearest, with_residual


@triton.jit
def philox(seed_low, seed_high, step, stream, chunk, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """16 uniform bits for each element of block_tile: one draw serves eight neighbours, so blocks are multiples of 8."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = row[:, None] * (BLOCK // 8) + (chunk * (WIDTH // 8) + tl.arange(0, WIDTH // 8))[None, :]
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    c0, c1, c2, c3 = tl.philox_impl(
        low, (group >> 32).to(tl.uint32), tl.zeros_like(low) + step.to(tl.uint32, bitcast=True),
        tl.zeros_like(low) + stream.to(tl.uint32, bitcast=True),
        seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True), 7,
    )
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # the last axis counts fastest: c0, c1, c2, c3
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, WIDTH)).to(tl.int32)


@triton.jit
def load_codes(codes, n, chunk, BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """q of the elements of block_tile, float32 [ROWS, WIDTH]."""
    if BITS == 8:
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        return tl.load(codes + at, mask=inside, other=0).to(tl.float32)
    else:
        zero: tl.constexpr = 8 if BITS == 4 else 1
        at, inside = packed_tile(n, chunk, 8 // BITS, BLOCK, ROWS, WIDTH)
        return (unpack(tl.load(codes + at, mask=inside, other=0), 8 // BITS, ROWS, WIDTH) - zero).to(tl.float32)


@triton.jit
def store_codes(codes, q, n, chunk, BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    if BITS == 8:
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        tl.store(codes + at, q.to(tl.int32).to(tl.int8), mask=inside)
    else:
        zero: tl.constexpr = 8 if BITS == 4 else 1
        at, inside = packed_tile(n, chunk, 8 // BITS, BLOCK, ROWS, WIDTH)
        tl.store(codes + at, pack(q.to(tl.int32) + zero, 8 // BITS, ROWS, WIDTH), mask=inside)


@triton.jit
def scale_of(absmax, finite, LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """What a step of each block is worth, and its reciprocal or 0."""
    steps: tl.constexpr = 2.0 if LEVELS == 1 and not STOCHASTIC else LEVELS * 1.0
    scale = tl.where(finite, tl.div_rn(float_of(absmax), steps), 0.0)
    inverse = tl.where(scale > 0, tl.div_rn(1.0, scale), 0.0)
    return scale, tl.where(inverse < float("inf"), inverse, 0.0)


@triton.jit
def put_scales(absmax, scales, n, LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Writes the scales of the blocks. Returns them as scale_of does, and which blocks are finite, [ROWS, 1]."""
    finite = absmax < NON_FINITE
    scale, inverse = scale_of(absmax, finite, LEVELS, STOCHASTIC)
    store_scales(scales, scale, finite, n, BLOCK, ROWS)
    return scale, inverse, finite[:, None]


@triton.jit
def rounded(
    scaled, seed_low, seed_high, step, stream, chunk,
    LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """q of acc / scale for the elements of block_tile, whole float32."""
    if STOCHASTIC:
        random = philox(seed_low, seed_high, step, stream, chunk, BLOCK, ROWS, WIDTH)
        scaled = scaled + random.to(tl.float32) * (1.0 / 65536.0)
    q = nearest(scaled)
    if STOCHASTIC:
        q = tl.where(q > scaled, q - 1.0, q)
    return tl.where(q > LEVELS, LEVELS * 1.0, tl.where(q < -LEVELS, -LEVELS * 1.0, q))


@triton.jit
def encode_piece(
    residual, loss_scale, codes, acc, kept, scale, inverse, usable, seed_low, seed_high, step, stream, n, chunk,
    BITS: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Writes the codes and the residual of the elements of block_tile."""
    levels: tl.constexpr = 127 if BITS == 8 else 7 if BITS == 4 else 1
    at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
    scaled = tl.where(usable, acc * inverse[:, None], 0.0)
    q = rounded(scaled, seed_low, seed_high, step, stream, chunk, levels, STOCHASTIC, BLOCK, ROWS, WIDTH)
    store_codes(codes, q, n, chunk, BITS, BLOCK, ROWS, WIDTH)
    keep(residual, loss_scale, at, inside, acc - q * scale[:, None], usable, kept)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "stream"])
def quant_encode(
    x, residual, loss_scale, codes, scales, seed_low, seed_high, step, stream, n,
    BITS: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    levels: tl.constexpr = 127 if BITS == 8 else 7 if BITS == 4 else 1
    absmax, acc, kept = block_absmax(x, residual, loss_scale, n, BLOCK, ROWS, WIDTH, CHUNKS)
    scale, inverse, usable = put_scales(absmax, scales, n, levels, STOCHASTIC, BLOCK, ROWS)
    for chunk in range(CHUNKS):
        if CHUNKS > 1:
            at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
            acc, kept = accumulate(x, residual, loss_scale, at, inside)
        encode_piece(
            residual, loss_scale, codes, acc, kept, scale, inverse, usable, seed_low, seed_high, step, stream, n, chunk,
            BITS, STOCHASTIC, BLOCK, ROWS, WIDTH,
        )


@triton.jit
def row_sum(
    codes, scales, rows, code_stride, scale_stride, n, chunk,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """What the rows hold for the elements of block_tile, added in their order."""
    total = load_codes(codes, n, chunk, BITS, BLOCK, ROWS, WIDTH) * load_scales(scales, n, BLOCK, ROWS)
    for _ in range(1, rows):
        codes += code_stride
        scales += scale_stride
        total += load_codes(codes, n, chunk, BITS, BLOCK, ROWS, WIDTH) * load_scales(scales, n, BLOCK, ROWS)
    return total


@triton.jit
def quant_decode_sum(
    out, weight, codes, scales, rows, code_stride, scale_stride, n,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    for chunk in range(CHUNKS):
        total = row_sum(codes, scales, rows, code_stride, scale_stride, n, chunk, BITS, BLOCK, ROWS, WIDTH)
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        tl.store(out + at, narrow(total * weight, out.dtype.element_ty), mask=inside)


@triton.jit
def accumulate_rows(
    codes, scales, rows, code_stride, scale_stride, residual, loss_scale, n, chunk,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """As accumulate, with the sum of the rows for the gradient."""
    total = row_sum(codes, scales, rows, code_stride, scale_stride, n, chunk, BITS, BLOCK, ROWS, WIDTH)
    at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
    return with_residual(tl.where(inside, total, 0.0), residual, loss_scale, at, inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "stream"])
def quant_resum(
    row_codes, row_scales, rows, code_stride, scale_stride, residual, loss_scale, codes, scales, seed_low, seed_high, step, stream, n,
    BITS: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    levels: tl.constexpr = 127 if BITS == 8 else 7 if BITS == 4 else 1
    acc, kept = accumulate_rows(
        row_codes, row_scales, rows, code_stride, scale_stride, residual, loss_scale, n, 0, BITS, BLOCK, ROWS, WIDTH)
    absmax = tl.max(magnitude(acc), 1)
    for chunk in range(1, CHUNKS):
        acc, kept = accumulate_rows(
            row_codes, row_scales, rows, code_stride, scale_stride, residual, loss_scale, n, chunk, BITS, BLOCK, ROWS, WIDTH)
        absmax = tl.maximum(absmax, tl.max(magnitude(acc), 1))
    scale, inverse, usable = put_scales(absmax, scales, n, levels, STOCHASTIC, BLOCK, ROWS)
    for chunk in range(CHUNKS):
        if CHUNKS > 1:
            acc, kept = accumulate_rows(
                row_codes, row_scales, rows, code_stride, scale_stride, residual, loss_scale, n, chunk, BITS, BLOCK, ROWS, WIDTH)
        encode_piece(
            residual, loss_scale, codes, acc, kept, scale, inverse, usable, seed_low, seed_high, step, stream, n, chunk,
            BITS, STOCHASTIC, BLOCK, ROWS, WIDTH,
        )
