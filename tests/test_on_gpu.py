"""On a GPU: what the kernels compute there, and a training over NCCL and over gloo. Skipped where torch sees none."""

import importlib
import itertools

import op_cases
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
from commopt import backends
from commopt.backends import reference
from commopt.collectives.run import Stream
from commopt.compressors import overview
from ranks import Given, Mixed, batch, conserved, each_rank, run, same, same_everywhere

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

OPS = ("dense", "half", "float", "quant", "shared", "ternary", "sign", "hadamard", "topk", "threshold", "blocktopk", "randomk")
FIRST = {"dense": "dense_encode", "half": "half_encode", "float": "float_encode", "quant": "quant_encode", "shared": "quant_encode_shared", "ternary": "ternary_encode",
         "sign": "sign_encode", "hadamard": "hadamard_encode", "topk": "topk_encode", "threshold": "threshold_encode", "blocktopk": "blocktopk_encode", "randomk": "randomk_encode"}
SPECS = [row["spec"] for row in overview()]


def kernels_of(name: str, op: str):
    if not backends.built(name):
        pytest.skip(f"{name} is not built")
    module = importlib.import_module(f"commopt.backends.{name}")
    if not hasattr(module, FIRST[op]):
        pytest.skip(f"{name} has no {op}")
    return module


def compare(kernels, op: str, n: int, kind: str, dtype: torch.dtype, **options) -> None:
    wanted = op_cases.run(reference, op, n, kind, dtype, **options)
    got = {key: value.cpu() for key, value in op_cases.run(kernels, op, n, kind, dtype, device="cuda", **options).items()}
    wrong = op_cases.difference(got, wanted)
    assert not wrong, f"{op} n={n} {kind} {dtype} {options}: {wrong}"


