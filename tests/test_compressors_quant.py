"""What the docstrings of int2, ternary, sign and the rotation promise; and that the plan clears the residual of exact
parameters where a method would gather one."""

import math

import op_cases
import pytest
import torch

import commopt
from commopt import backends
from commopt.plan import Message, Part
from commopt.wire import Layout
from ranks import close, same
from test_compressors import block_max, coded, normal

NEAREST = ["int2", "ternary:rounding=nearest", "sign"]
STOCHASTIC = ["int2:rounding=stochastic", "ternary"]
ROTATED = ["int4:rotate=hadamard", "int2:rotate=hadamard", "sign:rotate=hadamard", "ternary:rotate=hadamard"]
ALL = [*NEAREST, *STOCHASTIC, *ROTATED]
SIZES = [1, 7, 127, 128, 129, 1000, 5003]


def squares(x):
    return float(x.double().square().sum())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("spec", ALL)
def test_sent_plus_kept_is_what_there_was(spec, n):
    """To the rounding of one float32 subtraction, with a rotation too: the residual is what its decoder misses."""
    x, kept = normal(n), normal(n, 1, 0.1)
    had = x + kept
    sent = coded(spec, x, kept)
    close(sent.double() + kept.double(), had.double(), 2.0**-24 * torch.maximum(had.abs(), kept.abs()), spec)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("loss_scale", [65536.0, 2.0**-10])
def test_the_residual_is_in_unscaled_units(spec, loss_scale):
    x, kept, scaled_kept = normal(5003), normal(5003, 1, 0.1), normal(5003, 1, 0.1)
    want = coded(spec, x, kept)
    same(coded(spec, x * loss_scale, scaled_kept, loss_scale=loss_scale), want * loss_scale, "sent")
    same(scaled_kept, kept, "kept")


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30], ids=str)
@pytest.mark.parametrize("spec, block, levels", [("int2", 64, 2), ("ternary:rounding=nearest", 320, 2), ("int2:rounding=stochastic", 64, 1), ("ternary", 320, 1)])
def test_three_levels_and_the_bound(spec, block, levels, scale):
    x = normal(5003, 3, scale)
    sent, s = coded(spec, x).double(), block_max(x.double(), block) / levels
    close(sent, x.double(), s * (1 + 1e-6), spec)
    close(sent, (sent / s).round().clamp(-1, 1) * s, s * 1e-6, "three levels")
    if levels == 2:
        threshold = (x.abs().double() / s - 0.5).abs() > 1e-6
        same(sent.ne(0)[threshold], (x.abs().double() > 0.5 * s)[threshold])


@pytest.mark.parametrize("kind", ["normal", "heavy", "equal", "few"])
@pytest.mark.parametrize("spec, block", [("int2", 64), ("ternary:rounding=nearest", 320), ("sign", 1024)])
def test_contraction(spec, block, kind):
    x = op_cases.values_of(kind, 4 * 5120, 4)
    error = (coded(spec, x).double() - x.double()).view(-1, block).square().sum(1)
    blocks = x.double().view(-1, block)
    total = blocks.square().sum(1)
    if spec == "sign":  # the loss is exactly this much
        close(error, total - blocks.abs().sum(1).square() / block, 1e-5 * total)
    else:
        assert (error <= total - 0.75 * blocks.abs().amax(1).square() + 1e-6 * total).all()


def test_what_int2_loses():
    """The numbers of its docstring: blocks of 64 normal values, the first step and the steady state."""
    n, losses = 64 * 400, []
    kept = torch.zeros(n)
    for step in range(16):
        x = normal(n, step)
        coded("int2", x, kept)
        losses.append(squares(kept) / squares(x))
    assert losses[0] == pytest.approx(0.20, abs=0.01) and losses[-1] == pytest.approx(0.24, abs=0.015)


