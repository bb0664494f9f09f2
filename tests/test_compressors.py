"""What the formulas in the compressors' docstrings promise, in one process, on whatever backend is in use."""

import math

import pytest
import torch

import commopt
from commopt import backends
from commopt.compressors import STEADY, all_finite
from commopt.wire import Layout
from ranks import close, same

LOSSY = ["fp16", "bf16", "int8", "int8:rounding=stochastic", "int8:block=64", "int4", "int4:rounding=stochastic",
         "topk:ratio=0.01", "topk:ratio=0.1,values=bf16", "topk:ratio=0.1,values=int8"]
SIZES = [1, 2, 7, 255, 256, 257, 1000, 5003, 70_001]


def coded(spec, x, residual=None, draw=(0, 0, 0), loss_scale=None, kernels=None):
    """The decoded value of x + residual, float32; residual is changed as encode does."""
    compressor = commopt.parse(spec)
    kernels = kernels or backends.select("cpu")
    kernels.draw = draw
    if loss_scale is not None:
        kernels.loss_scale = torch.tensor([loss_scale])
    layout = Layout(compressor.fields(x.numel()))
    row = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
    compressor.encode(kernels, x, residual, *layout.views(row[0]))
    out = torch.empty(x.numel())
    compressor.decode_sum(kernels, out, 1.0, *layout.views(row))
    return out


