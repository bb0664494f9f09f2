"""The Walsh-Hadamard rotation of stretches of 128 elements, ROWS of them to a program."""

import triton
import triton.language as tl

from .blocks import block_tile
from .codec import NON_FINITE, accumulate, bits_of, float_of, keep, magnitude, narrow

STRETCH = tl.constexpr(128)
ROOT = tl.constexpr(2.0**-3.5)


@triton.jit
def flipped(v):
    """The signs of [ROWS, 128] changed in the pattern of csrc/codec/hadamard.h."""
    i = tl.arange(0, STRETCH)
    word = tl.where(i < 32, 0x243F6A88, tl.where(i < 64, 0x85A308D3 - 0x100000000, tl.where(i < 96, 0x13198A2E, 0x03707344)))
    return float_of(bits_of(v) ^ ((word.to(tl.int32) >> (i & 31) & 1) << 31)[None, :])


@triton.jit
def pairs(v, ROWS: tl.constexpr, APART: tl.constexpr):
    """The elements of each row that are APART from each other become their sum and their difference."""
    v = tl.permute(tl.reshape(v, (ROWS, STRETCH // (2 * APART), 2, APART)), (0, 1, 3, 2))
    a, b = tl.split(v)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, STRETCH))


@triton.jit
def rotate(v, ROWS: tl.constexpr):
    v = v * ROOT
    v = pairs(pairs(pairs(v, ROWS, 1), ROWS, 2), ROWS, 4)
    return pairs(pairs(pairs(pairs(v, ROWS, 8), ROWS, 16), ROWS, 32), ROWS, 64)


@triton.jit
def whole(n, ROWS: tl.constexpr):
    """Which stretches are as long as the others; the last one stays as it is where it is not."""
    return ((tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS) + 1) * STRETCH <= n)[:, None]


@triton.jit
def rotated_back(rotated, n, at, inside, ROWS: tl.constexpr):
    v = tl.load(rotated + at, mask=inside, other=0.0)
    return tl.where(whole(n, ROWS), flipped(rotate(v, ROWS)), v)


@triton.jit
def hadamard_encode(x, residual, loss_scale, rotated, n, ROWS: tl.constexpr):
    at, inside = block_tile(n, 0, STRETCH, ROWS, STRETCH)
    acc, _ = accumulate(x, residual, loss_scale, at, inside)
    tl.store(rotated + at, tl.where(whole(n, ROWS), rotate(flipped(acc), ROWS), acc), mask=inside)


@triton.jit
def hadamard_keep(x, residual, loss_scale, rotated, n, ROWS: tl.constexpr):
    at, inside = block_tile(n, 0, STRETCH, ROWS, STRETCH)
    acc, kept = accumulate(x, residual, loss_scale, at, inside)
    sent = rotated_back(rotated, n, at, inside, ROWS)
    keep(residual, loss_scale, at, inside, acc - sent, magnitude(sent) < NON_FINITE, kept)


@triton.jit
def hadamard_decode(out, weight, rotated, n, ROWS: tl.constexpr):
    at, inside = block_tile(n, 0, STRETCH, ROWS, STRETCH)
    tl.store(out + at, narrow(rotated_back(rotated, n, at, inside, ROWS) * weight, out.dtype.element_ty), mask=inside)
