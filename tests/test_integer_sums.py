"""Sums of integers: encoded again in one pass, and added up as integers where all ranks share a scale."""

import pytest
import torch

import commopt
from commopt import backends
from commopt.compressors import Compressor
from commopt.wire import Layout
from op_cases import values_of
from ranks import close, same


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("spec", ["int8", "int4", "int2", "int8:block=1000,rounding=stochastic", "int4:block=65536,rounding=stochastic",
                                  "int2:rounding=stochastic", "int4:rotate=hadamard"])
def test_encoding_a_sum_again_has_the_bits_of_its_two_steps(spec, backend, kept, monkeypatch):
    monkeypatch.setenv("COMMOPT_BACKEND", backend)
    n, rows, compressor, kernels = 70_003, 3, commopt.parse(spec), backends.select("cpu")
    kernels.loss_scale, kernels.draw = torch.tensor([3.0]), (5, 6, 7)
    layout, results = Layout(compressor.fields(n)), []
    messages, resent = torch.zeros(rows, layout.nbytes, dtype=torch.uint8), torch.zeros(2, layout.nbytes, dtype=torch.uint8)
    for row in range(rows):
        compressor.encode(kernels, values_of("heavy" if row else "inf", n, row), None, *layout.views(messages[row]))
    for row, resum in zip(resent, (compressor.resum, lambda *args: Compressor.resum(compressor, *args))):
        total, residual = torch.full((n,), 7.0), values_of("heavy", n, 9) * 0.1 if kept else None
        resum(kernels, total, residual, layout.views(messages), layout.views(row))
        results.append((total, residual))
    same(*resent, spec)
    assert resent[0].any() and bool((results[0][0] == 7).all()) == ("rotate" not in spec)
    if kept:
        same(results[0][1], results[1][1], spec)


SPECS = ["int8", "int4", "int2", "int8:rounding=stochastic,block=64", "int4:rounding=stochastic,block=1000", "int2:rounding=stochastic"]


