"""A bucket that is exchanged in pieces: where it is cut, and that the pieces do what the whole would."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
from commopt import parse, plan as plans
from commopt.collectives import prepare, run
from commopt.collectives.phases import Pending
from commopt.collectives.run import Exchange, Runner
from commopt.hooks.bucket import Bucket
from commopt.plan import GRAIN, PIECES, Plan
from ranks import close, each_rank, same, same_everywhere, slow
from simulated import exchange, parameters, plans_for

SHAPES = [(700, 50), (9,), (64, 640), (1024,), (300, 77), (5000, 13)]  # small ones inside, no start at a multiple of anything
CUT = ["bf16:ef=true", "fp16:ef=true", "fp8:ef=true", "int8", "int8:ef=true", "int4", "int4:rotate=hadamard", "int2", "mxfp8:ef=true", "mxfp4", "sign",
       "natural:rounding=nearest", "vote"]  # with blocks of which a piece holds a whole number


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(plans, "PIECE", 1 << 10)


def plan_of(shapes, spec: str, world: int = 2, rules: dict | None = None, dtype=torch.float32, number: int = 3, device: str = "cpu") -> Plan:
    return Plan(number, parameters(*shapes), dtype, torch.device(device), parse(spec), {k: parse(v) for k, v in (rules or {}).items()}, 0, world)


# --- where it is cut ---


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("spec", sorted(commopt.compressors()))
def test_pieces_lie_end_to_end(spec, world, short):
    """Nothing twice, nothing left out: elements, what travels exactly, parameters; each with a number of its own."""
    plan = plan_of(SHAPES, spec, world)
    pieces = plan.pieces(True)
    assert pieces[0].start == 0 and sum(piece.n for piece in pieces) == plan.n and len(pieces) <= PIECES
    assert [piece.start for piece in pieces[1:]] == list(itertools.accumulate(piece.n for piece in pieces[:-1]))
    assert all(piece.start % GRAIN == 0 for piece in pieces)
    assert torch.equal(torch.cat([piece.exact + piece.start for piece in pieces]), plan.exact)
    covered = sorted((part.start + piece.start, part.stop + piece.start) for piece in pieces for part in piece.parts)
    assert covered[0][0] == plan.parts[0].start and covered[-1][1] == plan.parts[-1].stop
    assert sum(stop - start for start, stop in covered) == sum(part.stop - part.start for part in plan.parts)
    assert dict.fromkeys(p.name for piece in pieces for p in piece.parameters) == dict.fromkeys(p.name for p in plan.parameters)
    others = {plan_of([(8,)], "none", number=number).exchange for number in range(6) if number != plan.number}
    assert len({piece.exchange for piece in pieces} - others) == len(pieces)


def test_what_is_cut():
    large, counts = [(3000, 1000)], {}
    for spec in ("int8", "bf16", "none", "topk:ratio=0.3", "powersgd:rank=4", "dct", "intra=none,inter=int4", "int8:collective=integer_sum"):
        counts[spec] = len(plan_of(large, spec).pieces(True))
    assert counts == {"int8": 8, "bf16": 8, "none": 8, "topk:ratio=0.3": 1, "powersgd:rank=4": 1, "dct": 1, "intra=none,inter=int4": 1,
                      "int8:collective=integer_sum": 5}, counts  # of 16 bits each way: 3 MB to each
    assert len(plan_of(large, "none").pieces(False)) == 1  # a plain sum equals plain DDP's on any number of ranks
    assert len(plan_of([(1000, 500)], "int8").pieces(False)) == 1  # 0.5 MB: two pieces would be smaller than is worth it
    assert len(plan_of([(1000, 800)], "int8").pieces(False)) == 3
    assert len(plan_of([(1000, 800)], "int8", world=4).pieces(False)) == 1  # to each of them there goes a quarter
    assert len(plan_of(large, "int8", rules={"p0": "topk:ratio=0.5"}).pieces(True)) == 1
    assert len(plan_of(large, "int8", dtype=torch.float64).pieces(True)) == 1
    assert len(plan_of([(0,)], "int8").pieces(True)) == 1


def test_awaited_in_the_pieces_that_parameters_lie_in(short):
    """p0 fills the first pieces and ends in one where p1 to p3 lie, of which the last goes on to the next."""
    plan = plan_of([(80, GRAIN), (3, 10), (0, 2), (64, GRAIN)], "int8")
    bucket, x = Bucket(plan, False), torch.arange(float(plan.n))
    assert len(bucket.pieces) == 8

    class Traffic:
        travels_as = {number: 100 + number for number in bucket.numbers}

    tensors = [torch.empty(p.shape) for p in plan.parameters]
    runs = bucket.awaited(x, tensors, Traffic, [f"future {i}" for i in range(8)])
    size = bucket.pieces[0].plan.n
    last = (80 * GRAIN - 1) // size
    everything = [100 + number for number in bucket.numbers]
    of = {id(p): (numbers, futures) for numbers, some, _, futures in runs for p in some}
    assert of[id(tensors[0])][0] == everything[: last + 1]
    assert of[id(tensors[1])][0] == [everything[last]] and of[id(tensors[1])][1] == [f"future {last}"]
    assert of[id(tensors[3])][0] == everything[last:]
    for _, some, gradients, _ in runs:
        for p, g in zip(some, gradients):
            assert g.shape == p.shape and (not g.numel() or x[int(g.view(-1)[0])] == g.view(-1)[0])


# --- what they do ---


def in_pieces(bucket: list[Plan], xs: list, residuals: list, step: int) -> None:
    """Averages the xs in place, a piece after the other."""
    for some in zip(*(plan.pieces(True) for plan in bucket)):
        for piece in some:
            piece.prepared, piece.step = prepare(piece), step
        span = some[0].span
        exchange(list(some), [x[span] for x in xs], [None if r is None else r[..., span] for r in residuals])


def start(spec: str, world: int, dtype=torch.float32) -> tuple[list[Plan], list, list]:
    bucket = plans_for(SHAPES, spec, world, dtype)
    xs = [torch.randn(bucket[0].n, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world)]
    return bucket, xs, [plan.fresh_residual() for plan in bucket]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", CUT)
def test_between_two_ranks_pieces_have_the_bits_of_the_whole(spec, dtype, short):
    """Where it does not matter where a block begins: what is cut is all one part that begins where the bucket does."""
    (bucket, xs, kept), (_, pieced, kept_too) = start(spec, 2, dtype), start(spec, 2, dtype)
    assert len(bucket[0].pieces(True)) > 3
    for step in range(3):
        for plan in bucket:
            plan.step = step
        exchange(bucket, xs, kept)
        in_pieces(bucket, pieced, kept_too, step)
        for r in range(2):
            same(pieced[r], xs[r], f"rank {r}, step {step}")
            if kept[r] is not None:
                same(kept_too[r], kept[r], f"kept by rank {r}, step {step}")


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("spec", ["int8:ef=true", "int4:block=24", "int4:rounding=stochastic", "nvfp4", "sign", "mxfp4", "randomk:ratio=0.2", "int2:collective=integer_sum", "none"])
def test_nothing_is_lost_between_pieces(spec, world, short):
    bucket, xs, kept = start(spec, world)
    assert len(bucket[0].pieces(True)) > 1
    for step in range(3):
        had = sum(x.double() for x in xs) + sum(r.double() for r in kept if r is not None)
        in_pieces(bucket, xs, kept, step)
        for x in xs[1:]:
            same(x, xs[0], f"step {step}")
        close(world * xs[0].double() + sum(r.double() for r in kept if r is not None), had, 3e-7 * world * float(had.abs().max()), f"step {step}")


class Wide(nn.Module):
    """2 MB of gradient; the middle of a bucket lies in the second layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 700), nn.Tanh(), nn.Linear(700, 600), nn.Tanh(), nn.Linear(600, 50))

    def forward(self, x):
        return self.layers(x)


