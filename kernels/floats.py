"""Small floats with a scale per block: see csrc/codec/floats.h. Encode reads 8 and writes 4.5 to 5 bytes a value, decode the
reverse. ELEMENT and SCALING are those of csrc/ops.h."""

import triton
import triton.language as tl

from .blocks import block_absmax, block_tile, pack, packed_tile, unpack
from .codec import NAN, NON_FINITE, accumulate, bits_of, canonical, float_of, keep, magnitude, narrow
from .quant import philox

E4M3 = tl.constexpr(0)
E5M2 = tl.constexpr(1)
E2M1 = tl.constexpr(2)
POWER = tl.constexpr(3)
FLOAT32 = tl.constexpr(0)
E8M0 = tl.constexpr(1)


@triton.jit
def absmax(x, residual, loss_scale, out, divisor, n, TILE: tl.constexpr):
    """out: bits as int32 [1], zero before. A quotient rounds like the largest one or below it: each tile divides its own."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    acc, kept = accumulate(x, residual, loss_scale, at, at < n)
    tl.atomic_max(out, magnitude(canonical(tl.div_rn(float_of(tl.max(magnitude(acc), 0)), divisor))), sem="relaxed")


@triton.jit
def to_small(x, random, ELEMENT: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Codes of finite x as int32, and their values."""
    mantissa: tl.constexpr = 3 if ELEMENT == E4M3 else 2 if ELEMENT == E5M2 else 1 if ELEMENT == E2M1 else 0
    least: tl.constexpr = (121 if ELEMENT == E4M3 else 113 if ELEMENT == E5M2 else 127 if ELEMENT == E2M1 else 1) << 23
    most: tl.constexpr = 0x43E00000 if ELEMENT == E4M3 else 0x47600000 if ELEMENT == E5M2 else 0x40C00000 if ELEMENT == E2M1 else 0x3F800000
    size = tl.minimum(magnitude(x), most)
    exponent = tl.maximum(size & 0x7F800000, least)
    if STOCHASTIC:
        spacings = float_of(size) * float_of(0x7F000000 - exponent)
        fixed = (spacings * (131072.0 * (1 << mantissa))).to(tl.int32)
        q = (fixed + (2 * random + 1)) >> 17
        value = q.to(tl.float32) * float_of(exponent - (mantissa << 23))
    else:
        rounder = exponent + ((23 - mantissa) << 23)
        total = float_of(size) + float_of(rounder)
        q = bits_of(total) - rounder
        value = total - float_of(rounder)
    code = q + ((exponent - least) >> (23 - mantissa))
    negative = bits_of(x) < 0
    value = tl.where(negative, float_of(bits_of(value) | -0x80000000), value)
    return tl.where(negative, code | (8 if ELEMENT == E2M1 else 128), code), value


@triton.jit
def from_small(code, ELEMENT: tl.constexpr):
    """Values of codes as int32."""
    mantissa: tl.constexpr = 3 if ELEMENT == E4M3 else 2 if ELEMENT == E5M2 else 1 if ELEMENT == E2M1 else 0
    least: tl.constexpr = (121 if ELEMENT == E4M3 else 113 if ELEMENT == E5M2 else 127 if ELEMENT == E2M1 else 1) << 23
    sign: tl.constexpr = 8 if ELEMENT == E2M1 else 128
    rest = code & (sign - 1)
    placed = (rest << (23 - mantissa)) + least
    below = bits_of(float_of(placed) - float_of(tl.full(placed.shape, least, tl.int32)))
    bits = tl.where(rest >> mantissa != 0, placed - (1 << 23), below)
    if ELEMENT == E4M3:
        bits = tl.where(rest == 0x7F, NAN, bits)
    if ELEMENT == E5M2:
        bits = tl.where(rest >= 0x7C, (rest << 21) | 0x7F800000, bits)
    return float_of(tl.where((code & sign) != 0, bits | -0x80000000, bits))


@triton.jit
def from_e8m0(code):
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return float_of(tl.where(code == 0xFF, NAN, bits))