def summed(spec: str, xs: list, residuals: list, behind: int = 0, loss_scale: float = 1.0) -> torch.Tensor:
    """The decoded sum of what ranks with these gradients have encoded; residuals change as encode changes them."""
    compressor, n, world = commopt.parse(f"{spec}{',' if ':' in spec else ':'}collective=integer_sum"), xs[0].numel(), len(xs)
    every = [backends.select("cpu") for _ in xs]
    for rank, kernels in enumerate(every):
        kernels.draw, kernels.loss_scale = (3, 4, rank), torch.tensor([loss_scale])
    absmax = torch.full((world, -(-n // compressor.block)), -1, dtype=torch.int32)
    used = -(-n * compressor.shared_width(world) // 8)
    codes = torch.full((world, -(-used // 4) * 4 + behind), 0xA5, dtype=torch.uint8)
    for kernels, x, residual, measured in zip(every, xs, residuals, absmax):
        before = None if residual is None else residual.clone()
        compressor.measure(kernels, x, residual, measured)
        assert residual is None or torch.equal(residual, before)
    largest = absmax.amax(0)
    for kernels, x, residual, row in zip(every, xs, residuals, codes):
        compressor.encode_shared(kernels, x, residual, largest, row, world)
    assert not codes[:, used:].any()
    if n % 2 and compressor.shared_width(world) == 4:
        assert not (codes[:, used - 1] >> 4).any()
    total, out = codes.view(torch.int32).sum(0, dtype=torch.int32).view(torch.uint8), torch.empty(n)
    for kernels in every:
        again = torch.empty(n)
        compressor.decode_shared(kernels, again, 1.0, largest, total, world)
        out = again
    return out


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 7, 1001, 5003])
@pytest.mark.parametrize("spec", SPECS)
def test_the_sum_plus_what_is_kept_is_what_there_was(spec, n, world):
    xs = [values_of("heavy", n, rank) for rank in range(world)]
    residuals = [values_of("normal", n, rank + 50) * 0.1 for rank in range(world)]
    had = sum(x.double() + r.double() for x, r in zip(xs, residuals))
    out = summed(spec, xs, residuals, behind=8 * (n % 3))
    largest = max(float(t.abs().max()) for t in (*xs, *residuals))
    close(out.double() + sum(r.double() for r in residuals), had, 4 * world * 2.0**-24 * largest * world, spec)


@pytest.mark.parametrize("world", [1, 4, 36])
@pytest.mark.parametrize("spec", SPECS)
def test_it_is_exact_where_the_scale_is(spec, world):
    """Whole numbers in blocks whose largest is the number of steps: the scale is 1, and nothing is lost at all."""
    compressor, n = commopt.parse(spec), 4096
    steps = 2 if compressor.levels == 1 and compressor.rounding == "nearest" else compressor.levels
    xs = [torch.randint(-compressor.levels, compressor.levels + 1, (n,), generator=torch.Generator().manual_seed(r)).float() for r in range(world)]
    xs[-1][:: compressor.block] = steps  # one rank's is the scale of all
    residuals = [torch.zeros(n) for _ in xs]
    out = summed(spec, xs, residuals)
    same(out + sum(residuals), sum(xs), spec)
    sent = [x.clamp(-compressor.levels, compressor.levels) for x in xs]
    same(out, sum(sent), spec)
    for residual, x, s in zip(residuals, xs, sent):
        same(residual, x - s)


@pytest.mark.parametrize("spec, world", [("int8", 1), ("int8", 2), ("int8", 258), ("int4", 1), ("int4", 18), ("int4", 19), ("int2:rounding=stochastic", 7),
                                         ("int2:rounding=stochastic", 8), ("int2:rounding=stochastic", 127)])
def test_no_sum_carries_into_its_neighbour(spec, world):
    """As many ranks as a width holds, whose values are the largest there are, up next to down."""
    n, levels = 515, commopt.parse(spec).levels
    x = torch.full((n,), float(levels))
    x[1::2] = -levels
    same(summed(spec, [x] * world, [None] * world), x * world, spec)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", ["int8", "int4", "int2"])
def test_what_is_not_finite_on_one_rank_is_seen_by_all(spec, value):
    n, block = 1000, commopt.parse(spec).block
    xs, residuals = [values_of("normal", n, r) for r in range(3)], [values_of("normal", n, 9 + r) for r in range(3)]
    clean = summed(spec, xs, [r.clone() for r in residuals])
    before, xs[1][block + 5] = [r.clone() for r in residuals], value
    out = summed(spec, xs, residuals)
    hurt = torch.arange(n) // block == 1
    assert out[hurt].isnan().all()
    same(out[~hurt], clean[~hurt])
    for after, then in zip(residuals, before):
        same(after[hurt], then[hurt])
        assert not torch.equal(after[~hurt], then[~hurt])


def test_the_residual_is_in_unscaled_units():
    x, kept, scaled = values_of("normal", 1000), [torch.zeros(1000) + 0.25, None], [torch.zeros(1000) + 0.25, None]
    want = summed("int4", [x, -x], kept)
    same(summed("int4", [x * 1024, -x * 1024], scaled, loss_scale=1024.0), want * 1024)
    same(scaled[0], kept[0])


def test_the_width_is_the_least_that_holds_the_sum():
    widths = {spec: [commopt.parse(spec).shared_width(world) for world in (1, 2, 7, 8, 18, 19, 127, 128, 258)] for spec in ("int8", "int4", "int2")}
    assert widths == {"int8": [8] + [16] * 8, "int4": [4, 8, 8, 8, 8, 16, 16, 16, 16], "int2": [4, 4, 4, 8, 8, 8, 8, 16, 16]}
    for spec, most in (("int8", 258), ("int4", 4681), ("int2", 32767)):
        assert commopt.parse(spec).shared_width(most) == 16
        with pytest.raises(ValueError, match=f"{spec}: integers of 16 bits hold the sum of {most} ranks at most, not of {most + 1}; use collective=two_shot"):
            commopt.parse(spec).shared_width(most + 1)


def test_the_key_collective():
    assert [commopt.parse(spec).collective for spec in ("int8", "int4:collective=integer_sum")] == ["two_shot", "integer_sum"]
    with pytest.raises(ValueError, match="rotate=hadamard needs collective=two_shot"):
        commopt.parse("int4:rotate=hadamard,collective=integer_sum")
    with pytest.raises(ValueError, match=r"collective must be two_shot \| integer_sum, got 'sum'"):
        commopt.parse("int2:collective=sum")
