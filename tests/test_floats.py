"""The small floats and their scales against what is published: every code, every rounding, and whole blocks against slow
implementations in exact fractions, written from the specifications."""

import math
from fractions import Fraction

import pytest
import torch

import commopt
from commopt import backends
from commopt.backends import reference
from commopt.plan import Message, Part
from commopt.wire import Layout
from op_cases import values_of
from test_compressors import block_max, coded, normal
from ranks import close, same

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
MOST = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
EVERY = torch.arange(256, dtype=torch.uint8)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def kernels_here():
    return backends.select("cpu")


def encoded(spec, x, residual=None, draw=(0, 0, 0)):
    """The fields of one message by name."""
    compressor, kernels = commopt.parse(spec), kernels_here()
    kernels.draw = draw
    layout = Layout(compressor.fields(x.numel()))
    fields = layout.views(torch.zeros(layout.nbytes, dtype=torch.uint8))
    compressor.encode(kernels, x, residual, *fields)
    return dict(zip((name for name, _, _ in layout.fields), fields))


def decoded(codes, scales, whole, element, scaling, block, n):
    out = torch.empty(n)
    rows = [None if t is None else t[None] for t in (codes, scales, whole)]
    kernels_here().float_decode_sum(out, 1.0, *rows, element, scaling, block)
    return out


def nibbles(codes, n):
    return torch.stack([codes & 15, codes >> 4], 1).flatten()[:n]


def one_to_one(x, element):
    """Codes of x with scale 1: each block of 8 begins with a value that asks for it, and carries seven of x."""
    most, width = MOST[element], 7
    rows = torch.nn.functional.pad(x, (0, -x.numel() % width)).view(-1, width)
    first = torch.full((rows.shape[0], 1), most)
    flat = torch.cat([first, rows], 1).flatten()
    codes, scales = torch.zeros(flat.numel(), dtype=torch.uint8), torch.zeros(rows.shape[0])
    kernels_here().float_encode(flat, None, torch.ones(1), codes, scales, None, element, "float32", 8, False, (0, 0, 0))
    assert (scales == 1).all()
    return codes.view(-1, 8)[:, 1:].flatten()[: x.numel()]


# --- every code ---


@pytest.mark.parametrize("element", TORCH)
def test_every_8_bit_code_is_the_published_value(element):
    got = decoded(EVERY, torch.ones(1), None, element, "float32", 256, 256)
    want = EVERY.view(TORCH[element]).float()
    assert torch.equal(got.isnan(), want.isnan()) and int(want.isnan().sum()) == (2 if element == "e4m3" else 6)
    same(got.nan_to_num(nan=7.0, posinf=torch.inf, neginf=-torch.inf), want.nan_to_num(nan=7.0, posinf=torch.inf, neginf=-torch.inf), element)


def test_every_4_bit_code_is_the_published_value():
    codes = EVERY  # each pair of codes
    got = decoded(codes, torch.full((16,), 127, dtype=torch.uint8), None, "e2m1", "e8m0", 32, 512)
    want = torch.tensor(E2M1 + [-v for v in E2M1])
    same(got, want[nibbles(codes, 512).long()])


def test_every_power_is_its_value():
    got = decoded(EVERY, torch.tensor([127], dtype=torch.uint8), None, "power", "e8m0", 256, 256)
    want = torch.tensor([0.0] + [2.0 ** (m - 127) for m in range(1, 128)])
    same(got, torch.cat([want, -want]))


def test_every_e8m0_scale_is_a_power_of_two():
    codes = torch.full((256 * 8,), 0x38, dtype=torch.uint8)  # 1 in e4m3
    got = decoded(codes, EVERY, None, "e4m3", "e8m0", 8, 2048)[::8]
    want = torch.tensor([math.ldexp(1.0, c - 127) for c in range(255)])
    assert got[255].isnan()
    same(got[:255], want)