@triton.jit
def shared_scale(largest, whole, ELEMENT: tl.constexpr, SCALING: tl.constexpr):
    """From the bits of each block's largest magnitude: its code or, for FLOAT32, itself; the scale; whether it is finite."""
    finite = largest < NON_FINITE
    if SCALING == FLOAT32:
        most: tl.constexpr = 448.0 if ELEMENT == E4M3 else 57344.0
        scale = tl.div_rn(float_of(tl.where(finite, largest, 0)), most)
        return float_of(tl.where(finite, bits_of(scale), NAN)), scale, finite
    elif SCALING == E8M0:
        top: tl.constexpr = 8 if ELEMENT == E4M3 else 15 if ELEMENT == E5M2 else 2 if ELEMENT == E2M1 else -1
        code = tl.minimum(tl.maximum((largest >> 23) - top, 0), 254)
        return tl.where(finite, code, 0xFF).to(tl.uint8), from_e8m0(code), finite
    else:
        factor = tl.load(whole + tl.zeros_like(largest))
        finite = finite & (magnitude(factor) < NON_FINITE)
        positive = finite & (factor > 0)
        ratio = tl.div_rn(tl.div_rn(float_of(tl.where(positive, largest, 0)), 6.0), tl.where(positive, factor, 1.0))
        code, value = to_small(ratio, 0, E4M3, False)
        return tl.where(finite, code, 0x7F).to(tl.uint8), value * tl.where(finite, factor, 0.0), finite


@triton.jit
def load_scale(scales, whole, n, SCALING: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    held = tl.load(scales + row, mask=row * BLOCK < n, other=0)
    if SCALING == FLOAT32:
        scale = held
    elif SCALING == E8M0:
        scale = from_e8m0(held.to(tl.int32))
    else:
        scale = from_small(held.to(tl.int32), E4M3) * tl.load(whole)
    return scale[:, None]


@triton.jit
def load_small(codes, n, chunk, ELEMENT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Values of the elements of block_tile without their scale, float32 [ROWS, WIDTH]."""
    if ELEMENT == E2M1:
        at, inside = packed_tile(n, chunk, 2, BLOCK, ROWS, WIDTH)
        code = unpack(tl.load(codes + at, mask=inside, other=0), 2, ROWS, WIDTH)
    else:
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    return from_small(code, ELEMENT)


@triton.jit
def store_small(codes, code, n, chunk, ELEMENT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    if ELEMENT == E2M1:
        at, inside = packed_tile(n, chunk, 2, BLOCK, ROWS, WIDTH)
        tl.store(codes + at, pack(code, 2, ROWS, WIDTH), mask=inside)
    else:
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        tl.store(codes + at, code.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "step", "stream"])
def float_encode(
    x, residual, loss_scale, codes, scales, whole, seed_low, seed_high, step, stream, n,
    ELEMENT: tl.constexpr, SCALING: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    largest, acc, kept = block_absmax(x, residual, loss_scale, n, BLOCK, ROWS, WIDTH, CHUNKS)
    stored, scale, finite = shared_scale(largest, whole, ELEMENT, SCALING)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(scales + row, stored, mask=row * BLOCK < n)
    inverse = tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0))
    inverse = tl.where((scale > 0) & (inverse < float("inf")), inverse, 0.0)
    usable = finite[:, None]
    for chunk in range(CHUNKS):
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        if CHUNKS > 1:
            acc, kept = accumulate(x, residual, loss_scale, at, inside)
        scaled = tl.where(usable, acc * inverse[:, None], 0.0)
        if STOCHASTIC:
            random = philox(seed_low, seed_high, step, stream, chunk, BLOCK, ROWS, WIDTH)
            code, value = to_small(scaled, random, ELEMENT, True)
        else:
            code, value = to_small(scaled, 0, ELEMENT, False)
        store_small(codes, code, n, chunk, ELEMENT, BLOCK, ROWS, WIDTH)
        keep(residual, loss_scale, at, inside, acc - value * scale[:, None], usable, kept)


@triton.jit
def float_decode_sum(
    out, weight, codes, scales, whole, rows, code_stride, scale_stride, whole_stride, n,
    ELEMENT: tl.constexpr, SCALING: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):
    for chunk in range(CHUNKS):
        code, scale, factor = codes, scales, whole
        total = load_small(code, n, chunk, ELEMENT, BLOCK, ROWS, WIDTH) * load_scale(scale, factor, n, SCALING, BLOCK, ROWS)
        for _ in range(1, rows):
            code += code_stride
            scale += scale_stride
            if factor is not None:
                factor += whole_stride
            total += load_small(code, n, chunk, ELEMENT, BLOCK, ROWS, WIDTH) * load_scale(scale, factor, n, SCALING, BLOCK, ROWS)
        at, inside = block_tile(n, chunk, BLOCK, ROWS, WIDTH)
        tl.store(out + at, narrow(total * weight, out.dtype.element_ty), mask=inside)
