"""Plans, messages and collectives, with all ranks in one process."""

import random

import pytest
import torch

from commopt import parse
from commopt.collectives import prepare
from commopt.plan import EXACT_BELOW, Plan, compressor_for, split
from commopt.residual import Residuals
from ranks import close, same
from simulated import exchange, parameters, plans_for


EF = ["int8:ef=true", "int8:ef=true,rounding=stochastic", "int4", "int4:rounding=stochastic", "bf16:ef=true", "fp16:ef=true",
      "topk:ratio=0.05", "topk:ratio=0.05,values=bf16", "topk:ratio=0.05,values=int8"]
BUCKETS = {
    "one": [(64, 33)], "small inside": [(50, 50), (7,), (64, 33), (3, 3), ()], "all small": [(7,), (3, 5), ()], "empty": [(0,), (0, 3)],
    "with empty": [(0, 4), (40, 40), (0,), (41, 43)], "one element": [(1, 1)], "prime": [(1031, 7), (13,), (1009, 1)], "fewer than shards": [(1025, 1)],
}


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("spec", EF)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_nothing_is_lost_between_ranks(bucket, spec, world):
    """Over all ranks, also through the second stage of two_shot: W average + sum of residuals = sum of gradients + sum of
    residuals before. Exact elements are the mean, and have no residual. All ranks get the same bits; bytes are as said."""
    shapes = BUCKETS[bucket]
    plans = plans_for(shapes, spec, world)
    n = plans[0].n
    g = torch.Generator().manual_seed(n)
    residuals = [torch.zeros(n) if plan.wants_residual else None for plan in plans]
    kept = torch.zeros(n, dtype=torch.float64)
    for step in range(4):
        xs = [torch.randn(n, generator=g) * 10.0 ** (step - 1) for _ in range(world)]
        had = sum(x.double() for x in xs) + kept
        for plan in plans:
            plan.step = step
        promised = plans[0].sent
        sent = exchange(plans, xs, residuals).sent[0]
        for x in xs[1:]:
            same(x, xs[0], f"step {step}")
        kept = sum((r.double() for r in residuals if r is not None), torch.zeros(n, dtype=torch.float64))
        size = max(1.0, float(had.abs().max())) if n else 1.0
        close(world * xs[0].double() + kept, had, 5e-7 * world * size, f"step {step}")
        exact = torch.cat([torch.full((p.numel,), compressor_for(p, parse(spec), {}).name == "none") for p in plans[0].parameters])
        close(world * xs[0].double()[exact], had[exact], 2e-7 * world * had[exact].abs() + 2e-7 * size, "exact")
        assert not kept[exact].any()
        if plans[0].collective != "sum":
            assert sent == promised
            assert exact.all() or kept.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", EF)
def test_nothing_is_lost_in_16_bit_buckets_but_the_rounding_of_the_result(spec, dtype):
    plans = plans_for([(64, 33), (7,), (50, 50)], spec, 3, dtype)
    if plans[0].collective == "sum":
        pytest.skip("its messages would be no smaller than the gradient")
    residuals = [torch.zeros(plans[0].n) for _ in plans]
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    kept = torch.zeros(plans[0].n, dtype=torch.float64)
    for step in range(4):
        xs = [torch.randn(plans[0].n, generator=torch.Generator().manual_seed(10 * step + r)).to(dtype) for r in range(3)]
        had = sum(x.double() for x in xs) + kept
        for plan in plans:
            plan.step = step
        exchange(plans, xs, residuals)
        kept = sum(r.double() for r in residuals)
        close(3 * xs[0].double() + kept, had, 3 * unit * xs[0].double().abs() + 1e-5, f"step {step}")