def loss_of(ddp: nn.Module, rank: int, step: int) -> torch.Tensor:
    return ddp(torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))).square().mean()


def trained(rank: int, spec: str, schedule: str, steps: int = 4, look: bool = False) -> tuple[list, commopt.State]:
    torch.manual_seed(1)
    ddp = DDP(Wide(), bucket_cap_mb=25)
    handle = commopt.attach(ddp, spec, schedule=schedule)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        if look:
            nn.utils.clip_grad_norm_(ddp.parameters(), 0.1)
        optimizer.step()
    handle.flush()
    return [p.detach().clone() for p in ddp.parameters()], handle


@pytest.mark.parametrize("spec", ["int8", "int4", "none"])
@each_rank(2, 3, seconds=90)
def test_all_schedules_with_pieces_train_to_the_same_bits(rank, world, spec):
    """At two ranks; at three all ranks hold the same, and so do schedules that sum the first step, an exact one, in the same order."""
    slow()
    plans.PIECE = 1 << 14
    for look in (False, True):
        want, handle = trained(rank, spec, "plain", look=look)
        assert (handle.plan[0]["pieces"] > 1) == (spec != "none"), handle.plan
        for schedule in ("pipelined", "with_optimizer", "priority", "decoupled"):
            got, handle = trained(rank, spec, schedule, look=look)
            planned = schedule in ("priority", "decoupled")
            assert (handle.plan[0]["pieces"] > 1) == (planned or spec != "none"), handle.plan
            assert (handle.stats()["deferred_steps"] > 0) == (not look and schedule != "pipelined"), (schedule, handle.stats())
            same_everywhere(got, schedule)
            if world == 2 or not planned:
                for p, q in zip(got, want):
                    same(p, q, f"{spec}, {schedule}, looked {look}")
            assert handle.stats()["bytes_wire"] > 0