def normal(n, seed=0, scale=1.0):
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def integers(n, seed=0, up_to=2**12):
    """Whole numbers: sums, and differences of nearby multiples of a power of two, are exact."""
    return torch.randint(-up_to, up_to + 1, (n,), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("spec", LOSSY)
@pytest.mark.parametrize("n", SIZES)
def test_sent_plus_kept_is_what_there_was(spec, n):
    """In float64 the identity holds to the rounding of one float32 subtraction, and to the last bit where that is exact."""
    x, kept = normal(n), normal(n, 1, 0.1)
    had = x + kept  # the float32 sum, which is what gets encoded
    sent = coded(spec, x, kept)
    close(sent.double() + kept.double(), had.double(), 2.0**-24 * torch.maximum(had.abs(), kept.abs()), spec)
    if spec.startswith("topk") and "int8" not in spec or spec in ("bf16", "fp16"):
        same((sent.double() + kept.double()).float(), had, spec)  # Sterbenz: the difference is a float32
        assert torch.equal(sent.double() + kept.double(), had.double())


@pytest.mark.parametrize("spec", [s for s in LOSSY if "int" in s and "values" not in s])
def test_sent_plus_kept_is_exact_where_the_scale_is(spec):
    """Blocks whose largest magnitude is the number of levels times a power of two: the scale is one, all is exact."""
    levels = 127 if "int8" in spec else 7
    x = integers(4096, up_to=16 * levels)
    x[::64] = 16 * levels
    kept = integers(4096, 1, 3) / 4
    kept[::64] = 0
    had = (x + kept).clamp(-16 * levels, 16 * levels)
    x = had - kept
    sent = coded(spec, x, kept)
    same(sent + kept, had, spec)
    assert torch.equal(sent, (sent / 16).round() * 16) and not torch.equal(sent, had)


BOUND = {  # the largest error: relative to the value, relative to the largest of its block, the block
    "bf16": (2.0**-8, 0, 1), "fp16": (2.0**-11, 2.0**-39, 1024), "int8": (0, 0.5 / 127, 256), "int8:block=64": (0, 0.5 / 127, 64),
    "int8:rounding=stochastic": (0, 1 / 127, 256), "int4": (0, 0.5 / 7, 128), "int4:rounding=stochastic": (0, 1 / 7, 128),
}


def block_max(x, block):
    padded = torch.zeros(-(-x.numel() // block) * block, dtype=x.dtype)
    padded[: x.numel()] = x.abs()
    return padded.view(-1, block).amax(1).repeat_interleave(block)[: x.numel()]


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-30, 1e30], ids=str)
@pytest.mark.parametrize("spec", BOUND)
def test_the_error_is_within_its_bound_at_every_scale(spec, scale):
    """Absolute epsilons would crush small gradients to zero."""
    of_value, of_block, block = BOUND[spec]
    for dtype in (torch.float32, torch.bfloat16) if scale > 1e-20 else (torch.float32,):
        x = normal(5003, 3, scale).to(dtype)
        wide = x.double()
        bound = torch.maximum(of_value * wide.abs(), of_block * block_max(wide, block)) * (1 + 1e-4)  # x times 1/s is rounded
        close(coded(spec, x), wide, bound, f"{spec} {dtype} at {scale}")


@pytest.mark.parametrize("spec", LOSSY)
@pytest.mark.parametrize("power", [-100, -26, 60])
def test_the_relative_error_does_not_depend_on_the_scale(spec, power):
    """A power of two passes through to the last bit (as long as nothing is denormal)."""
    x = normal(5003, 3)
    same(coded(spec, x * 2.0**power), coded(spec, x) * 2.0**power, spec)


@pytest.mark.parametrize("spec", LOSSY)
def test_error_norms_at_tiny_scales_are_as_at_one(spec):
    """1e-8 and 1e-30 are no powers of two, so the bits differ; the relative error does not."""
    def error(scale):
        x = normal(20_000, 3, scale)
        return float((coded(spec, x).double() - x.double()).norm() / x.double().norm())

    assert error(1e-8) == pytest.approx(error(1.0), rel=0.02)
    assert error(1e-30) == pytest.approx(error(1.0), rel=0.02)


@pytest.mark.parametrize("spec", LOSSY)
@pytest.mark.parametrize("loss_scale", [65536.0, 2.0**-10])
def test_the_residual_is_in_unscaled_units(spec, loss_scale):
    x, kept, scaled_kept = normal(5003), normal(5003, 1, 0.1), normal(5003, 1, 0.1)
    want = coded(spec, x, kept)
    got = coded(spec, x * loss_scale, scaled_kept, loss_scale=loss_scale)
    same(got, want * loss_scale, "sent")
    same(scaled_kept, kept, "kept")


@pytest.mark.parametrize("spec", [s for s in LOSSY if s.startswith("topk")])
@pytest.mark.parametrize("kind", ["normal", "equal", "one", "few"])
def test_topk_is_a_contraction_and_takes_the_largest(spec, kind):
    n = 5003
    x = {"normal": normal(n), "equal": torch.full((n,), -0.75), "one": torch.zeros(n), "few": integers(n, 0, 2)}[kind]
    if kind == "one":
        x[4321] = 3.0
    sent, k = coded(spec, x), commopt.parse(spec).k(n)
    slack = {"float32": 0.0, "bf16": 2.0**-9, "int8": 0.5 / 127}[commopt.parse(spec).values]
    lost = (x - sent).double().square().sum()
    assert lost <= ((1 - k / n) + 3 * slack) * x.double().square().sum() + 1e-12
    order = sorted(range(n), key=lambda i: (-abs(float(x[i])), i))[:k]  # ties to the lowest index
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order] = True
    assert not sent[~chosen].any()
    close(sent[chosen], x[chosen], slack * float(x.abs().max()) + 1e-12)


@pytest.mark.parametrize("spec, levels", [("int8:rounding=stochastic", 127), ("int4:rounding=stochastic", 7)])
def test_stochastic_rounding_is_unbiased(spec, levels):
    """The mean of 4,000 draws. Its error, in standard deviations that are known from the fraction, is standard normal: over
    2,048 values the sum of squares lies within 5 standard deviations of chi-square's, and none beyond 5.5."""
    n, draws = 2048, 4000
    x = torch.rand(n, generator=torch.Generator().manual_seed(1)) * levels * 0.999
    x[::128] = levels  # so that the scale is 1; never rounded itself
    total, kernels = torch.zeros(n, dtype=torch.float64), backends.select("cpu")
    for step in range(draws):
        total += coded(spec, x, draw=(17, step, 5), kernels=kernels).double()
    fraction = (x.double() - x.double().floor())
    free = (fraction > 0.01) & (fraction < 0.99)
    # u has 16 bits, so that the probability of rounding up is the fraction to within 2^-16
    z = (total / draws - x.double())[free] / (fraction * (1 - fraction) / draws).sqrt()[free]
    count = z.numel()
    assert count > 1800
    assert abs(float(z.square().sum()) - count) < 5 * math.sqrt(2 * count), f"chi-square {float(z.square().sum())} of {count}"
    assert float(z.abs().max()) < 5.5 and abs(float(z.mean())) < 5 / math.sqrt(count)
    same(coded(spec, x)[::128], x[::128])