def test_parts_are_stretches_of_one_compressor():
    bucket = parameters((64, 33), (7,), (50, 50), (40, 40), (3, 3), (64, 64))
    parts, exact = split(bucket, parse("int8"), {"p3": parse("topk:ratio=0.1")}, torch.float32)
    assert [(p.start, p.stop, str(p.compressor)) for p in parts] == [
        (0, 2112 + 7 + 2500, "int8"), (4619, 4619 + 1600 + 9, "topk:ratio=0.1"), (6228, 6228 + 4096, "int8")]
    assert exact.tolist() == [*range(2112, 2119), *range(6219, 6228)]

    parts, exact = split(parameters((7,), (9,)), parse("int8"), {}, torch.float32)  # nothing to compress: the plain sum
    assert [(p.start, p.stop, p.compressor.name) for p in parts] == [(0, 16, "none")] and exact.numel() == 0

    parts, exact = split(parameters((9,), (64, 64)), parse("int8"), {}, torch.float32)  # a small tensor before the first
    assert [(p.start, p.stop, p.compressor.name) for p in parts] == [(0, 9 + 4096, "int8")] and exact.tolist() == list(range(9))

    parts, exact = split(parameters((64, 64), (300, 300), (64, 64)), parse("int8"), {"p1": parse("none")}, torch.float32)
    assert [(p.start, p.stop, p.compressor.name) for p in parts] == [(0, 4096, "int8"), (4096, 94096, "none"), (94096, 98192, "int8")]
    assert exact.numel() == 0  # large: a part of its own


@pytest.mark.parametrize("shape, rules, want", [
    ((EXACT_BELOW, 1), {}, "int4"), ((EXACT_BELOW - 1, 1), {}, "none"), ((10**6,), {}, "none"), ((), {}, "none"), ((0, 5), {}, "none"),
    ((10**6,), {"p*": "int8"}, "int8"), ((64, 64), {"q*|p?": "none", "*": "int8"}, "none"), ((64, 64), {"q": "none", "p0": "bf16", "*": "fp16"}, "bf16"),
    ((64, 64), {"P0": "none"}, "int4"),
])
def test_the_first_rule_that_matches_wins(shape, rules, want):
    parameter = parameters(shape)[0]
    assert str(compressor_for(parameter, parse("int4"), {k: parse(v) for k, v in rules.items()})) == want


