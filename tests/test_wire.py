"""What travels, byte for byte. A change here breaks training between ranks of different versions."""

import hashlib

import numpy as np
import pytest
import torch

import commopt
from commopt import backends
from commopt.compressors import never_larger
from commopt.wire import Layout

X = torch.tensor([1.0, -0.5, 0.25, -4.0, 0.0, 3.0, 127.0, -1.0, 0.1])


def message(spec: str, x: torch.Tensor, draw=(5, 6, 7)) -> bytes:
    compressor, kernels = commopt.parse(spec), backends.select("cpu")
    kernels.draw = draw
    layout = Layout(compressor.fields(x.numel()))
    row = torch.zeros(layout.nbytes, dtype=torch.uint8)
    compressor.encode(kernels, x, None, *layout.views(row))
    return row.numpy().tobytes()


def fields(*arrays) -> bytes:
    """Arrays one after the other, each filled up to 16 bytes with zeros."""
    return b"".join(a.tobytes() + b"\0" * (-len(a.tobytes()) % 16) for a in map(np.asarray, arrays))


def f32(*values):
    return np.array(values, "<f4")


# Written out by hand from the formulas in the compressors' docstrings.
BY_HAND = {
    "none": fields(f32(1, -0.5, 0.25, -4, 0, 3, 127, -1, 0.1)),
    "bf16": fields(np.array([0x3F80, 0xBF00, 0x3E80, 0xC080, 0, 0x4040, 0x42FE, 0xBF80, 0x3DCD], "<u2")),
    # 127 is brought to 127 * 2^8 = 32512 by the scale 2^-8
    "fp16": fields(np.array([256, -128, 64, -1024, 0, 768, 32512, -256, 25.6], "<f2"), f32(2.0**-8)),
    "int8": fields(np.array([1, 0, 0, -4, 0, 3, 127, -1, 0], "i1"), f32(1)),  # -0.5 and 0.25 go to 0: ties to even
    # the scale is 127 / 7, so only 127 itself is not 0; q + 8, the even element in the low nibble
    "int4": fields(np.array([0x88, 0x88, 0x88, 0x8F, 0x08 | 0x80], "u1"), f32(np.float32(127) / np.float32(7))),
    "int4:block=8": fields(np.array([0x88, 0x88, 0x88, 0x8F, 0x8F], "u1"), f32(np.float32(127) / np.float32(7), np.float32(0.1) / np.float32(7))),
    # three of nine: 127, -4, 3, in the order of the index, 3, 5, 6: their lowest bits, then those above in unary, 1 + 0, 2 + 1 and 3 + 2
    "topk:ratio=0.3333": fields(f32(-4, 3, 127), np.array([0b011], "u1"), np.array([0b101010], "u1")),
    "topk:ratio=0.3333,values=int8": fields(np.array([-4, 3, 127], "i1"), f32(1), np.array([0b011], "u1"), np.array([0b101010], "u1")),
    # or whole, and in tile 0 they begin at once
    "topk:ratio=0.3333,index=u16": fields(f32(-4, 3, 127), np.array([3, 5, 6], "<u2"), np.array([0], "<i8")),
    "topk:ratio=0.3333,values=bf16,index=u16": fields(np.array([0xC080, 0x4040, 0x42FE], "<u2"), np.array([3, 5, 6], "<u2"), np.array([0], "<i8")),
}


@pytest.mark.parametrize("spec", BY_HAND)
def test_messages_written_by_hand(spec):
    got = message(spec, X)
    assert got == BY_HAND[spec], f"\n{got.hex(' ', 4)}, not\n{BY_HAND[spec].hex(' ', 4)}"