@pytest.mark.parametrize("dtype", op_cases.DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
def test_bits_of_the_reference(backend, op, dtype):
    """All kinds of values and all options at awkward sizes, in turns; of Triton, which compiles each that is new, every eighth."""
    kernels, turn = kernels_of(backend, op), itertools.count()
    for n in (*op_cases.SIZES, *op_cases.LARGE):
        for i, kind in enumerate(op_cases.VALUES):
            for j, options in enumerate(op_cases.variants(op, n)):
                if (i + j) % (2 if n < 1000 else 6):
                    continue
                t = next(turn)
                if op_cases.DTYPES[t % 3] == dtype and (backend != "triton" or t // 3 % 8 == 0):
                    compare(kernels, op, n, kind, dtype, residual=t % 5 > 0, loss_scale=(1.0, 1024.0, 3.0)[t // 3 % 3], offset=t // 9 % 4, **options)


@pytest.mark.parametrize("op, options", [
    ("quant", {"bits": 8, "block": 256, "stochastic": True}), ("topk", {"k": 67_109}), ("sign", {"block": 1024}), ("threshold", {"k": 67_109}),
    ("blocktopk", {"k": 10}), ("randomk", {"k": 67_109, "scaled": True}),
])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_bits_of_the_reference_over_many_blocks(backend, op, options):
    """Top-k and threshold are called again and go on from what they have left."""
    compare(kernels_of(backend, op), op, 6_710_887, "heavy", torch.float32, rows=2, **options)


# --- a training ---


def loss_of(model: torch.nn.Module, rank: int, step: int) -> torch.Tensor:
    tokens, targets = (t.cuda() for t in batch(rank, step))
    return torch.nn.functional.cross_entropy(model(tokens), targets)


def on_the_gpu(backend: str, spec: str, schedule: str = "pipelined", net: torch.nn.Module | None = None) -> tuple[DDP, commopt.State]:
    torch.cuda.set_device(0)
    torch.manual_seed(5)
    group = dist.new_group(backend=backend)
    ddp = DDP((net or Mixed()).cuda(), bucket_cap_mb=0.01, process_group=group)
    return ddp, commopt.attach(ddp, spec, schedule=schedule, start_step=0)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend, world", [("nccl", 1), ("gloo", 2)])
def test_trains(backend, world, spec):
    """NCCL takes one rank per device; two ranks share this one over gloo."""
    run(world, _trains, seconds=120, backend=backend, spec=spec)


def _trains(rank: int, world: int, backend: str, spec: str) -> None:
    ddp, handle = on_the_gpu(backend, spec)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    first = last = 0.0
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(ddp, rank, step % 2)
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
    handle.flush()
    assert all(bool(p.isfinite().all()) for p in ddp.parameters())
    same_everywhere([p.detach().cpu() for p in ddp.parameters()], spec)
    assert handle.stats()["nonfinite_steps"] == 0 and last < 2 * first


@pytest.mark.parametrize("spec", ["int4", "topk:ratio=0.05", "sign", "powersgd:rank=2"])
@each_rank(2, seconds=120)
def test_nothing_is_lost(rank, world, spec):
    """Sent and kept add up to what there was, as on a CPU."""
    ddp, handle = on_the_gpu("gloo", spec, net=Given((100, 90), (7,), (64, 64)))
    named, before = [(n, p.cpu()) for n, p in ddp.module.named_parameters()], {}
    for step in range(4):
        ddp.zero_grad()
        given = ddp.module.random(rank, step)
        means = [sum(g) / world for g in zip(*(ddp.module.random(r, step) for r in range(world)))]
        ddp([g.cuda() for g in given]).backward()
        for (_, held), p in zip(named, ddp.module.parameters()):
            held.grad = p.grad.cpu()
        before = conserved(handle, named, [m.cpu() for m in means], before, f"step {step}")


@pytest.mark.parametrize("schedule", ["pipelined", "decoupled"])
@pytest.mark.parametrize("backend, world", [("nccl", 1), ("gloo", 2)])
def test_steps_that_are_not_finite_are_counted(backend, world, schedule):
    run(world, _counted, seconds=120, backend=backend, schedule=schedule)


def _counted(rank: int, world: int, backend: str, schedule: str) -> None:
    ddp, handle = on_the_gpu(backend, "int8", schedule, net=Given((100, 90), (7,), (64, 64)))
    for step in range(20):
        ddp.zero_grad()
        given = ddp.module.random(rank, step)
        if step % 5 == 3 and rank == world - 1:
            given[step % 3].view(-1)[5] = torch.inf
        ddp([g.cuda() for g in given]).backward()
    handle.flush()
    assert handle.stats()["nonfinite_steps"] == 4


@pytest.mark.parametrize("schedule", ["plain", "with_optimizer", "priority", "decoupled"])
@pytest.mark.parametrize("backend, world", [("nccl", 1), ("gloo", 2)])
def test_schedules_have_the_same_bits(backend, world, schedule):
    run(world, _schedules, seconds=120, backend=backend, schedule=schedule)


def _schedules(rank: int, world: int, backend: str, schedule: str) -> None:
    trained = []
    for name in ("pipelined", schedule):
        ddp, handle = on_the_gpu(backend, "int8", name)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        for step in range(12):
            optimizer.zero_grad()
            loss_of(ddp, rank, step).backward()
            optimizer.step()
        handle.flush()
        trained.append([p.detach().cpu() for p in ddp.parameters()])
    for p, q in zip(*trained):
        same(p, q, schedule)


def test_nothing_waits_for_the_device():
    """In the steady state neither the hook nor backward has the host wait."""
    for spec in ("int8", "int4", "topk:ratio=0.05", "sign"):
        run(1, _waits, seconds=120, spec=spec)


def _waits(rank: int, world: int, spec: str) -> None:
    ddp, handle = on_the_gpu("nccl", spec, net=Given((512, 300), (7,)))
    given = [g.cuda() for g in ddp.module.random(rank, 0)]
    for step in range(12):
        if step == 8:
            torch.cuda.set_sync_debug_mode("error")
        ddp(given).backward()
    torch.cuda.set_sync_debug_mode("default")


def test_a_stream_of_its_own():
    stream = Stream(torch.device("cuda"))
    assert stream
    before = torch.cuda.current_stream()
    with stream.beside():
        assert torch.cuda.current_stream() != before
    assert torch.cuda.current_stream() == before