def test_every_e4m3_scale_is_multiplied_with_the_one_for_all():
    codes = torch.full((256 * 4,), 0x22, dtype=torch.uint8)  # 1 in e2m1
    got = decoded(codes, EVERY, torch.tensor([3.0]), "e2m1", "e4m3", 8, 2048)[::8]
    want = EVERY.view(torch.float8_e4m3fn).float() * 3
    same(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


# --- every rounding ---


@pytest.mark.parametrize("element", TORCH)
def test_rounding_is_that_of_torch(element):
    """Every float32 whose lower 12 bits are zero, and one unit to either side of every tie: magnitudes up to the largest."""
    e = reference.floats.ELEMENTS[element]
    coarse = torch.arange(0, 1 << 20, dtype=torch.int64) << 11
    steps = torch.arange(1 << 12, dtype=torch.int64) << 19  # ends of all spacings of 2 to 4 bits of mantissa, ties among them
    bits = torch.cat([coarse, steps + 1, (steps - 1).clamp_min(0)])
    x = bits.to(torch.int32).view(torch.float32)
    x = x[x <= e.most]
    for sign in (1.0, -1.0):
        same(one_to_one(sign * x, element).int(), (sign * x).to(TORCH[element]).view(torch.uint8).int(), element)


@pytest.mark.parametrize("spec, most", [("fp8", 448.0), ("fp8:format=e5m2", 57344.0)])
def test_a_block_of_the_format_is_left_as_it_is(spec, most):
    """A scale that is a power of two: every finite value of the format arrives exactly, and nothing is left over."""
    element = commopt.parse(spec).format
    x = EVERY.view(TORCH[element]).float()
    x = x[x.isfinite()] * 2.0**-20
    kept = torch.zeros(x.numel())
    assert torch.equal(coded(spec, x, kept), x)
    assert not kept.any()
    assert x.abs().max() == most * 2.0**-20


# --- blocks against the specifications, in fractions ---


def nearest_even(value: Fraction, element: str) -> Fraction:
    """Nearest representable, ties to the even mantissa, saturating: by search among the neighbours on the grid."""
    mantissa, least = {"e4m3": (3, -6), "e5m2": (2, -14), "e2m1": (1, 0)}[element]
    size, exponent = abs(value), least
    while size >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - mantissa)
    q, rest = divmod(size, step)
    q += rest > step / 2 or (rest == step / 2 and q % 2 == 1)
    rounded = min(q * step, Fraction(MOST[element]))
    return -rounded if value < 0 else rounded


def floor_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def mx_block(values: list[float], element: str) -> tuple[int, list[Fraction]]:
    """Section 6.3 of the MX specification: the shared scale's code and the values that the elements stand for, unscaled."""
    largest = max(Fraction(abs(v)) for v in values)
    exponent = floor_log2(largest) - {"e4m3": 8, "e5m2": 15, "e2m1": 2}[element] if largest else -127
    exponent = min(max(exponent, -127), 127)
    return exponent + 127, [nearest_even(Fraction(v) / Fraction(2) ** exponent, element) for v in values]


CODE = {"e2m1": lambda c: torch.tensor(E2M1 + [-v for v in E2M1])[c.long()]} | {e: lambda c, t=t: c.view(t).float() for e, t in TORCH.items()}