def test_the_scale_of_sign_is_the_mean_in_the_written_order():
    """Added here one value at a time; in another order the last bits differ."""
    import numpy as np

    for n, block in ((1024, 1024), (700, 1024), (64, 64), (200, 200)):
        x = op_cases.values_of("heavy", n, 8)
        partial = np.zeros(128, np.float32)
        for i, v in enumerate(x.abs().numpy()):
            partial[i % 128] += v
        while len(partial) > 1:
            partial = partial[: len(partial) // 2] + partial[len(partial) // 2 :]
        want = torch.from_numpy(partial / np.float32(n))
        signs, scales = torch.zeros(-(-n // 8), dtype=torch.uint8), torch.zeros(1)
        backends.select("cpu").sign_encode(x, None, torch.ones(1), signs, scales, block)
        same(scales, want, f"{n} {block}")
        bits = [int(signs[i // 8]) >> i % 8 & 1 for i in range(n)]
        assert bits == [int(v < 0) for v in x.tolist()]


def test_signs_of_zeros_and_sums_that_overflow():
    sent = coded("sign", torch.tensor([0.0, -0.0, 3.0, -3.0]))
    assert sent.tolist() == [1.5, 1.5, 1.5, -1.5]
    huge = torch.full((1024,), 3e38)
    sent = coded("sign", huge)
    assert torch.isfinite(sent).all() and (sent > 3e35).all()


GOLDEN = {  # x: eight values of a block whose scale is 1, then zeros
    "int2": ("codes", [2.0, -2.0, 0.4, 0.6, -0.6, 0.0, 2.0, 2.0], [2 | 0 << 2 | 1 << 4 | 2 << 6, 0 | 1 << 2 | 2 << 4 | 2 << 6, 0x55]),
    "ternary:rounding=nearest,block=40": (
        "codes", [2.0, -2.0, 0.4, 0.6, -0.6, 0.0, 2.0, 2.0], [122, 120, 121, 122, 120, 121, 122, 122]),
    "sign": ("signs", [1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0], [0b10110010, 0]),
}


@pytest.mark.parametrize("spec", GOLDEN)
def test_golden_bytes(spec):
    name, values, want = GOLDEN[spec]
    x = torch.zeros(12)
    x[:8] = torch.tensor(values)
    compressor = commopt.parse(spec)
    layout = Layout(compressor.fields(12))
    row = torch.zeros(layout.nbytes, dtype=torch.uint8)
    fields = dict(zip([f[0] for f in layout.fields], layout.views(row)))
    compressor.encode(backends.select("cpu"), x, None, *fields.values())
    assert fields[name].tolist()[: len(want)] == want
    same(fields["scales"], torch.tensor([8 / 12 if spec == "sign" else 1.0]))


def test_bytes_per_value():
    n = 5 * 2**20
    for spec, per_value in (("int2", 1 / 4 + 4 / 64), ("ternary", 1 / 5 + 4 / 320), ("sign", 1 / 8 + 4 / 1024), ("int4:rotate=hadamard", 1 / 2 + 4 / 128)):
        assert commopt.wire_bytes(spec, n) == pytest.approx(per_value * n, abs=32), spec


@pytest.mark.parametrize("spec", STOCHASTIC)
def test_stochastic_ternary_is_unbiased(spec):
    """As test_stochastic_rounding_is_unbiased: the mean of 1,000 draws against the variance that p (1 - p) gives."""
    n, draws = 960, 1000
    x = torch.rand(n, generator=torch.Generator().manual_seed(1)) * 1.8 - 0.9
    x[::64] = 1.0  # the scale
    total, kernels = torch.zeros(n, dtype=torch.float64), backends.select("cpu")
    for step in range(draws):
        total += coded(spec, x, draw=(17, step, 5), kernels=kernels).double()
    p = x.double().abs()
    free = (p > 0.02) & (p < 0.98)
    z = (total / draws - x.double())[free] / (p * (1 - p) / draws).sqrt()[free]
    assert abs(float(z.square().sum()) - z.numel()) < 5 * math.sqrt(2 * z.numel()) and float(z.abs().max()) < 5.5
    same(coded(spec, x)[::64], x[::64])


@pytest.mark.parametrize("spec", [*NEAREST, *ROTATED[:3]])
def test_error_feedback_gets_everything_across(spec):
    x, kept, kernels = normal(5003), torch.zeros(5003), backends.select("cpu")
    total, sizes = torch.zeros(5003, dtype=torch.float64), []
    for step in range(1, 151):
        total += coded(spec, x, kept, kernels=kernels)
        sizes.append(float(kept.norm() / x.norm()))
        close(total + kept.double(), step * x.double(), 2.0**-23 * step * (2 * max(sizes) + 2) * x.double().abs().max(), f"step {step}")
    # The same gradient every time is the hardest course for signs: what is large waits until the mean has grown.
    assert max(sizes) < (15 if spec.startswith("sign") else 1.1)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_sent_on_and_not_kept(spec, bad):
    x, kept = normal(5003), normal(5003, 1, 0.1)
    x[4000], before = bad, kept.clone()
    sent = coded(spec, x, kept)
    assert not torch.isfinite(sent[4000]) and torch.isfinite(kept).all() and torch.isfinite(sent[:2000]).all()
    same(kept[~torch.isfinite(sent)], before[~torch.isfinite(sent)])
    compressor = commopt.parse(spec)
    layout = Layout(compressor.fields(5003))
    row, kernels = torch.zeros(layout.nbytes, dtype=torch.uint8), backends.select("cpu")
    for value, finite in ((x, False), (normal(5003), True)):
        compressor.encode(kernels, value, None, *layout.views(row))
        witness = dict(zip([f[0] for f in layout.fields], layout.views(row)))[compressor.witness]
        assert bool(torch.isfinite(witness).all()) == finite


@pytest.mark.parametrize("spec", [*NEAREST, *STOCHASTIC, "int4:rotate=hadamard", "int2:rotate=hadamard"])
def test_rows_are_added_in_rank_order_in_float32(spec):
    """Big, -big, small: only this order gives small. A rotation keeps it: rows are added while they are rotated."""
    compressor, n = commopt.parse(spec), 256
    layout = Layout(compressor.fields(n))
    rows, kernels = torch.zeros(3, layout.nbytes, dtype=torch.uint8), backends.select("cpu")
    for r, value in enumerate((2.0**30, -(2.0**30), 1.0)):
        compressor.encode(kernels, torch.full((n,), value), None, *layout.views(rows[r]))
    small = coded(spec, torch.ones(n))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.empty(n, dtype=dtype)
        compressor.decode_sum(kernels, out, 0.5, *layout.views(rows))
        same(out, (small * 0.5).to(dtype), spec)


# --- the rotation ---


def hadamard(order: int) -> torch.Tensor:
    """By Sylvester's construction, float64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def test_the_rotation_is_the_matrix():
    """Against the matrix in float64; the signs are the binary digits of pi."""
    pi = 0x243F6A88_85A308D3_13198A2E_03707344
    assert (3 << 128 | pi) / 2**128 == math.pi
    signs = torch.tensor([1.0 - 2 * (pi >> 32 * (3 - i // 32) + i % 32 & 1) for i in range(128)], dtype=torch.float64)
    kernels, x, rotated, back = backends.select("cpu"), normal(3 * 128 + 50), torch.zeros(434), torch.zeros(434)
    kernels.hadamard_encode(x, None, torch.ones(1), rotated)
    want = (x[:384].double().view(3, 128) * signs) @ hadamard(128) / math.sqrt(128)
    close(rotated[:384].view(3, 128), want, 2e-6)
    same(rotated[384:], x[384:], "a shorter stretch stays as it is")
    kernels.hadamard_decode(back, 1.0, rotated)
    close(back, x.double(), 2.0**-21 * float(x.norm()))


@pytest.mark.parametrize("spec", ["int4", "int2"])
def test_the_rotation_tames_outliers(spec):
    """One value in 128 fifty times as large: without a rotation its block mates are crushed."""
    x = normal(128 * 64)
    x[::128] *= 50
    plain, rotated = (squares(coded(s, x) - x) for s in (spec, spec + ":rotate=hadamard"))
    mates = squares(x) - squares(x[::128])
    assert plain > 0.6 * mates and rotated < (0.2 if spec == "int4" else 0.6) * plain


def test_the_error_of_a_rotation_is_that_of_the_rotated_values():
    x, rotated, kernels = normal(128 * 100), torch.zeros(12800), backends.select("cpu")
    kernels.hadamard_encode(x, None, torch.ones(1), rotated)
    error, inner = (coded("int4:rotate=hadamard", x) - x).double().norm(), (coded("int4", rotated) - rotated).double().norm()
    assert abs(float(error - inner)) < 2.0**-20 * float(x.norm())


# --- exact parameters inside a part ---


@pytest.mark.parametrize("spec", ["sign", "int4:rotate=hadamard", "int4", "ternary:ef=true,rotate=hadamard"])
def test_exact_positions_keep_no_residual(spec):
    """And the others keep what they would without them."""
    n, exact = 2000, torch.cat([torch.arange(300, 340), torch.tensor([1500, 1999])])
    for parts in ([Part(0, n, commopt.parse(spec))], [Part(0, 1000, commopt.parse("int4")), Part(1000, n, commopt.parse(spec))]):
        message = Message(parts, exact, torch.device("cpu"), "x", "x")
        row, residual = torch.zeros(message.nbytes, dtype=torch.uint8), torch.zeros(n)
        message.encode(normal(n), residual, message.fields(row), (0, 0), None)
        assert not residual[exact].any()
        inside = torch.zeros(n, dtype=torch.bool)
        inside[exact] = True
        assert residual[~inside].ne(0).float().mean() > 0.9
        cleared = message._lost_zeros.tolist()
        assert cleared == [] if spec == "int4" else cleared == [p for p in exact.tolist() if p >= parts[-1].start]
        out = torch.zeros(n)
        message.decode_sum(out, 1.0, message.fields(row[None]))
        same(out[exact], normal(n)[exact])


def test_which_methods_keep_zeros():
    keeps = {spec: commopt.parse(spec).keeps_zero for spec in ("none", "bf16", "topk", "int8", "int4", "int2", "ternary", *ROTATED, "sign")}
    assert [spec for spec, kept in keeps.items() if not kept] == [*ROTATED, "sign"]
    for spec in ALL:
        if commopt.parse(spec).keeps_zero:
            x = normal(1000)
            x[::3] = 0
            assert not coded(spec, x)[::3].any()
    for spec in ALL:
        assert not coded(spec, torch.zeros(1000)).any()


@pytest.mark.parametrize("spec, message", [
    ("ternary:block=300", "block must be one of 40, 80, 160, 320, 640, 1280, got 300"), ("sign:block=12", "multiple of 8"),
    ("int2:block=4", "multiple of 8"), ("int8:rotate=hadamard", "not a key=value"), ("sign:rotate=dct", "none | hadamard"),
])
def test_bad_keys(spec, message):
    with pytest.raises(ValueError) as raised:
        commopt.parse(spec)
    assert message in str(raised.value)