@pytest.mark.parametrize("world", [2, 3, 4, 7])
@pytest.mark.parametrize("n", [1024, 1025, 2048, 4096, 4097, 100_003])
def test_shards_cover_the_bucket(world, n):
    plans = plans_for([(n, 1)], "int8", world)
    shards = plans[0].shards(world)
    assert shards[0][0] == 0 and shards[-1][1] == n
    assert all(a[1] == b[0] for a, b in zip(shards, shards[1:])) and all(0 <= e - s for s, e in shards)
    assert all(s % 1024 == 0 for s, e in shards if s < n)
    assert all(p.shards(world) == shards and p.exact.equal(plans[0].exact) and p.parts == plans[0].parts for p in plans)
    assert max(e - s for s, e in shards) <= -(-n // world) + 1024


@pytest.mark.parametrize("spec", ["int8", "int4", "topk:ratio=0.01", "topk:ratio=1.0", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_payload_is_never_larger_than_the_gradient(spec, dtype):
    """For any bucket: small tensors, one large, embedding next to a norm, ... Over all ranks: shards of a small bucket
    differ in size."""
    draw = random.Random(7)
    shapes = [[(1024, 1), *[(1000,)] * 10], [(8, 8), (1025, 1)], [(5,), (32, 32), (31, 33), (5,)]]
    for _ in range(60):
        shapes.append([draw.choice([(draw.randint(1, 3000),), (draw.randint(1, 60), draw.randint(1, 60)), (), (0, 3)]) for _ in range(draw.randint(1, 6))])
    for bucket in shapes:
        for world in (2, 4):
            plans = plans_for(bucket, spec, world, dtype)
            sent, dense = sum(plan.sent for plan in plans), plans[0].n * dtype.itemsize
            limit = world * (world - 1) * dense if plans[0].collective == "gather" else 2 * (world - 1) * dense
            padding = 2 * (world - 1) * world * 48  # up to 16 bytes a field
            assert sent <= limit + padding, f"{sent} bytes, not {limit}, of {world} ranks: {bucket} as {plans[0].collective}"


def test_mixed_compressors_are_gathered_and_dtypes_without_kernels_summed():
    assert plans_for([(64, 64), (64, 64)], "int8", 2, rules={"p1": "topk"})[0].collective == "gather"
    assert plans_for([(64, 64), (64, 64)], "int8", 3, rules={"p1": "bf16"})[0].collective == "two_shot"
    assert plans_for([(64, 64), (64, 64)], "int8", 2)[0].collective == "gather"
    assert plans_for([(64, 64)], "int8", 2, torch.float64)[0].collective == "sum"
    assert plans_for([(64, 64)], "none", 2)[0].collective == "sum"
    described = plans_for([(64, 64), (9,)], "int8", 2)[0].describe()
    assert described["elements"] == 4105 and described["exact_elements"] == 9 and described["specs"] == ["int8"]


def test_a_mixture_is_averaged_whichever_way_it_goes():
    shapes, rules = [(640, 640), (9,), (50, 50), (300, 300)], {"p2": "topk:ratio=0.2", "p3": "none"}
    plans = plans_for(shapes, "int8:ef=true", 3, rules=rules)
    assert plans[0].collective == "gather" and len(plans[0].parts) == 3
    xs = [torch.randn(plans[0].n, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    had, residuals = sum(x.double() for x in xs), [torch.zeros(plans[0].n) for _ in plans]
    exchange(plans, xs, residuals)
    close(3 * xs[0].double() + sum(r.double() for r in residuals), had, 1e-5)
    close(xs[0][-90_000:], (had / 3)[-90_000:], 1e-6)
    same(xs[1], xs[0]), same(xs[2], xs[0])


def test_more_than_an_all_reduce_is_not_sent():
    """Messages of 0.466 bytes per value to W - 1 ranks against 8 (W - 1) / W: beyond 17 ranks the all-reduce sends less."""
    for world, collective in ((17, "gather"), (18, "sum")):
        plan = plans_for([(400, 400)], "topk:ratio=0.1,collective=gather", world)[0]
        assert plan.collective == collective and plan.sent <= 8 * (world - 1) * plan.n // world
        assert not plan.wants_residual or collective == "gather"


def test_the_residual_moves_with_its_parameters():
    """Buckets [a b] [c] become [c a] [b]."""
    held, device = Residuals(), torch.device("cpu")
    a, b, c = parameters((40, 40), (41, 41), (42, 42))
    make = lambda number, *ps: Plan(number, list(ps), torch.float32, device, parse("int4"), {}, 0, 2)
    for plan in (make(0, a, b), make(1, c)):
        held.serve(plan)
        for p in plan.parameters:
            held.views[p.name].fill_({"p0": 1.0, "p1": 2.0, "p2": 3.0}[p.name])
    first, second = make(2, c, a), make(3, b)
    held.serve(first), held.serve(second)
    assert first.residual.unique_consecutive().tolist() == [3.0, 1.0] and first.residual[:1764].eq(3).all()
    assert second.residual.eq(2).all()
    assert len(held._flats) == 2, "the old buckets' residuals are freed"
    again = make(4, c, a)
    held.serve(again)
    assert again.residual.data_ptr() == first.residual.data_ptr(), "the same bucket: nothing moves"
    assert held.norm() == pytest.approx((1600 * 1 + 1681 * 4 + 1764 * 9) ** 0.5)


def test_a_velocity_moves_beside_its_residual():
    """From two slots to one and back: the residual stays, the velocity begins anew."""
    held, (a, b) = Residuals(), parameters((40, 40), (0,))
    make = lambda number, spec: Plan(number, [a, b], torch.float32, torch.device("cpu"), parse(spec), {}, 0, 2)
    first, second, third = make(0, "topk:momentum=0.5"), make(1, "topk"), make(2, "topk:momentum=0.9")
    held.serve(first)
    first.residual[0].fill_(3), first.residual[1].fill_(5)
    assert held.norm() == pytest.approx(3 * 40)
    held.serve(second)
    assert second.residual.shape == (1600,) and second.residual.eq(3).all()
    held.serve(third)
    assert third.residual[0].eq(3).all() and third.residual[1].eq(0).all() and list(held._flats) == [2]
    held.load({"p0": torch.stack([torch.full((1600,), 7.0), torch.full((1600,), 9.0)])}, {"p0": 1600, "p1": 0})
    assert third.residual[0].eq(7).all() and third.residual[1].eq(9).all()