@each_rank(2)
def test_a_parameter_is_there_when_its_pieces_are(rank, world):
    """In mid-flight the first use of one waits for its own pieces only. Pieces of a slow link come one after the other."""
    slow(0.05)
    plans.PIECE = 1 << 14
    torch.manual_seed(1)
    ddp = DDP(Wide(), bucket_cap_mb=25)
    handle = commopt.attach(ddp, "int8", schedule="priority")
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        optimizer.step()
    parameters = list(ddp.parameters())
    order = [p.name for p in handle._buckets[next(iter(handle._buckets))].plan.parameters]
    names = dict(ddp.module.named_parameters())
    first, last = names[order[0]], names[order[-1]]
    assert type(last) is not nn.Parameter
    float(first.sum())
    assert type(first) is nn.Parameter and type(last) is not nn.Parameter, "waited for more than its own"
    handle.flush()
    assert all(type(p) is nn.Parameter for p in parameters)


@pytest.mark.parametrize("schedule", ["pipelined", "decoupled"])
@each_rank(2, 3)
def test_a_piece_that_fails_on_one_rank_is_an_error_on_all(rank, world, schedule):
    slow()
    plans.PIECE = 1 << 14
    torch.manual_seed(1)
    ddp = DDP(Wide(), bucket_cap_mb=25)
    handle = commopt.attach(ddp, "int8", schedule=schedule)
    for step in range(2):
        loss_of(ddp, rank, step).backward()
    handle.flush()
    if rank == 1:
        broken = next(iter(handle._buckets.values())).pieces[3]
        begin = broken.begin
        broken.begin = lambda link, x, residual: begin(link, x[:-1], residual)
    with pytest.raises(RuntimeError, match="rank 1 failed .*quant_encode"):
        for step in range(2, 5):
            loss_of(ddp, rank, step).backward()
            handle.flush()


# --- on a device: one stream, on which an exchange goes on when the next has begun ---


class InOrder:
    """Stands for a stream beside the one that computes."""

    def __bool__(self) -> bool:
        return True

    def beside(self):
        return contextlib.nullcontext()


def on_a_stream() -> Runner:
    runner = Runner(torch.device("cpu"))
    runner.stream = InOrder()
    return runner


def test_what_a_stream_is_given_in_which_order():
    """One is encoded before the one ahead of it is waited for and decoded; nothing is left when no more follows."""
    seen, ends = [], {}

    class Row(Pending):
        def __init__(self, what: str):
            super().__init__()
            self.what = what

        def wait(self):
            seen.append(f"wait {self.what}")
            return Failure("lost") if self.what == "2b" else None

    class Failure(Exception):
        pass

    def phases(number: int):
        seen.append(f"encode {number}")
        failed = yield Row(f"{number}a")
        seen.append(f"resum {number}")
        failed = (yield Row(f"{number}b")) or failed
        if failed:
            raise failed
        seen.append(f"decode {number}")

    runner = on_a_stream()
    for number in (1, 2, 3):
        runner.exchange(Exchange(number, 2, phases(number), lambda failure, number=number: ends.__setitem__(number, failure)))
    assert seen == ["encode 1", "encode 2", "wait 1a", "resum 1", "encode 3", "wait 2a", "resum 2", "wait 1b", "decode 1"]
    assert ends == {1: None}
    del seen[:]
    runner.close()
    assert seen == ["wait 3a", "resum 3", "wait 2b", "wait 3b", "decode 3"]
    assert ends[1] is None and isinstance(ends[2], Failure) and ends[3] is None
    runner.close()
    runner.finish()


@pytest.mark.parametrize("spec", ["int4", "topk:ratio=0.05", "powersgd:rank=2", "int8:collective=integer_sum", "none"])
@each_rank(2, 3)
def test_trains_on_a_stream_to_the_same_bits(rank, world, spec):
    plans.PIECE = 1 << 14
    want, _ = trained(rank, spec, "pipelined")
    run.Stream.__init__ = lambda self, device: None
    run.Stream.__bool__ = lambda self: True
    run.Stream.beside = InOrder.beside
    for schedule in ("plain", "pipelined", "with_optimizer", "priority"):
        got, handle = trained(rank, spec, schedule)
        for runner in handle._traffic.runners:
            assert not (runner._work if schedule == "priority" else runner._stages)._threads
        for p, q in zip(got, want):
            if world == 2 or schedule != "priority":
                same(p, q, f"{spec}, {schedule}")
        same_everywhere(got, f"{spec}, {schedule}")
    values = [torch.randn(3000, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    mean = commopt.average(values[rank].clone(), "none")
    close(mean, sum(v.double() for v in values) / world, 1e-6)