@pytest.mark.parametrize("spec, element", [("mxfp8", "e4m3"), ("mxfp8:format=e5m2", "e5m2"), ("mxfp4", "e2m1")])
@pytest.mark.parametrize("kind", ["normal", "heavy", "mixed", "tiny", "denormal", "zero", "few", "huge", "ties"])
def test_mx_is_the_specification(spec, element, kind):
    n = 32 * 12 + 5
    x = values_of(kind, n) if kind != "ties" else torch.arange(n).float() / 16  # all ties of e2m1, and of e4m3 above 256 / 16
    if kind == "huge":
        x = x.clamp(-3.4e38, 3.4e38)
    fields = encoded(spec, x)
    codes = nibbles(fields["codes"], n) if element == "e2m1" else fields["codes"]
    values = CODE[element](codes)
    sent = coded(spec, x)
    for block in range(-(-n // 32)):
        part = slice(32 * block, min(32 * block + 32, n))
        code, elements = mx_block(x[part].tolist(), element)
        assert int(fields["scales"][block]) == code, (block, x[part])
        assert [Fraction(v) for v in values[part].tolist()] == elements
        exact = [float(v * Fraction(2) ** (code - 127)) for v in elements]  # float64, to float32 in one rounding
        same(sent[part].abs(), torch.tensor(exact, dtype=torch.float64).float().abs())
    assert torch.equal(torch.signbit(values), torch.signbit(x))  # that of zero too


def float32(value: Fraction) -> Fraction:
    """The nearest float32: what one IEEE operation rounds its exact result to (float64 would round twice)."""
    if value == 0:
        return value
    step = Fraction(2) ** (max(floor_log2(abs(value)), -126) - 23)
    q, rest = divmod(value, step)
    return (q + (rest > step / 2 or (rest == step / 2 and q % 2 == 1))) * step


@pytest.mark.parametrize("kind", ["normal", "heavy", "tiny", "zero", "equal", "few", "uneven"])
def test_nvfp4_is_the_two_level_format(kind):
    n = 16 * 24 + 3
    x = values_of("heavy" if kind == "uneven" else kind, n)
    if kind == "uneven":
        x = x * 10.0 ** -(torch.arange(n) // 16 % 8).float()  # down to block scales that are denormal or zero
    fields, sent = encoded("nvfp4", x), coded("nvfp4", x)
    largest = max(Fraction(abs(v)) for v in x.tolist())
    whole = float32(largest / 2688)
    assert Fraction(float(fields["whole"])) == whole
    values = CODE["e2m1"](nibbles(fields["codes"], n))
    scales = fields["scales"].view(torch.float8_e4m3fn).float()
    for block in range(-(-n // 16)):
        part = slice(16 * block, min(16 * block + 16, n))
        given = [Fraction(v) for v in x[part].tolist()]
        wanted = nearest_even(float32(float32(max(map(abs, given)) / 6) / whole), "e4m3") if whole else Fraction(0)
        assert Fraction(float(scales[block])) == wanted
        scale = float32(wanted * whole)
        inverse = float32(1 / scale) if scale else Fraction(0)
        elements = [nearest_even(float32(v * inverse), "e2m1") for v in given]
        assert [Fraction(v) for v in values[part].tolist()] == elements
        assert [Fraction(v) for v in sent[part].tolist()] == [float32(v * scale) for v in elements]
    assert int((scales == 0).sum()) > 0 or kind != "uneven"


def test_natural_is_one_of_the_two_powers_around():
    x = torch.cat([values_of("heavy", 2000), values_of("few", 500), torch.tensor([0.0, -0.0, 1.5, 3.0, 1.0, 2.0**-60])])
    low = torch.where(x == 0, x, torch.sign(x) * 2.0 ** torch.floor(torch.log2(x.abs().double())).float())
    near = torch.where((x - low).abs() * 2 < low.abs(), low, 2 * low)  # ties to the larger
    same(coded("natural:rounding=nearest", x), near)
    sent = coded("natural", x, draw=(1, 2, 3))
    assert ((sent == low) | (sent == 2 * low)).all() and (sent == low).sum() > 500 and (sent != low).sum() > 500
    exact = (x == low).nonzero().flatten()
    same(sent[exact], x[exact])


def test_natural_keeps_126_octaves_below_the_largest():
    """And what is smaller becomes the smallest with the right probability, or zero."""
    x = torch.zeros(256)
    x[0], x[1], x[2:] = 1.0, 2.0**-125, 2.0**-126  # the scale is 2
    sent = coded("natural", x, draw=(5, 1, 1))
    assert sent[0] == 1 and sent[1] == 2.0**-125
    assert sorted(set(sent[2:].tolist())) == [0.0, 2.0**-125] and 80 < int((sent[2:] > 0).sum()) < 175
    x = torch.tensor([3.4e38, -(2.0**127), 2.0**126, 2.0])
    same(coded("natural", x), torch.tensor([2.0**127, -(2.0**127), 2.0**126, 2.0]))


# --- what the docstrings promise ---

ALL = ["fp8", "fp8:format=e5m2", "fp8:rounding=stochastic", "fp8:format=e5m2,block=64,rounding=stochastic", "mxfp8", "mxfp8:format=e5m2",
       "mxfp4", "nvfp4", "natural", "natural:rounding=nearest"]
BOUND = {  # the largest error: relative to the value, relative to the largest of its block, the block
    "fp8": (2.0**-4, 2.0**-10 / 448, 256), "fp8:format=e5m2": (2.0**-3, 2.0**-17 / 57344, 256),
    "fp8:rounding=stochastic": (2.0**-3, 2.0**-9 / 448, 256),
    "fp8:format=e5m2,block=64,rounding=stochastic": (2.0**-2, 2.0**-16 / 57344, 64),
    "mxfp8": (2.0**-3, 2.0**-18, 32), "mxfp8:format=e5m2": (2.0**-3, 2.0**-32, 32), "mxfp4": (2.0**-2, 2.0**-4, 32),
    "nvfp4": (2.0**-2, 1 / 22, 16), "natural": (1.0, 2.0**-126, 256), "natural:rounding=nearest": (1 / 3, 2.0**-127, 256),
}


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-30, 1e30], ids=str)
@pytest.mark.parametrize("spec", BOUND)
def test_the_error_is_within_its_bound_at_every_scale(spec, scale):
    of_value, of_block, block = BOUND[spec]
    for dtype in (torch.float32, torch.bfloat16) if scale > 1e-20 else (torch.float32,):
        for x in (normal(5003, 3, scale).to(dtype), (values_of("heavy", 5003, 3) * scale).to(dtype)):
            wide = x.double()
            bound = torch.maximum(of_value * wide.abs(), of_block * block_max(wide, block)) * (1 + 1e-4)
            error = (coded(spec, x).double() - wide).abs()
            close(coded(spec, x), wide, bound, f"{spec} {dtype} at {scale}")
            assert float((error / bound.clamp_min(1e-300)).max()) > 0.7, "the bound is nowhere near"


@pytest.mark.parametrize("spec", ALL)
def test_sent_plus_kept_is_what_there_was(spec):
    for n in (1, 15, 16, 17, 31, 33, 255, 257, 5003):
        x, kept = normal(n), normal(n, 1, 0.1)
        had = x + kept
        sent = coded(spec, x, kept)
        close(sent.double() + kept.double(), had.double(), 2.0**-24 * torch.maximum(had.abs(), kept.abs()), f"{spec} {n}")
        zero = torch.zeros(n)
        assert not coded(spec, torch.zeros(n), zero).any() and not zero.any()


@pytest.mark.parametrize("spec", ALL)
def test_powers_of_two_and_loss_scales_pass_through(spec):
    x, kept, scaled = normal(5003, 3), normal(5003, 1, 0.1), normal(5003, 1, 0.1)
    for power in (-90, -26, 60):
        same(coded(spec, x * 2.0**power), coded(spec, x) * 2.0**power, spec)
    same(coded(spec, x * 4096, scaled, loss_scale=4096.0), coded(spec, x, kept) * 4096, spec)
    same(scaled, kept, spec)


@pytest.mark.parametrize("spec", ALL)
def test_error_feedback_gets_everything_across(spec):
    x, kept, kernels = normal(5003), torch.zeros(5003), kernels_here()
    total, most, largest = torch.zeros(5003, dtype=torch.float64), 0.0, x.abs()
    for step in range(1, 101):
        total += coded(spec, x, kept, draw=(0, step, 0), kernels=kernels)
        largest = torch.maximum(largest, kept.abs() + x.abs())
        most = max(most, float(kept.norm()))
    close(total + kept.double(), 100 * x.double(), 2.0**-23 * 100 * largest.double() + 1e-6, spec)
    assert most <= float(x.norm())


UNBIASED = {"fp8:rounding=stochastic": "e4m3", "fp8:format=e5m2,rounding=stochastic": "e5m2", "natural": "power"}


@pytest.mark.parametrize("spec", UNBIASED)
def test_stochastic_rounding_is_unbiased(spec):
    """The mean of 4,000 draws, in standard deviations that are known from the fraction, is standard normal: over the values
    the sum of squares lies within 5 standard deviations of chi-square's, and so do the mean and the largest."""
    e, n, draws = reference.floats.ELEMENTS[UNBIASED[spec]], 1024, 4000
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, generator=g) * 10.0 ** ((math.log10(2.0 ** max(e.least, -20) / e.most) - 1) * torch.rand(n, generator=g)) * e.most  # denormals too
    x[::256] = e.most  # so that the scale is 1, or 2 for natural; never rounded itself
    total, kernels = torch.zeros(n, dtype=torch.float64), kernels_here()
    for step in range(draws):
        total += coded(spec, x, draw=(17, step, 5), kernels=kernels).double()
    wide = x.double()
    step = 2.0 ** (torch.floor(torch.log2(wide)).clamp_min(e.least) - e.mantissa)
    fraction = wide / step - (wide / step).floor()
    free = (fraction > 0.01) & (fraction < 0.99)
    z = ((total / draws - wide) / step)[free] / (fraction * (1 - fraction) / draws).sqrt()[free]
    count = z.numel()
    assert count > 900 and (UNBIASED[spec] == "power" or int((wide[free] < 2.0**e.least).sum()) > 20)
    assert abs(float(z.square().sum()) - count) < 5 * math.sqrt(2 * count), f"chi-square {float(z.square().sum())} of {count}"
    assert float(z.abs().max()) < 5.5 and abs(float(z.mean())) < 5 / math.sqrt(count)
    same(coded(spec, x)[::256], x[::256])


def test_bytes_per_value():
    n = 2**20
    per = {spec: commopt.wire_bytes(spec, n) / n for spec in ("fp8", "fp8:block=64", "mxfp8", "mxfp4", "natural")}
    assert per == {"fp8": 1 + 4 / 256, "fp8:block=64": 1 + 4 / 64, "mxfp8": 1 + 1 / 32, "mxfp4": 1 / 2 + 1 / 32, "natural": 1 + 1 / 256}
    assert commopt.wire_bytes("nvfp4", n) == n / 2 + n / 16 + 16  # a field takes a multiple of 16 bytes


# --- what is not finite ---


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_sent_on_seen_and_not_kept(spec, bad):
    n, at = 5003, 4000
    x, kept = normal(n), normal(n, 1, 0.1)
    x[at] = bad
    before = kept.clone()
    sent = coded(spec, x, kept)
    assert not torch.isfinite(sent[at]) and torch.isfinite(kept).all()
    same(kept[at], before[at])
    message = Message([Part(0, n, commopt.parse(spec))], torch.empty(0, dtype=torch.int64), torch.device("cpu"), "w", "w")
    rows = torch.zeros(3, message.nbytes, dtype=torch.uint8)
    for row in range(3):
        message.encode(normal(n, row), None, message.fields(rows[row]), (0, 0), None)
    finite = lambda some: all(message.finite(message.fields(some)))
    assert finite(rows)
    message.encode(x, None, message.fields(rows[1]), (0, 1), None)
    assert not finite(rows) and finite(rows[:1]) and finite(rows[2:])


def test_the_largest_finite_values_are_finite():
    x = torch.full((512,), 3.4028234663852886e38)
    for spec in ALL:
        sent = coded(spec, x)
        assert sent.isfinite().all() and (sent > 1.6e38).all(), spec


# --- one worked message each ---


def test_golden_bytes():
    x = torch.tensor([1.0, -0.25, 0.3, 6.0, -3.1, 0.0, 100.0, -0.0])
    # 100 is in [64, 128): X = 2^(6 - 8), so the codes are those of 4, -1, 1.25 (from 1.2), 24, -12 (from -12.4), 0, 384 (400, a tie), -0
    fields = encoded("mxfp8", x)
    assert fields["scales"].tolist() == [125]
    same(fields["codes"].view(torch.float8_e4m3fn).float(), torch.tensor([4.0, -1.0, 1.25, 24.0, -12.0, 0.0, 384.0, -0.0]))
    assert fields["codes"].tolist() == [0x48, 0xB8, 0x3A, 0x5C, 0xD4, 0x00, 0x7C, 0x80]
    # X = 2^(6 - 2): 0.0625, -0.015625, 0.01875, 0.375, -0.19375, 0, 6.25, -0, even elements low
    fields = encoded("mxfp4", x)
    assert fields["scales"].tolist() == [131] and fields["codes"].tolist() == [0x80, 0x10, 0x08, 0x87]
    # 2^-1 of 2^7 is 100's lower power, 64; nearest is 128 = 2^0 of 2^7
    fields = encoded("natural:rounding=nearest", x)
    assert fields["scales"].tolist() == [127 + 7]
    assert fields["codes"].tolist() == [127 - 7, 128 + 127 - 9, 127 - 9, 127 - 4, 128 + 127 - 5, 0, 127, 128]


def test_specs_and_defaults():
    for spec in ALL:
        assert str(commopt.parse(spec)) == spec
    assert {name: (commopt.parse(name).ef, commopt.parse(name).biased) for name in ("fp8", "mxfp8", "mxfp4", "nvfp4", "natural")} == {
        "fp8": (False, True), "mxfp8": (False, True), "mxfp4": (True, True), "nvfp4": (True, True), "natural": (False, False)}
    assert not commopt.parse("fp8:rounding=stochastic").biased and commopt.parse("natural:rounding=nearest").biased
    with pytest.raises(ValueError, match="multiple of 8"):
        commopt.parse("fp8:block=12")
