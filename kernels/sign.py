"""The sign of each value and the mean magnitude of its block. A program owns ROWS whole blocks and walks through them in
pieces of WIDTH = 128. Encode reads 8 and writes 4 + 1/8 bytes a value, and reads x and residual again from the cache."""

import triton
import triton.language as tl

from .blocks import block_tile, load_scales, pack, packed_tile, store_scales, unpack
from .codec import NON_FINITE, accumulate, float_of, keep, magnitude, narrow


@triton.jit
def halves(partial, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The second half of each row added to the first."""
    a, b = tl.split(tl.permute(tl.reshape(partial, (ROWS, 2, HALF)), (0, 2, 1)))
    return a + b


@triton.jit
def sign_encode(
    x, residual, loss_scale, signs, scales, n,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    partial = tl.zeros((ROWS, WIDTH), tl.float32)
    absmax = tl.zeros((ROWS, WIDTH), tl.int32)
    for chunk in range(CHUNKS):
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        acc, kept = accumulate(x, residual, loss_scale, at, inside)
        partial += float_of(magnitude(acc))
        absmax = tl.maximum(absmax, magnitude(acc))
    finite = tl.max(absmax, 1) < NON_FINITE
    partial = halves(halves(halves(partial, ROWS, 64), ROWS, 32), ROWS, 16)
    partial = halves(halves(halves(halves(partial, ROWS, 8), ROWS, 4), ROWS, 2), ROWS, 1)
    total = tl.reshape(partial, (ROWS,))
    total = tl.where(total < float("inf"), total, float_of(tl.full((ROWS,), NON_FINITE - 1, tl.int32)))
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = tl.maximum(tl.minimum(n - row * BLOCK, BLOCK), 1)
    mean = tl.div_rn(total, present.to(tl.int32).to(tl.float32))
    store_scales(scales, mean, finite, n, BLOCK, ROWS)
    usable = finite[:, None]
    for chunk in range(CHUNKS):
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        acc, kept = accumulate(x, residual, loss_scale, at, inside)
        negative = usable & (acc < 0)
        keep(residual, loss_scale, at, inside, acc - tl.where(negative, -mean[:, None], mean[:, None]), usable, kept)
        at, inside = packed_tile(n, chunk, 8, BLOCK, ROWS, WIDTH)
        tl.store(signs + at, pack(negative.to(tl.int32), 8, ROWS, WIDTH), mask=inside)


@triton.jit
def load_signs(signs, n, chunk, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    at, inside = packed_tile(n, chunk, 8, BLOCK, ROWS, WIDTH)
    return unpack(tl.load(signs + at, mask=inside, other=0), 8, ROWS, WIDTH)


@triton.jit
def signed(signs, scales, n, chunk, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    scale = load_scales(scales, n, BLOCK, ROWS)
    return tl.where(load_signs(signs, n, chunk, BLOCK, ROWS, WIDTH) != 0, -scale, scale)


@triton.jit
def sign_vote(
    row_signs, row_scales, rows, sign_stride, scale_stride, signs, scales, n,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    scale = row_scales
    total = load_scales(scale, n, BLOCK, ROWS)
    usable = magnitude(total) < NON_FINITE
    for _ in range(1, rows):
        scale += scale_stride
        size = load_scales(scale, n, BLOCK, ROWS)
        usable = usable & (magnitude(size) < NON_FINITE)
        total += size
    total = tl.where(magnitude(total) < NON_FINITE, total, float_of(tl.full((ROWS, 1), NON_FINITE - 1, tl.int32)))
    store_scales(scales, tl.reshape(total, (ROWS,)), tl.reshape(usable, (ROWS,)), n, BLOCK, ROWS)
    for chunk in range(CHUNKS):
        sign, scale = row_signs, row_scales
        ahead = 2 * load_signs(sign, n, chunk, BLOCK, ROWS, WIDTH) - 1
        sum = signed(sign, scale, n, chunk, BLOCK, ROWS, WIDTH)
        for _ in range(1, rows):
            sign += sign_stride
            scale += scale_stride
            ahead += 2 * load_signs(sign, n, chunk, BLOCK, ROWS, WIDTH) - 1
            sum += signed(sign, scale, n, chunk, BLOCK, ROWS, WIDTH)
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        negative = inside & usable & ((ahead > 0) | ((ahead == 0) & (sum < 0)))
        at, inside = packed_tile(n, chunk, 8, BLOCK, ROWS, WIDTH)
        tl.store(signs + at, pack(negative.to(tl.int32), 8, ROWS, WIDTH), mask=inside)


@triton.jit
def sign_decode_sum(
    out, weight, signs, scales, rows, sign_stride, scale_stride, n,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    for chunk in range(CHUNKS):
        sign, scale = signs, scales
        total = signed(sign, scale, n, chunk, BLOCK, ROWS, WIDTH)
        for _ in range(1, rows):
            sign += sign_stride
            scale += scale_stride
            total += signed(sign, scale, n, chunk, BLOCK, ROWS, WIDTH)
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        tl.store(out + at, narrow(total * weight, out.dtype.element_ty), mask=inside)