def test_draws_differ_by_seed_step_and_stream_and_repeat():
    x, spec = normal(1000), "int4:rounding=stochastic"
    draws = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63 - 1, 2**31, 2**32 - 1)]
    sent = [coded(spec, x, draw=d) for d in draws]
    for i, a in enumerate(sent):
        same(coded(spec, x, draw=draws[i]), a)
        assert all(not torch.equal(a, b) for b in sent[:i])


@pytest.mark.parametrize("spec", LOSSY)
@pytest.mark.parametrize("n", SIZES)
def test_zero_gradients_are_zero(spec, n):
    kept = torch.zeros(n)
    sent = coded(spec, torch.zeros(n), kept)
    assert not sent.any() and not kept.any()


@pytest.mark.parametrize("spec", LOSSY)
def test_error_feedback_gets_everything_across(spec):
    """The mean of T decoded values of the same gradient misses it by residual / T, and the residual stays bounded."""
    x, kept, kernels = normal(5003), torch.zeros(5003), backends.select("cpu")
    total, sizes, largest = torch.zeros(5003, dtype=torch.float64), [], x.abs()
    for step in range(1, 301):
        total += coded(spec, x, kept, draw=(0, step, 0), kernels=kernels)
        close(total + kept.double(), step * x.double(), 2.0**-23 * step * largest.double() + 1e-6, f"step {step}")
        largest = torch.maximum(largest, kept.abs() + x.abs())
        sizes.append(float(kept.norm()))
    limit = 1.5 / commopt.parse(spec).ratio if "topk" in spec else 1.0
    assert max(sizes) <= limit * float(x.norm())


def test_the_warm_up_of_topk():
    """From 25 % to the ratio in four equal stages, then the ratio; counted in steps."""
    topk = commopt.parse("topk:ratio=0.001,warmup=8")
    ratios = [topk.at(step).ratio for step in range(12)]
    want = [0.25 * (0.001 / 0.25) ** (stage / 4) for stage in (0, 0, 1, 1, 2, 2, 3, 3)] + [0.001] * 4
    assert ratios == pytest.approx(want) and all(topk.at(s).warmup == 0 for s in range(12))
    assert commopt.parse("topk:ratio=0.5,warmup=8").at(0).ratio == 0.5
    assert commopt.parse("topk:ratio=0.001,warmup=0").at(0).ratio == 0.001
    assert commopt.parse("topk").at(0).ratio == 0.25 and commopt.parse("topk").at(STEADY) == commopt.parse("topk:ratio=0.01,warmup=0")
    assert [commopt.parse("topk:warmup=3").at(s).ratio for s in range(4)] == sorted((commopt.parse("topk:warmup=3").at(s).ratio for s in range(4)), reverse=True)


def test_k_is_at_least_one_and_at_most_all():
    assert [commopt.parse("topk:ratio=0.01").k(n) for n in (0, 1, 49, 50, 100, 149, 151, 10**9)] == [0, 1, 1, 1, 1, 1, 2, 10**7]
    assert commopt.parse("topk:ratio=1.0").k(7) == 7


