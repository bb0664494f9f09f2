"""powersgd and the collective of rounds: against an implementation of its own in numpy, in one process and on real ranks."""

import inspect
import signal
from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
import test_ddp
import test_faults
import test_plan
import test_state
from commopt import parse
from commopt.compressors.adaptive_ranks import allocate, energies, expected
from commopt.compressors.powersgd import PowerSGD, _orthonormalize
from ranks import Given, close, each_rank, loss_of, run, same, same_everywhere
from simulated import exchange, plans_for


@pytest.fixture(autouse=True)
def one_thread():
    """The matrices here are small: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def averages(plans, gradients, residuals):
    """The average of one step; every rank's must have the same bits. gradients: one flat tensor per rank, left alone."""
    xs = [g.clone() for g in gradients]
    exchange(plans, xs, residuals)
    for x in xs[1:]:
        same(x, xs[0])
    return xs[0]


def held(plan, name: str):
    """What the collective of rounds keeps for a plan."""
    return inspect.getclosurevars(plan.prepared.begin).nonlocals[name]


def zeros(plans):
    return [torch.zeros(plan.n) if plan.wants_residual else None for plan in plans]


def of_rank(rank, rows, columns, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, rank, generator=g) @ torch.randn(rank, columns, generator=g) / rank**0.5


# --- what the formulas say ---


