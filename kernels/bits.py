"""A list of small integers as a stream of bits. A program owns TILE bytes, or TILE entries."""

import triton
import triton.language as tl


@triton.jit
def bits_pack(index, packed, count, WIDTH: tl.constexpr, TILE: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    value = tl.zeros((TILE,), tl.int32)
    for i in tl.static_range(8):
        bit = byte * 8 + i
        entry = tl.load(index + bit // WIDTH, mask=bit < count * WIDTH, other=0).to(tl.int32)
        value |= ((entry >> (bit % WIDTH).to(tl.int32)) & 1) << i
    tl.store(packed + byte, value.to(tl.uint8), mask=byte * 8 < count * WIDTH)


@triton.jit
def bits_unpack(packed, index, count, WIDTH: tl.constexpr, TILE: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    bit = entry * WIDTH
    word = tl.zeros((TILE,), tl.int32)
    for i in tl.static_range(3):  # of 16 bits, the first of which may be the last of its byte
        byte = bit // 8 + i
        word |= tl.load(packed + byte, mask=byte * 8 < count * WIDTH, other=0).to(tl.int32) << (8 * i)
    value = (word >> (bit % 8).to(tl.int32)) & ((1 << WIDTH) - 1)
    tl.store(index + entry, value.to(tl.int16), mask=entry < count)