@pytest.mark.parametrize("spec", LOSSY)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_sent_on_and_not_kept(spec, bad):
    x, kept = normal(5003), normal(5003, 1, 0.1)
    x[4000] = bad
    before = kept.clone()
    sent = coded(spec, x, kept)
    assert not torch.isfinite(sent[4000]) and torch.isfinite(kept).all()
    same(kept[4000], before[4000])
    compressor = commopt.parse(spec)
    layout = Layout(compressor.fields(5003))
    row, kernels = torch.zeros(layout.nbytes, dtype=torch.uint8), backends.select("cpu")
    for value, finite in ((x, False), (normal(5003), True)):
        compressor.encode(kernels, value, None, *layout.views(row))
        witness = dict(zip([f[0] for f in layout.fields], layout.views(row)))[compressor.witness]
        assert bool(torch.isfinite(witness).all()) == finite, "the witness field must show it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_value_that_is_not_finite_is_seen(dtype):
    """Wherever it is, in either sign, beside the largest values, of which greatest - least is no number of the dtype."""
    inf, nan, largest = float("inf"), float("nan"), torch.finfo(dtype).max
    for values in ([0.0], [largest, -largest], [-largest], [largest]):
        for n in (len(values), 1000, 70_001):
            x = torch.zeros(n, dtype=dtype)
            x[-len(values) :] = torch.tensor(values, dtype=dtype)
            assert bool(all_finite(x)), (values, n)
            for bad in ([inf], [-inf], [nan], [inf, -inf], [-inf, nan], [inf, inf]):
                for at in (0, n // 2, n - 1):
                    spoilt = x.repeat(2)
                    spoilt[at : at + len(bad)] = torch.tensor(bad, dtype=dtype)
                    assert not bool(all_finite(spoilt)), (values, n, bad, at)
    assert not bool(all_finite(torch.full((9,), -inf, dtype=dtype))) and not bool(all_finite(torch.full((9,), inf, dtype=dtype)))


@pytest.mark.parametrize("spec", ["none", *LOSSY])
def test_rows_are_added_in_rank_order_in_float32(spec):
    """Big, -big, small: only this order gives small."""
    compressor, n = commopt.parse(spec), 256
    layout = Layout(compressor.fields(n))
    rows, kernels = torch.zeros(3, layout.nbytes, dtype=torch.uint8), backends.select("cpu")
    parts = []
    for r, value in enumerate((2.0**30, -(2.0**30), 1.0)):
        x = torch.full((n,), value)
        compressor.encode(kernels, x, None, *layout.views(rows[r]))
        parts.append(coded(spec, x))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.empty(n, dtype=dtype)
        compressor.decode_sum(kernels, out, 0.5, *layout.views(rows))
        same(out, (((parts[0] + parts[1]) + parts[2]) * 0.5).to(dtype), spec)
    assert out[out != 0].numel() and (out[out != 0] > 0.49).all()


@pytest.mark.parametrize("loss_scale, scope", [(1.0, "global"), (1024.0, "global"), (1024.0, "block")])
def test_momentum_of_topk_is_that_of_deep_gradient_compression(loss_scale, scope):
    """Against the paper's algorithm 3 in float64: u <- m u + g, v <- v + u, what is sent leaves both. Whole numbers, so
    that all is exact; m = 1/2."""
    n, k = 2000, 20
    topk, kernels = commopt.parse(f"topk:ratio={k / n},momentum=0.5,scope={scope}"), backends.select("cpu")
    kernels.loss_scale = torch.tensor([loss_scale])
    layout = Layout(topk.fields(n))
    kept, u, v = torch.zeros(2, n), torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in range(8):
        g = integers(n, step, 2**9) * 2**8
        u = 0.5 * u + g.double()
        v = v + u
        row = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
        topk.encode(kernels, g * loss_scale, kept, *layout.views(row[0]))
        out = torch.empty(n)
        topk.decode_sum(kernels, out, 1.0 / loss_scale, *layout.views(row))
        top = v.abs().sort(descending=True, stable=True).indices[:k] if scope == "global" else out.nonzero()[:, 0]
        assert len(top) == topk.k(n)
        want = torch.zeros(n, dtype=torch.float64)
        want[top] = v[top]
        u[top] = v[top] = 0
        assert torch.equal(out.double(), want) and torch.equal(kept[0].double(), v) and torch.equal(kept[1].double(), u), step
    before = kept.clone()
    g[7], g[11] = math.inf, math.nan
    topk.encode(kernels, g * loss_scale, kept, *layout.views(row[0]))
    topk.decode_sum(kernels, out, 1.0, *layout.views(row))
    assert out[7] == math.inf and out[11].isnan() and kept.isfinite().all()
    assert torch.equal(kept[:, [7, 11]], before[:, [7, 11]])
