"""Every value, as float32 or bfloat16. Encode reads 8 and writes 4 to 8 bytes a value."""

import triton
import triton.language as tl

from .codec import NON_FINITE, accumulate, keep, magnitude, narrow, widen


@triton.jit
def dense_encode(x, residual, loss_scale, values, n, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < n
    acc, kept = accumulate(x, residual, loss_scale, at, inside)
    value = narrow(acc, values.dtype.element_ty)
    tl.store(values + at, value, mask=inside)
    sent = widen(value)
    keep(residual, loss_scale, at, inside, acc - sent, magnitude(sent) < NON_FINITE, kept)


@triton.jit
def dense_decode_sum(out, weight, values, rows, stride, n, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < n
    total = widen(tl.load(values + at, mask=inside, other=0.0))
    for _ in range(1, rows):
        values += stride
        total += widen(tl.load(values + at, mask=inside, other=0.0))
    tl.store(out + at, narrow(total * weight, out.dtype.element_ty), mask=inside)
