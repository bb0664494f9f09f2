"""What must hold of every registered compressor, on inputs that nobody picked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DTYPES, VALUES, values_of

import commopt
from commopt import backends
from commopt.compressors import overview
from commopt.wire import Layout

SPECS = [row["spec"] for row in overview() if row["collective"] != "rounds"]
FINITE = [kind for kind in VALUES if kind not in ("nan", "inf", "huge")]
sizes = st.integers(1, 3000)
cases = {"n": sizes, "kind": st.sampled_from(FINITE), "seed": st.integers(0, 10**6)}
quick = settings(max_examples=12, deadline=None, derandomize=True, database=None)


class Case:
    """One encoding with what went in and came out."""

    def __init__(self, spec: str, n: int, kind: str, seed: int, dtype=torch.float32, loss_scale: float = 1.0, draw=(5, 3, 1)):
        self.compressor, self.kernels = commopt.parse(spec), backends.select("cpu")
        self.kernels.draw, self.kernels.loss_scale = draw, torch.tensor([loss_scale])
        self.x = values_of(kind, n, seed).to(dtype)
        self.had = self.x.float()
        self.kept = None
        if self.compressor.ef:
            self.kept = torch.zeros(*[2] * (self.compressor.slots - 1), n)
            self.kept.copy_(values_of(kind, n, seed + 1) * 0.5)
            self.had = self.had + self.kept * loss_scale
        layout = Layout(self.compressor.fields(n))
        self.row = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
        self.fields = layout.views(self.row)
        self.compressor.encode(self.kernels, self.x, self.kept, *layout.views(self.row[0]))
        self.decoded = self.decode(torch.empty(n))

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        self.compressor.decode_sum(self.kernels, out, 1.0, *self.fields)
        return out


@pytest.mark.parametrize("spec", SPECS)
def test_sent_plus_kept_is_what_there_was(spec):
    @quick
    @given(**cases, dtype=st.sampled_from(DTYPES), loss_scale=st.sampled_from((1.0, 1024.0, 0.125)))
    def holds(n, kind, seed, dtype, loss_scale):
        case = Case(spec, n, kind, seed, dtype, loss_scale)
        if case.kept is None:
            return
        total = case.decoded.double() + case.kept.double() * loss_scale
        # One rounding of a float32 difference; a rotation rounds each value by a part of its block's largest.
        exact = torch.maximum(case.had.abs(), case.kept.abs() * loss_scale)
        bound = 2.0**-23 * exact + (2.0**-20 * case.had.abs().max() if "rotate" in spec else 0) + 2.0**-149 * max(1.0, loss_scale)
        assert (total - case.had.double()).abs().le(bound).all(), (n, kind)

    holds()


@pytest.mark.parametrize("spec", [s for s in SPECS if commopt.parse(s).biased and commopt.parse(s).ef])
def test_a_biased_method_is_a_contraction(spec):
    """|x - decoded| <= |x|, which error feedback needs (Karimireddy et al., ICML 2019)."""
    @quick
    @given(**cases)
    def holds(n, kind, seed):
        case = Case(spec, n, kind, seed)
        had, off = case.had.double(), case.had.double() - case.decoded.double()
        assert off.norm() <= had.norm() * (1 + 1e-6), (n, kind)

    holds()


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_input_gives_the_same_bytes(spec):
    @quick
    @given(**cases)
    def holds(n, kind, seed):
        one, two = Case(spec, n, kind, seed), Case(spec, n, kind, seed)
        assert torch.equal(one.row, two.row) and torch.equal(one.decoded, two.decoded)
        assert one.kept is None or torch.equal(one.kept, two.kept)

    holds()


@pytest.mark.parametrize("spec", SPECS)
def test_a_decoder_fed_any_bytes_writes_its_output_and_nothing_else(spec):
    @quick
    @given(n=sizes, seed=st.integers(0, 10**6), fill=st.sampled_from(("random", 0, 0xFF, 0x7F, 0x80)))
    def holds(n, seed, fill):
        case = Case(spec, n, "normal", seed)
        if fill == "random":
            case.row.random_(0, 256, generator=torch.Generator().manual_seed(seed))
        else:
            case.row.fill_(fill)
        around = torch.full((n + 128,), 12345.0)
        case.decode(around[64 : 64 + n])
        assert around[:64].eq(12345.0).all() and around[64 + n :].eq(12345.0).all()

    holds()


@pytest.mark.parametrize("spec", [s for s in SPECS if not commopt.parse(s).biased and s != "none"])
def test_an_unbiased_method_is_right_on_average(spec):
    """Of 100 sums of the values with random signs, over 400 draws: within five standard errors of what they should be."""
    compressor = commopt.parse(spec)
    if compressor.ef:
        spec += ("," if ":" in spec else ":") + "ef=false"
    signs = torch.randint(0, 2, (100, 700), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    sums = torch.stack([signs @ Case(spec, 700, "normal", 3, draw=(11, step, 2)).decoded.double() for step in range(400)])
    x = Case(spec, 700, "normal", 3).had.double()
    error = sums.std(0) / 20
    assert error.min() > 0 and ((sums.mean(0) - signs @ x) / error).abs().max() < 5