# SHA-256 of the message of 140,001 elements: three tiles, odd, the last block short.
PINNED = {
    "bf16": "072fc11e0e94e6f635b80b872c3af138",
    "fp16": "0d16eb049ff7be9c4e17604ab3756a78",
    "int8": "e97406f2458ad6a6958a3fae9aae9073",
    "int8:block=64": "be97b060abc5f27ddf4a5dba0ae11134",
    "int8:rounding=stochastic": "1d1a0f46b5a2178239f46d39b237a471",
    "int4": "5fd6863dd45ffc2bb5e848107144a809",
    "int4:rounding=stochastic": "a825fb3b22b51efd0e65d86faa8b6643",
    "topk:ratio=0.01,index=u16": "14b5d630939f9a3f2c7425180f96349b",
    "topk:ratio=0.01,values=bf16,index=u16": "dfeba32b80614ee076a2b609b28be56a",
    "topk:ratio=0.01": "2f730f977d15e43d92ac0d4dd7e1958e",
    "topk:ratio=0.01,values=int8": "1e9d392f999efca467edcc759de72ad2",
}


def ramp() -> torch.Tensor:
    """float32 [140001], made without a random generator."""
    i = torch.arange(140_001, dtype=torch.int64)
    return ((i * 2654435761 % 4294967296 - 2147483648).double() / 2.0**28).float() * (1 + i % 7)


@pytest.mark.parametrize("spec", PINNED)
def test_pinned_messages(spec):
    assert hashlib.sha256(message(spec, ramp())).hexdigest()[:32] == PINNED[spec]


def test_the_layout_of_the_docstring():
    layout = Layout(commopt.parse("int8").fields(300))
    assert [(name, dtype, count) for name, dtype, count in layout.fields] == [("codes", torch.int8, 300), ("scales", torch.float32, 2)]
    assert layout.offsets == [0, 304] and layout.nbytes == 320 == commopt.wire_bytes("int8", 300)


def test_fields_begin_at_multiples_of_16_and_do_not_meet():
    layout = Layout([("a", torch.uint8, 1), ("b", torch.float32, 0), ("c", torch.int64, 3), ("d", torch.bfloat16, 8)])
    assert layout.offsets == [0, 16, 16, 48] and layout.nbytes == 64
    rows = torch.zeros(3, 80, dtype=torch.uint8)  # rows may be longer than a message
    for i, view in enumerate(layout.views(rows)):
        assert view.shape == (3, layout.fields[i][2]) and view.dtype == layout.fields[i][1]
        view.fill_(i + 1)
    assert not rows[:, 64:].any()
    a, b, c, d = layout.views(rows[1])
    assert (a == 1).all() and (c == 3).all() and (d == 4).all()


SPECS = ["none", "fp16", "bf16", "int8", "int4", "topk", "int8:block=8", "int4:block=8", "topk:ratio=1.0", "topk:ratio=0.5,values=bf16", "topk:ratio=1.0,values=int8", "topk:index=u16"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_wire_bytes_is_exact_and_never_more_than_dense(spec, dtype):
    for n in [*range(0, 700), 1000, 1023, 1024, 4097, 65535, 65536, 65537, 10**6, 10**6 + 3, 3 * 10**9]:
        dense, said = n * dtype.itemsize, commopt.wire_bytes(spec, n, dtype)
        compressor = never_larger(commopt.parse(spec), n, dtype)
        assert 0 <= said <= dense
        if compressor.name != "none":
            assert said == Layout(compressor.fields(n)).nbytes < dense
            if n < 40 or n in (127, 128, 129, 1000, 1024):
                assert said == len(message(str(compressor), torch.ones(n, dtype=dtype)))
    with pytest.raises(ValueError, match="n must be"):
        commopt.wire_bytes(spec, -1)


def test_bytes_per_value():
    n = 2**24
    per = {spec: commopt.wire_bytes(spec, n) / n for spec in ("none", "bf16", "fp16", "int8", "int4", "topk", "topk:values=bf16", "topk:values=int8")}
    want = {"none": 4, "bf16": 2, "fp16": 2 + 4 / 1024, "int8": 1 + 4 / 256, "int4": 0.5 + 4 / 128,
            "topk": 0.01 * (4 + 8.5625 / 8), "topk:values=bf16": 0.01 * (2 + 8.5625 / 8), "topk:values=int8": 0.01 * (1 + 4 / 256 + 8.5625 / 8)}
    for spec in want:
        assert per[spec] == pytest.approx(want[spec], rel=0.005), spec
