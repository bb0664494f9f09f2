"""What the docstring of vote promises."""

import itertools

import pytest
import torch

import commopt
from commopt import backends
from commopt.wire import Layout
from op_cases import values_of
from ranks import close, same
from simulated import exchange, plans_for


def messages(xs: list) -> list:
    """The fields of the ranks' messages, [rows, count]."""
    vote, kernels = commopt.parse("vote"), backends.select("cpu")
    layout = Layout(vote.fields(xs[0].numel()))
    rows = torch.zeros(len(xs), layout.nbytes, dtype=torch.uint8)
    for x, row in zip(xs, rows):
        vote.encode(kernels, x, None, *layout.views(row))
    return layout.views(rows)


def decoded(xs: list, weight: float | None = None) -> torch.Tensor:
    out = torch.empty(xs[0].numel())
    commopt.parse("vote").decode_sum(backends.select("cpu"), out, weight or 1 / len(xs), *messages(xs))
    return out


def by_hand(signs: tuple, sizes: list[float]) -> float:
    ahead = sum(signs)
    return (1 if ahead > 0 or ahead == 0 and sum(s * size for s, size in zip(signs, sizes)) >= 0 else -1) * sum(sizes) / len(sizes)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6])
def test_every_way_to_vote(world):
    """A block for every rank, with a size of its own, and all combinations of signs."""
    ways = list(itertools.product((1, -1), repeat=world))
    n = len(ways)
    sizes = [1.0, 4.0, 2.0, 2.0, 1.0, 2.0][:world]
    xs = [torch.tensor([way[rank] for way in ways]) * sizes[rank] for rank in range(world)]
    assert n <= 1024
    close(decoded(xs), torch.tensor([by_hand(way, sizes) for way in ways]), 1e-6)


def test_a_majority_against_the_mean():
    close(decoded([torch.tensor([10.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]), torch.tensor([-4.0]), 1e-6)


def test_no_outlier_turns_the_direction():
    xs = [values_of("normal", 5003, rank) for rank in range(5)]
    wild = [*xs[:4], xs[4] * 10.0 ** torch.randint(0, 30, (5003,), generator=torch.Generator().manual_seed(1))]
    same(decoded(xs).sign(), decoded(wild).sign())


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 70])
def test_decoding_rows_is_decoding_their_vote(rows):
    """So that ranks which gather have what ranks in a two_shot have."""
    n, vote, kernels = 5003, commopt.parse("vote"), backends.select("cpu")
    xs = [values_of("heavy", n, rank) for rank in range(rows)]
    xs[-1][2000] = float("nan")
    layout = Layout(vote.fields(n))
    voted, out = torch.zeros(1, layout.nbytes, dtype=torch.uint8), torch.empty(n)
    vote.resum(kernels, out, None, messages(xs), layout.views(voted[0]))
    vote.decode_sum(kernels, out, 1 / rows, *layout.views(voted))
    same(decoded(xs), out)
    same(out.isnan(), torch.arange(n) // 1024 == 1)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_an_exchange_is_a_vote(world):
    """Of a bucket with parameters that travel exactly, over a gather of two ranks and a two_shot of more."""
    plans = plans_for([(96, 70), (9,), (64, 64)], "vote", world)
    assert not plans[0].wants_residual
    n, exact = plans[0].n, torch.zeros(plans[0].n, dtype=torch.bool)
    exact[96 * 70 : 96 * 70 + 9] = True
    xs = [values_of("normal", n, rank) for rank in range(world)]
    mean, ahead = sum(x.double() for x in xs) / world, sum(torch.where(x < 0, -1, 1) for x in xs)
    exchange(plans, xs, [None] * world)
    for x in xs[1:]:
        same(x, xs[0])
    close(xs[0][exact].double(), mean[exact], 1e-6)
    decided = ~exact & (ahead != 0)
    assert decided.sum() > n / 3 and torch.equal(xs[0][decided] > 0, ahead[decided] > 0)
    assert all(plan.finite and all(plan.finite) for plan in plans)


def test_there_is_no_error_feedback():
    vote = commopt.parse("vote")
    assert vote.biased and not vote.ef
    with pytest.raises(ValueError, match=r"'ef=true' is not a key=value that vote takes; it takes block=1024 \(int\)"):
        commopt.parse("vote:ef=true")
