"""Collectives on 2 to 64 simulated ranks: sums, bits, what is kept, and bytes, each counted from outside."""

import pytest
import torch

from commopt.collectives.merge import Batch
from ranks import close, same
from simulated import Network, SimulatedLink, exchange, plans_for, run

SHAPES = [(96, 70), (9,), (64, 64), (3, 3), (200, 33)]


def kept_by(residuals, n: int) -> torch.Tensor:
    return sum((r.double() for r in residuals if r is not None), torch.zeros(n, dtype=torch.float64))


def nothing_is_lost(plans, steps: int = 3, seed: int = 0) -> list:
    """W mean + kept = had + kept before, over all ranks and stages, and all ranks hold the same bits. The networks."""
    n, world, g = plans[0].n, len(plans), torch.Generator().manual_seed(seed)
    residuals = [torch.zeros(n) if plan.wants_residual else None for plan in plans]
    networks = []
    for step in range(steps):
        xs = [torch.randn(n, generator=g) for _ in plans]
        had = sum(x.double() for x in xs) + kept_by(residuals, n)
        for plan in plans:
            plan.step = step
        networks.append(exchange(plans, xs, residuals))
        for x in xs[1:]:
            same(x, xs[0], f"step {step}")
        close(world * xs[0].double() + kept_by(residuals, n), had, 3e-7 * world * max(1.0, float(had.abs().max())), f"step {step}")
        assert all(plan.finite and all(plan.finite) for plan in plans)
    return networks


