"""float16 values with a power of two per block."""

import triton
import triton.language as tl

from .blocks import block_absmax, block_tile, load_scales, store_scales
from .codec import NON_FINITE, accumulate, float_of, keep, narrow


@triton.jit
def half_encode(
    x, residual, loss_scale, values, scales, n,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    absmax, acc, kept = block_absmax(x, residual, loss_scale, n, BLOCK, ROWS, WIDTH, CHUNKS)
    finite = absmax < NON_FINITE
    exponent = tl.maximum((absmax >> 23) - 14, 1)
    scale = float_of(exponent << 23)
    inverse = float_of((254 - exponent) << 23)
    store_scales(scales, scale, finite, n, BLOCK, ROWS)
    usable = finite[:, None]
    for chunk in range(CHUNKS):
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        if CHUNKS > 1:
            acc, kept = accumulate(x, residual, loss_scale, at, inside)
        value = tl.where(usable, acc * inverse[:, None], 0.0).to(tl.float16)
        tl.store(values + at, value, mask=inside)
        keep(residual, loss_scale, at, inside, acc - value.to(tl.float32) * scale[:, None], usable, kept)


@triton.jit
def half_decode_sum(
    out, weight, values, scales, rows, value_stride, scale_stride, n,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    for chunk in range(CHUNKS):
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        value, scale = values, scales
        total = tl.load(value + at, mask=inside, other=0.0).to(tl.float32) * load_scales(scale, n, BLOCK, ROWS)
        for _ in range(1, rows):
            value += value_stride
            scale += scale_stride
            total += tl.load(value + at, mask=inside, other=0.0).to(tl.float32) * load_scales(scale, n, BLOCK, ROWS)
        tl.store(out + at, narrow(total * weight, out.dtype.element_ty), mask=inside)