class Vogels:
    """Algorithm 1 of the paper for one matrix, with QR and in float64; Q is not made orthonormal, as there."""

    def __init__(self, world, shape, rank, start):
        self.residuals, self.q = [np.zeros(shape) for _ in range(world)], start

    def step(self, gradients):
        sums = [g + r for g, r in zip(gradients, self.residuals)]
        p, _ = np.linalg.qr(sum(a @ self.q for a in sums) / len(sums))
        self.q = sum(a.T @ p for a in sums) / len(sums)
        decoded = p @ self.q.T
        self.residuals = [a - decoded for a in sums]
        return decoded


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("shape", [(96, 131), (257, 40), (40, 9, 3, 3)])
def test_it_is_the_algorithm_of_the_paper(shape, rank, world):
    plans = plans_for([shape], f"powersgd:rank={rank},values=float32", world)
    matrix = (shape[0], plans[0].n // shape[0])
    start = torch.randn(rank, matrix[1], generator=torch.Generator().manual_seed(0)).double().numpy().T
    paper, residuals = Vogels(world, matrix, rank, start), zeros(plans)
    trend = of_rank(rank + 1, *matrix)
    for step in range(8):
        gradients = [(trend + 0.2 * torch.randn(matrix, generator=torch.Generator().manual_seed(100 * step + r))) for r in range(world)]
        want = torch.from_numpy(paper.step([g.double().numpy() for g in gradients]))
        got = averages(plans, [g.view(-1) for g in gradients], residuals).view(matrix)
        assert (got - want).norm() <= 1e-4 * want.norm(), f"step {step}: {float((got - want).norm() / want.norm())}"
        for r, kept in zip(residuals, paper.residuals):
            assert (r.view(matrix) - torch.from_numpy(kept)).norm() <= 1e-4 * np.linalg.norm(kept) + 1e-4 * want.norm()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_matrix_of_that_rank_or_less_is_transmitted_as_it_is(rank):
    for of, world in ((rank, 1), (rank, 2), (max(1, rank - 2), 2)):
        plans = plans_for([(120, 90)], f"powersgd:rank={rank},values=float32", world)
        residuals, x = zeros(plans), of_rank(of, 120, 90)
        for step in range(3):
            got = averages(plans, [x.view(-1)] * world, residuals).view(120, 90)
            assert (got - x).norm() <= 1e-5 * x.norm(), f"step {step}: {float((got - x).norm() / x.norm())}"


@pytest.mark.parametrize("rank", [1, 3])
def test_the_iteration_finds_the_best_approximation(rank):
    """Of a gradient that stays the same, without error feedback: the singular values that are sent are the largest."""
    plans = plans_for([(70, 110)], f"powersgd:rank={rank},values=float32,ef=false", 2)
    u, s, v = torch.linalg.svd(torch.randn(70, 110, generator=torch.Generator().manual_seed(1)), full_matrices=False)
    x = (u * (s * 0.6 ** torch.arange(70))) @ v
    for _ in range(30):
        got = averages(plans, [x.view(-1)] * 2, zeros(plans)).view(70, 110)
    lost = float(torch.linalg.svdvals(x)[rank:].square().sum())
    assert float((x - got).square().sum()) == pytest.approx(lost, rel=1e-3)


def test_rows_become_orthonormal_whatever_they_were():
    """To 1e-12 where they are independent; zeros stay zeros and what depends on other rows gets no longer than one."""
    g = torch.Generator().manual_seed(0)
    good = [torch.randn(4, n, generator=g, dtype=torch.float64) for n in (9, 300)]
    good.append(good[1] @ torch.diag(10.0 ** torch.linspace(-6, 0, 300, dtype=torch.float64)))  # condition 1e5
    for scale in (1.0, 1e-40, 1e38):
        thin = [scale * a for a in good]
        _orthonormalize(thin)
        for a, b in zip(thin, good):
            close(a @ a.T, torch.eye(4, dtype=torch.float64), 1e-10)
            assert torch.linalg.lstsq(a.T, b.T).solution.T.matmul(a).sub(b).norm() < 1e-8 * b.norm(), "another space"
    a = good[1]
    thin = [torch.zeros(4, 50, dtype=torch.float64), torch.stack([a[0], 0 * a[0], a[0], a[1]])]
    _orthonormalize(thin)
    assert not thin[0].any() and not thin[1][1].any()
    assert torch.isfinite(thin[1]).all() and torch.linalg.matrix_norm(thin[1], 2) <= 1 + 1e-9


# --- what must not go wrong ---


def test_zeros_give_zeros_and_what_comes_after_them_is_found():
    """A LoRA factor starts at zero: no NaN, then or later, and no direction that stays dead."""
    plans = plans_for([(120, 90), (60, 80)], "powersgd:values=float32", 2)
    residuals, n = zeros(plans), plans[0].n
    other = torch.randn(60 * 80, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        got = averages(plans, [torch.zeros(n)] * 2, residuals)
        same(got, torch.zeros(n))
    for _ in range(3):  # one matrix is zero
        got = averages(plans, [torch.cat([torch.zeros(120 * 90), other])] * 2, residuals)
        same(got[: 120 * 90], torch.zeros(120 * 90))
        assert got[120 * 90 :].any()
    for of in (1, 4, 2, 4):
        x = of_rank(of, 120, 90, seed=of)
        residuals = zeros(plans)
        got = averages(plans, [torch.cat([x.view(-1), 0 * other])] * 2, residuals)[: 120 * 90].view(120, 90)
        assert (got - x).norm() <= 1e-4 * x.norm(), f"rank {of}: {float((got - x).norm() / x.norm())}"


@pytest.mark.parametrize("scale", [1e-8, 1e-30, 1e15])
def test_the_relative_error_does_not_depend_on_the_scale(scale):
    """The paper's P = M Q has the square of the scale: 1e-30 would vanish. Also when scales of several matrices differ."""
    def errors(*scales):
        plans, out = plans_for([(120, 90), (120, 90)], "powersgd:rank=2", 2), []
        residuals = zeros(plans)
        for step in range(5):
            xs = [[s * torch.randn(120 * 90, generator=torch.Generator().manual_seed(10 * step + r)) for s in scales] for r in range(2)]
            had = [(a.double() + b.double()) / 2 for a, b in zip(*xs)]
            got = averages(plans, [torch.cat(x) for x in xs], residuals).split(120 * 90)
            out += [float((g.double() - h).norm() / h.norm()) for g, h in zip(got, had)]
        return out

    assert errors(scale, 1.0) == pytest.approx(errors(1.0, 1.0), rel=1e-3)


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_a_power_of_two_passes_through_to_the_last_bit(values):
    results = []
    for scale in (1.0, 2.0**-60):
        plans = plans_for([(120, 90), (5,)], f"powersgd:values={values}", 3)
        residuals = zeros(plans)
        for step in range(4):
            xs = [scale * torch.randn(plans[0].n, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(3)]
            got = averages(plans, xs, residuals)
        results.append(got / scale)
    same(results[1], results[0])


@pytest.mark.parametrize("spec", ["powersgd", "powersgd:rank=1,values=float32", "powersgd:rank=2,ranks=adaptive", "powersgd:rank=2,values=int8"])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_nothing_is_lost_between_ranks(spec, world):
    for bucket in test_plan.BUCKETS:
        test_plan.test_nothing_is_lost_between_ranks(bucket, spec, world)
    for dtype in (torch.bfloat16, torch.float16):
        test_plan.test_nothing_is_lost_in_16_bit_buckets_but_the_rounding_of_the_result(spec, dtype)


@pytest.mark.parametrize("values", ["bf16", "int8"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 120 * 90 - 1, 120 * 90 + 7], ids=str)
def test_a_step_that_is_not_finite_is_seen_by_all_and_forgotten(bad, where, values):
    """Residual and Q stay, so the next steps are as if it had not been."""
    runs = []
    for steps in ([0, 1, "bad", 2, 3], [0, 1, 2, 3]):
        plans = plans_for([(120, 90), (60, 80), (3,)], f"powersgd:values={values}", 2)
        residuals = zeros(plans)
        for step in steps:
            xs = [torch.randn(plans[0].n, generator=torch.Generator().manual_seed(10 * (9 if step == "bad" else step) + r)) for r in range(2)]
            before = [r.clone() for r in residuals]
            if step == "bad":
                xs[1][where] = bad
            exchange(plans, xs, residuals)
            assert [bool(plan.finite) and all(plan.finite) for plan in plans] == [step != "bad"] * 2
            finite = [torch.isfinite(x) for x in xs]
            same(finite[0], finite[1])
            assert bool(finite[0].all()) == (step != "bad")
            if step == "bad":  # what the GradScaler skips is rolled back by its residual; the bad matrix' own never moves
                bad_one = slice(0, 10_800) if where < 10_800 else slice(10_800, 15_600)
                for r, was in zip(residuals, before):
                    same(r[bad_one], was[bad_one])
                    r.copy_(was)
        runs.append((xs[0], residuals))
    same(runs[0][0], runs[1][0])
    for a, b in zip(runs[0][1], runs[1][1]):
        same(a, b)


# --- how the factors travel ---


def test_rounding_the_factors_loses_little_and_all_of_it_is_kept():
    """Of a gradient whose rank is transmitted whole: what arrives is off by the rounding of the factors alone."""
    errors, x = {}, of_rank(4, 120, 90).view(-1)
    for values in ("float32", "bf16", "int8"):
        plans = plans_for([(120, 90)], f"powersgd:values={values}", 3)
        residuals = zeros(plans)
        got = averages(plans, [x] * 3, residuals)
        close(got.double() + residuals[0].double(), x.double(), 1e-6)
        errors[values] = float((got - x).norm() / x.norm())
    assert errors["float32"] < 1e-5 < errors["bf16"] < 0.006 < errors["int8"] < 0.025, errors


def test_int8_factors_are_messages_of_int8_with_a_scale_for_each_64():
    plans = plans_for([(120, 90), (5,)], "powersgd:values=int8", 2)
    exchange(plans, [torch.randn(plans[0].n, generator=torch.Generator().manual_seed(r)) for r in range(2)], zeros(plans))
    for trip, side in zip(held(plans[0], "trips"), (120, 90)):
        lane = trip.lanes[0]
        shard = 8 * -(-4 * side // 16)
        assert str(lane.way) == "int8:block=64" and lane.values.shape == (2, shard)
        codes, scales = map(torch.cat, zip(*lane.means))
        assert codes.dtype == torch.int8 and codes.shape == (2, shard) and scales.shape == (2, -(-shard // 64))
        decoded = codes.float() * scales.repeat_interleave(64, 1)[:, :shard]
        same(held(plans[1], "trips")[0].departing, held(plans[0], "trips")[0].departing)
        assert (decoded.view(-1)[: 4 * side].view(4, side).norm(dim=1) > 0).all() and not decoded.view(-1)[4 * side :].any()


@pytest.mark.parametrize("values", ["bf16", "float32", "int8"])
def test_every_backend_sends_the_same_bytes(values, monkeypatch):
    runs = []
    for backend in ("reference", "cpu"):
        monkeypatch.setenv("COMMOPT_BACKEND", backend)
        plans = plans_for([(120, 90), (60, 80), (7,)], f"powersgd:values={values}", 2)
        residuals = zeros(plans)
        for step in range(3):
            got = averages(plans, [torch.randn(plans[0].n, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(2)], residuals)
        runs.append([got, *residuals, *(trip.departing for trip in held(plans[0], "trips"))])
    for a, b in zip(*runs):
        same(a, b)


# --- ranks that adapt ---


def test_directions_go_where_they_transmit_more():
    """One gradient of rank 9 and one of rank 1, one as large as the other: with four directions each the first would lose
    most of its energy in every step."""
    wide, narrow = of_rank(9, 120, 90, 1), of_rank(1, 120, 90, 2)
    errors = {}
    for ranks in ("equal", "adaptive"):
        plans, errors[ranks] = plans_for([(120, 90), (120, 90)], f"powersgd:rank=4,ranks={ranks},ef=false", 2), []
        for step in range(100):
            got = averages(plans, [torch.cat([wide, narrow]).view(-1)] * 2, zeros(plans))
            errors[ranks].append(float((got - torch.cat([wide, narrow]).view(-1)).norm() / wide.norm()))
        notes = [kernels.notes for plan in plans for _, kernels, _ in held(plan, "methods")]
        assert all(note == notes[0] for note in notes)
        assert notes[0]["ranks"] == ([4, 4] if ranks == "equal" else [7, 1])
    assert errors["adaptive"][18] == pytest.approx(errors["equal"][18], rel=1e-3) and errors["adaptive"][-1] < 0.6 * errors["equal"][-1]


def test_what_adapts_sends_no_more_and_never_less_than_one():
    g = torch.Generator().manual_seed(0)
    for trial in range(200):
        count, rank = int(torch.randint(1, 6, (), generator=g)), int(torch.randint(1, 6, (), generator=g))
        shapes = [tuple(map(int, torch.randint(10 * rank, 300, (2,), generator=g))) for _ in range(count)]
        ranks = [rank] * count
        for _ in range(8):
            sent = energies([(10.0 ** torch.randn(r, generator=g).double()).tolist() for r in ranks])
            new = allocate(rank, shapes, ranks, sent)
            assert min(new) >= 1 and max(abs(a - b) for a, b in zip(new, ranks)) <= 2
            assert all(sum(r * s[i] for r, s in zip(new, shapes)) <= rank * sum(s[i] for s in shapes) for i in (0, 1))
            ranks = new
    assert allocate(2, [(64, 64)] * 3, [2, 2, 2], energies([[4.0, 4.0], [4.0, 4.0], [4.0, 1e-9]])) == [3, 2, 1]


def test_what_was_given_up_is_remembered_and_tried_again_some_day():
    assert expected([[24, 8]], [[24, 8, -40, -50]]) == [[24, 8, -39, -49]]
    assert expected([[24, 8]], [[24, 20, 9]]) == [[24, 8, 8]] and expected([[5]], [[]]) == [[5]]


def test_energies_do_not_depend_on_the_last_bits():
    assert energies([[8.0, 1.0, 2.0], [0.0]]) == [[24, 8, 0], [-7973]] == energies([[8.0 * (1 + 1e-12), 1.0, 2.0], [1e-320]])


# --- who travels how, and what it costs ---


def test_what_does_not_pay_travels_exactly_and_bytes_are_as_said():
    shapes = [(64, 33), (7,), (8, 200), (50, 50), (4000,), (3, 70_000), (16, 16, 3, 3)]
    plan = plans_for(shapes, "powersgd", 2)[0]
    taken = [shape for part in plan.parts for _, shape in part.tensors if part.compressor.name == "powersgd"]
    assert taken == [(64, 33), (50, 50), (16, 16, 3, 3)]  # 8 (8 + 200) < 8 * 200 is not so, and 3 x 70000 has rank 3
    exact = plan.n - sum(s.numel() for s in taken)
    factors = 4 * (64 + 33 + 50 + 50 + 16 + 144)
    assert abs(plan.sent - 2 * factors - 4 * exact) <= 128 and plan.describe()["collective"] == "rounds"
    assert plan.sent == plan.describe()["bytes_sent"] < 4 * plan.n
    assert plans_for([(7,), (8, 200)], "powersgd", 2)[0].collective == "sum"  # nothing to compress

    for n, sides in ((1024 * 1024, 2048), (300, 17 + 18), (10**6 + 3, 1000 + 1001)):
        assert 0 <= commopt.wire_bytes("powersgd:rank=2,values=float32", n) - 4 * 2 * sides < 32
    assert 0 <= commopt.wire_bytes("powersgd:rank=2,values=int8", 1024 * 1024) - 2 * 2048 - 4 * 2 * 2048 // 64 < 64
    assert commopt.wire_bytes("powersgd", 9) == 36 and commopt.wire_bytes("powersgd", 0) == 0
    with pytest.raises(ValueError, match="rank must be 1 or more, got 0"):
        parse("powersgd:rank=0")
    assert commopt.compressors()["powersgd"] == {
        "rank": (int, 4), "values": (Literal["bf16", "float32", "int8"], "bf16"), "ranks": (Literal["equal", "adaptive"], "equal"), "ef": (bool, True)}


def test_other_compressors_in_the_same_bucket_keep_their_messages():
    shapes = [(64, 64), (9,), (50, 50), (300, 300), (120, 90), (90, 120), (80, 80)]
    rules = {"p2": "topk:ratio=0.2", "p3": "none", "p4": "int8:ef=true", "p6": "powersgd:rank=1"}
    plans = plans_for(shapes, "powersgd:rank=3", 3, rules=rules)
    assert plans[0].collective == "rounds" and len(plans[0].parts) == 6
    residuals, kept = zeros(plans), torch.zeros(plans[0].n, dtype=torch.float64)
    bounds = torch.tensor([0, *(torch.Size(s).numel() for s in shapes)]).cumsum(0).tolist()
    for step in range(3):
        for plan in plans:
            plan.step = step
        xs = [torch.randn(plans[0].n, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(3)]
        had = sum(x.double() for x in xs) + kept
        assert exchange(plans, xs, residuals).sent[0] == plans[0].sent
        kept = sum(r.double() for r in residuals)
        same(xs[1], xs[0]), same(xs[2], xs[0])
        close(3 * xs[0].double() + kept, had, 1e-5)
        for i, spec in enumerate(["powersgd", "none", "topk", "none", "int8", "powersgd", "powersgd"]):
            got, all_of = (t[bounds[i] : bounds[i + 1]] for t in (3 * xs[0].double(), had))
            lost = float((got - all_of).norm() / all_of.norm())
            low, high = {"none": (0, 1e-6), "int8": (1e-3, 0.02), "topk": (0.3, 0.9), "powersgd": (0.5, 1.0)}[spec]
            assert low <= lost <= high, f"parameter {i}, {spec}: {lost}"


# --- real ranks ---


@each_rank(2, 3, 4)
def test_replicas_stay_identical_and_learn(rank, world):
    """Several buckets on gloo, convolutions, an embedding; momentum would multiply any difference between ranks. One of
    them has another number of threads. The labels are random, so what a rank can learn of them is little."""
    torch.set_num_threads(2 if rank == 0 else 1)
    ddp = test_ddp.mixed()
    commopt.attach(ddp, "powersgd")
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    loss = lambda: sum(float(loss_of(ddp.module, r, step)) for r in range(world) for step in range(4)) / (4 * world)
    before = loss()
    for step in range(50):
        test_ddp.train_step(ddp, optimizer, rank, step % 4)
        same_everywhere(ddp.parameters(), f"step {step}")
    assert loss() < before - 0.3


@pytest.mark.parametrize("test, given", [
    (test_ddp.test_all_ranks_hold_the_same_bits_and_nothing_is_lost, {"rules": None, "world": 3, "spec": "powersgd:rank=2"}),
    (test_ddp.test_all_ranks_hold_the_same_bits_and_nothing_is_lost, {"rules": None, "world": 3, "spec": "powersgd:rank=2,values=int8"}),
    (test_ddp.test_all_ranks_hold_the_same_bits_and_nothing_is_lost, {"rules": test_ddp.RULES}),
    *((test_ddp.test_the_residual_stays_with_its_parameter_when_buckets_are_rebuilt, {"options": o}) for o in test_ddp.OPTIONS),
    (test_ddp.test_parameters_that_are_not_used_on_some_ranks, {}),
    (test_ddp.test_error_feedback_in_bfloat16_buckets_falls_as_one_over_time, {"spec": "powersgd:rank=8"}),
    (test_faults.test_without_a_scaler_an_overflow_leaves_residuals_finite, {"bad": float("nan")}),
    (test_faults.test_without_a_scaler_an_overflow_leaves_residuals_finite, {"bad": float("-inf")}),
    (test_faults.test_the_residual_is_in_unscaled_units, {}),
    (test_state.test_a_resumed_run_loses_nothing, {}),
], ids=lambda value: getattr(value, "__name__", None))
def test_as_every_compressor(test, given):
    run(test=test, **{"world": 2, "spec": "powersgd:rank=1"} | given)


@pytest.mark.parametrize("before, after", [(4, 2), (2, 3)])
def test_a_checkpoint_is_complete_for_any_world_size_and_spec(before, after):
    file = run(before, test_state._save, spec="powersgd:rank=2")[0]
    run(after, test_state._load, spec="powersgd:rank=1", file=file)
    run(after, test_state._load, spec="topk:ratio=0.05", file=file)


@each_rank(2)
def test_a_step_that_the_scaler_skips_is_forgotten(rank, world):
    """A run with a bad step in the middle equals one without it, bit for bit: a power of two changes no rounding."""
    runs = []
    for steps in ([0, 1, "bad", 2, 3], [0, 1, 2, 3]):
        ddp = DDP(Given(*test_faults.SHAPES))  # one bucket: in others Q has moved
        handle = commopt.attach(ddp, "powersgd:rank=2", start_step=0)
        optimizer, scaler = torch.optim.SGD(ddp.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for step in steps:
            bad = float("inf") if step == "bad" and rank == 1 else None
            test_faults.given_step(ddp, rank, 9 if step == "bad" else step, scaler, bad)
            scaler.step(optimizer)
            scaler.update()
            same_everywhere(ddp.parameters(), f"step {step}")
        runs.append([*(p.detach().clone() for p in ddp.parameters()), *test_faults.residuals(handle).values()])
        assert handle.stats()["nonfinite_steps"] == len(steps) - 4
    for got, want in zip(*runs):
        same(got, want)


@commopt.register("failing_rounds")
class FailingRounds(PowerSGD):
    """Fails in the second round, or when it decodes."""

    def average(self, kernels, tensors, residuals, *values):
        for i, _ in enumerate(super().average(kernels, tensors, residuals, *values)):
            if test_faults.fail["encode"] and i == 1:
                raise OSError("the dog ate it")
            yield
        if test_faults.fail["decode_sum"]:
            raise OSError("the dog ate it")


def _fail_in_a_round(rank, world, where):
    return test_faults._fail_in(rank, world, "failing_rounds:rank=1", where, culprit=1)


@pytest.mark.parametrize("where", ["encode", "decode_sum"])
def test_a_rank_that_fails_in_a_round_makes_all_raise(where):
    texts = run(3, _fail_in_a_round, where=where)
    assert all(t and t[0] == texts[0][0] for t in texts), texts
    assert "rank 1 failed" in texts[0][0] and "OSError: the dog ate it" in texts[0][0], texts


def test_a_rank_that_dies_or_hangs_is_reported_by_all_others():
    for sign, timeout, least in ((signal.SIGKILL, 30, 0), (signal.SIGSTOP, 3, 2)):
        for text, took in run(3, test_faults._lose, lost=(2,), sign=sign, spec="powersgd:rank=1", timeout=timeout):
            assert least < took < 10 and "bucket" in text and "among ranks [0, 1, 2]" in text, (took, text)