@pytest.mark.parametrize("world", [2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("spec", [
    "int8:ef=true", "int4", "sign", "fp8:ef=true", "mxfp4", "randomk:ratio=0.05", "powersgd:rank=2,values=float32", "topk:ratio=0.02",
    "topk:ratio=0.02,collective=gather", "topk:ratio=0.02,collective=sparse_two_shot", "topk:ratio=0.02,collective=sparse_two_shot,values=int8",
    "int8:ef=true,collective=integer_sum", "int4:collective=integer_sum", "int2:collective=integer_sum",
    "topk:ratio=0.02,collective=sparse_two_shot,scope=threshold", "topk:ratio=0.02,collective=sparse_two_shot,scope=block",
])
def test_nothing_is_lost_on_any_number_of_ranks(spec, world):
    plans = plans_for(SHAPES, spec, world)
    nothing_is_lost(plans, steps=2 if world == 32 else 3)


@pytest.mark.parametrize("world", [2, 3, 8, 64])
@pytest.mark.parametrize("spec", ["bf16", "fp16", "int8:block=8", "int8:block=8,collective=integer_sum", "none"])
def test_sums_of_small_integers_are_exact(spec, world):
    """A mean of 1 to 64 ranks of multiples of the world's size, small enough for each format and for its sum."""
    n = 64 * 40
    plans = plans_for([(64, 40)], spec, world)
    one = torch.zeros(n)
    one[::8] = 127.0 if spec.startswith("int8") else 1.0
    one[3::8] = 5.0
    xs = [one.clone() for _ in range(world)]
    exchange(plans, xs, [None] * world)
    for x in xs:
        same(x, one)


@pytest.mark.parametrize("world", [3, 8, 64])
def test_a_two_shot_sends_two_messages_in_all(world):
    n = 4096 * world
    plans = plans_for([(world, 4096)], "int8", world)
    network = exchange(plans, [torch.randn(n) for _ in plans], [None] * world)
    assert max(network.sent.values()) <= 2.06 * n * (world - 1) / world and min(network.sent.values()) > 2 * n * (world - 1) / world
    assert network.sent[1] == plans[1].sent and network.messages[0] == 2 * (world - 1)


@pytest.mark.parametrize("scope", ["global", "threshold"])
@pytest.mark.parametrize("world", [3, 4, 24])
def test_a_sparse_two_shot_sends_at_most_three_lists(world, scope):
    """Gradients whose entries crowd: the first tenth is 30 times as large. Shards become as short there as they must."""
    n = 400 * 1024
    plans = plans_for([(400, 1024)], f"topk:ratio=0.02,warmup=0,collective=sparse_two_shot,scope={scope}", world)
    own = plans[0].message(0, n, "own").nbytes
    size = torch.where(torch.arange(n) < n // 10, 30.0, 1.0)
    residuals = [torch.zeros(n) for _ in plans]
    for step in range(4):
        for plan in plans:
            plan.step = step
        network = exchange(plans, xs := [torch.randn(n) * size for _ in plans], residuals)
    assert max(network.sent.values()) <= 3 * own
    assert max(network.sent.values()) <= 1.6 * min(network.sent.values()), "balanced by what is in a shard, not by its length"
    assert 0 < int((xs[0] != 0).sum()) <= 1.02 * 0.02 * n + world


@pytest.mark.parametrize("nodes", [
    ((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)), ((0, 1, 2), (3,)), ((0, 1, 2), (3, 4)), ((0,), (1,), (2,)), ((0, 1, 2, 3),), ((0, 1, 2), (3, 4), (5,)), ((0, 1), (2, 3), (4, 5), (6, 7)),
], ids=str)
@pytest.mark.parametrize("spec", [
    "intra=none,inter=int4", "intra=none,inter=int8:ef=true", "intra=bf16:ef=true,inter=int4", "intra=none,inter=none",
    "intra=none,inter=topk:ratio=0.05,values=int8", "intra=none,inter=topk:ratio=0.05,collective=sparse_two_shot",
    "intra=none,inter=powersgd:rank=2,values=float32",
])
def test_nodes_of_any_size_lose_nothing(spec, nodes):
    plans = plans_for(SHAPES, spec, sum(map(len, nodes)), nodes=nodes)
    if spec == "intra=none,inter=none":
        assert plans[0].collective == "sum"
        return
    assert plans[0].collective == "hierarchical"
    for network in nothing_is_lost(plans):
        for plan in plans:
            assert network.sent[plan.rank] <= 1.02 * plan.sent + 4  # cut anew after it, perhaps


def test_between_nodes_travels_a_part_of_what_is_compressed():
    """Two nodes of two: a rank sends between them int4 of half of the bucket, where a flat exchange of float32 sends
    1 / 0.53 / 0.5 times as much over that link."""
    n = 256 * 1024
    plans = plans_for([(256, 1024)], "intra=none,inter=int4", 4, nodes=((0, 1), (2, 3)))
    network = exchange(plans, [torch.randn(n) for _ in plans], [torch.zeros(n) for _ in plans])
    between = sum(sent for (a, b), sent in network.pairs.items() if a // 2 != b // 2)
    within = sum(sent for (a, b), sent in network.pairs.items() if a // 2 == b // 2)
    message = plans[0].stretch(0, n, 0, 2, lambda part: part.compressor.between_nodes).message(0, n, "").nbytes
    assert between == pytest.approx(2 * message, rel=0.01)  # each pair of ranks: half of the bucket both ways
    assert within == pytest.approx(4 * 2 * 4 * n / 2, rel=0.01)
    dense = 2 * 2 * 4 * n / 2 * 2  # both nodes' sums, float32, by two_shot of all four ranks
    assert between < dense / (8 / 1.07)


def test_a_hierarchical_exchange_of_one_machine_is_exact():
    plans = plans_for([(64, 40)], "intra=none,inter=int4", 2, nodes=((0, 1),))
    xs = [torch.arange(2560.0), torch.arange(2560.0) * 3]
    exchange(plans, xs, [torch.zeros(2560)] * 2)
    for x in xs:
        same(x, torch.arange(2560.0) * 2)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_exchanges_that_travel_together_are_the_same(world):
    """Several buckets, each by another collective, in one batch: bit for bit what each does alone, in fewer messages."""
    specs = ["int4", "topk:ratio=0.05", "powersgd:rank=2", "bf16", "topk:ratio=0.05,collective=sparse_two_shot"]
    shapes = [[(64, 40), (7,)], [(50, 50)], [(60, 80), (9,)], [(3000, 1)], [(90, 70)]]

    def all_of_them(merge: bool):
        buckets = [plans_for(s, spec, world) for s, spec in zip(shapes, specs)]
        for number, plans in enumerate(buckets):
            for plan in plans:
                plan.number = number
        got, messages, held = [], 0, [{} for _ in range(world)]
        residuals = [[torch.zeros(plan.n) for plan in plans] for plans in buckets]
        for step in range(3):
            xs = [[torch.randn(plan.n, generator=torch.Generator().manual_seed(100 * step + plan.rank)) for plan in plans] for plans in buckets]
            network = Network()
            links = [SimulatedLink(network, r, tuple(range(world))) for r in range(world)]
            if merge:
                batches = [Batch(link, torch.device("cpu"), 0, kept, lambda failed: None) for link, kept in zip(links, held)]
                for plans, x, kept in zip(buckets, xs, residuals):
                    for r, plan in enumerate(plans):
                        plan.step = step
                        batches[r].add(plan.prepared, x[r], kept[r], lambda failure: None)
                wrong = run([batch.phases() for batch in batches])
                assert not any(wrong)
            else:
                for plans, x, kept in zip(buckets, xs, residuals):
                    for plan in plans:
                        plan.step = step
                    assert not any(run([p.prepared.begin(link, x_r, k) for p, link, x_r, k in zip(plans, links, x, kept)]))
            got += [x for bucket in xs for x in bucket]
            messages += network.messages[0]
        return got + [k for kept in residuals for k in kept], messages

    alone, many = all_of_them(False)
    merged, few = all_of_them(True)
    for a, b in zip(merged, alone, strict=True):
        same(a, b)
    assert few == 3 * 4 * (world - 1) <= many / 2  # as many phases as that with most has


@pytest.mark.parametrize("world", [2, 3])
def test_garbage_from_a_peer_is_decoded_within_bounds(world):
    """Random bytes in every row that arrives: no crash, no write outside, and every rank ends."""
    for spec in ("int4", "topk:ratio=0.05", "topk:ratio=0.05,collective=sparse_two_shot", "sign", "intra=none,inter=int4"):
        nodes = tuple((r,) for r in range(world)) if spec.startswith("intra") else ()
        plans = plans_for([(64, 40)], spec, world, nodes=nodes)
        network = Network()
        send = network.send
        network.send = lambda s, t, tag, row: send(s, t, tag, torch.randint(0, 256, row.shape, dtype=torch.uint8))
        guard = [torch.full((2560 + 64,), 7.0) for _ in plans]
        links = [SimulatedLink(network, r, tuple(range(world))) for r in range(world)]
        run([plan.prepared.begin(link, x[32:-32], torch.zeros(2560)) for plan, link, x in zip(plans, links, guard)])
        for x in guard:
            assert x[:32].eq(7).all() and x[-32:].eq(7).all(), spec
