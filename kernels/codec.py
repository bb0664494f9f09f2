"""What csrc/codec is to C++: one value at a time, and how a tile of the gradient is read and kept."""

import triton
import triton.language as tl

NON_FINITE = tl.constexpr(0x7F800000)  # magnitudes from here on are infinite or NaN
NAN = tl.constexpr(0x7FC00000)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """|x| as int32: its maximum does not depend on the order in which it is taken, which a float maximum with NaN does."""
    return bits_of(x) & 0x7FFFFFFF


@triton.jit
def canonical(x):
    """x, with 0x7fc00000 for any NaN."""
    return float_of(tl.where(magnitude(x) > NON_FINITE, NAN, bits_of(x)))


@triton.jit
def widen(x):
    """float32 of any gradient dtype, denormals included."""
    if x.dtype == tl.bfloat16:
        return float_of(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to any gradient dtype, to nearest even. bfloat16 by hand: what a conversion does depends on the machine."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(magnitude(x) > NON_FINITE, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def accumulate(x, residual, loss_scale, at, inside):
    """acc at these elements, and the residual before this step, which keep() needs again."""
    return with_residual(widen(tl.load(x + at, mask=inside, other=0.0)), residual, loss_scale, at, inside)


@triton.jit
def with_residual(acc, residual, loss_scale, at, inside):
    kept = acc
    if residual is not None:
        kept = tl.load(residual + at, mask=inside, other=0.0)
        acc = acc + kept * tl.load(loss_scale)
    return canonical(acc), kept


@triton.jit
def keep(residual, loss_scale, at, inside, error, usable, kept):
    """residual <- error / loss_scale where usable."""
    if residual is not None:
        inverse = tl.div_rn(1.0, tl.load(loss_scale))
        tl.store(residual + at, tl.where(usable, error * inverse, kept), mask=inside)


@triton.jit
def nearest(x):
    """To nearest even, for |x| < 2^22: 1.5 * 2^23 leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0
