"""Steps of DDP modules that differ in how they communicate, verified first and then timed in turns.

Every candidate has a DDP module of its own over the same parameters. They take turns; a turn is one step under no_sync and
one step, each begun by all ranks together, after WARMUP steps of each: what is shown is the steady state, past any warm-up
that a spec prescribes.

    step      median over the turns of the slowest rank's time for a step: forward and backward
    added     median over the turns of that less the time of the step under no_sync: encode, transfer and decode
    of plain  added, as a fraction of plain DDP's
    sent      bytes that a rank hands to the network in a step, by the candidate's own account
    counted   bytes that leave the interface in a step, protocol headers included (with --emulate)
    floor     sent / rate (with --emulate): an exchange that overlaps with backward may add less

First every candidate proves itself: all ranks hold the same bits, plain DDP's for `none` on 2 and 4 ranks; without error
feedback the mean is near the exact one, and with it the mean that was sent and the mean that was kept add up to it.
"""

import contextlib
import statistics
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commopt
from commopt.tuning.probe import timed

from . import launch, link
from .candidates import bytes_per_step, rough, wrap

WARMUP = 20  # steps: DDP rebuilds its buckets after the first, PowerSGD begins with the third, residuals need some to grow


class Work(NamedTuple):
    """What a step computes. model(): the same on all ranks after the same torch.manual_seed. loss(model, batch).
    batch(rank, number): another one for each."""

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    batch: Callable[[int, int], Tensor]


def link_of(world: int, emulate: str | None, machine: int = 1) -> link.Link | None:
    """The emulated network of a bench; None is the loopback."""
    return link.Link(world, emulate, machine) if emulate else None


def compare(module: str, arguments: dict[str, Any], parameters: int, network: link.Link | None) -> dict[str, Any]:
    """Has `module`, whose worker calls `serve`, measure arguments["specs"], of which the first is plain, "rounds" times on
    the network. arguments["timeout"]: seconds, None is some times what plain DDP would take for as many parameters."""
    specs, rounds = arguments["specs"], arguments["rounds"]
    rate = link.bits_per_second(network.emulate) if network else None
    timeout = arguments["timeout"] or time_limit(len(specs) * (rounds + 2), parameters, rate)
    result = launch.run(module, arguments, arguments["world"], timeout=timeout, link=network)
    plain = result["rows"][0]["added_ms"]
    for row in result["rows"]:
        row["of_plain"] = row["added_ms"] / plain if plain > 0 else None
        row["floor_ms"] = 8e3 * row["sent"] / rate if rate else None
    return result


def time_limit(steps: int, parameters: int, rate: float | None) -> float:
    """Seconds for as many steps on a link of `rate` bits per second, if each took as long as with plain DDP."""
    return 120 + steps * (2.0 + (2 * 32 * parameters / rate if rate else 0.0))


def serve(work: Work, arguments: dict[str, Any]) -> None:
    """In a worker: measures, and hands over what `compare` returns."""
    dist.init_process_group("gloo")
    rate = arguments["rate"]
    with link.unshaped(rate) if rate else contextlib.nullcontext():
        candidates = prepare(work, arguments["specs"], arguments.get("bucket_mb", 25.0))
        dist.barrier()
    dist.barrier()
    measure(candidates, arguments["rounds"], (lambda: link.counters()[0]) if rate else (lambda: 0))
    rows = [row(c, bool(rate)) for c in candidates]
    launch.finish({"what": what_was_measured(candidates[0].ddp, arguments["rounds"], rate), "rows": rows})
    dist.barrier()
    dist.destroy_process_group()


def what_was_measured(ddp: DistributedDataParallel, rounds: int, rate: str | None) -> dict[str, Any]:
    """And with what."""
    return {"parameters": sum(p.numel() for p in ddp.parameters()), "buckets": buckets(ddp), "world": dist.get_world_size(),
            "threads": torch.get_num_threads(), "rounds": rounds, "link": rate or "loopback", "kernels": kernels_in_use(),
            "torch": torch.__version__, "commopt": commopt.__version__}


def circumstances(what: dict[str, Any]) -> str:
    """Under a table: what its numbers depend on."""
    return (f"{what['parameters'] / 1e6:.1f}M parameters in buckets of {', '.join(f'{b / 2**20:.1f}' for b in what['buckets'])} MiB, "
            f"{what['world']} ranks of {what['threads']} threads, {what['rounds']} rounds, link {what['link']}, kernels {what['kernels']}, "
            f"torch {what['torch']}, commopt {what['commopt']}")


def cell(value: float | None, width: int, digits: int) -> str:
    """A number in a column of a table, - where there is none."""
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


@dataclass
class Candidate:
    """One row of the table: a DDP module with its hook, and what was measured of it on this rank."""

    spec: str
    work: Work
    ddp: DistributedDataParallel
    handle: commopt.State | None = None
    error: float = 0.0
    step: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    batches: int = 0
    counted: list[int] = field(default_factory=list)

    @property
    def compressor(self) -> commopt.Compressor | None:
        return commopt.parse(self.spec) if self.handle else None

    def backward(self, x: Tensor) -> None:
        self.ddp.zero_grad()
        self.work.loss(self.ddp, x).backward()

    def next_batch(self) -> Tensor:
        """The same sequence for every candidate, another one on every rank."""
        self.batches += 1
        return self.work.batch(dist.get_rank(), self.batches)

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.ddp.parameters()])

    def sent(self) -> float:
        """Bytes per step that this rank hands to the network, for what is not ours those of a ring all-reduce."""
        return bytes_per_step(self.spec, self.ddp, self.handle)


def candidate(spec: str, work: Work, shared: list[Tensor], bucket_mb: float = 25.0) -> Candidate:
    """`shared`: the parameters of the first candidate, which the others use too; a step does not change them."""
    torch.manual_seed(0)
    model = work.model()
    for mine, other in zip(model.parameters(), shared):
        mine.data = other.data
    ddp, handle = wrap(spec, model, steady=True, bucket_mb=bucket_mb)
    return Candidate(spec, work, ddp, handle)


def exact_mean(c: Candidate) -> Tensor:
    """The mean of all ranks' gradients, computed here without communication, in float64."""
    total: Tensor | float = 0.0
    with c.ddp.no_sync():
        for rank in range(dist.get_world_size()):
            c.backward(c.work.batch(rank, 0))
            total = total + c.gradient().double()
    return total / dist.get_world_size()


def check_same(spec: str, values: Tensor, what: str = "gradients") -> None:
    """RuntimeError unless all ranks hold the same bits."""
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, zlib.crc32(values.numpy()))
    if len(set(digests)) > 1:
        raise RuntimeError(f"{spec}: the ranks hold different {what}")


def verify(c: Candidate, exact: Tensor, plain: Tensor) -> None:
    """RuntimeError unless the step that was just made has averaged the gradients as the candidate promises."""
    mean = c.gradient()
    check_same(c.spec, mean)
    distance = lambda a: float((a - exact).norm() / exact.norm())
    c.error = distance(mean)
    if rough(c.spec):
        return
    if c.compressor is not None and c.compressor.ef:
        limit, what = 1e-5, "what was sent and what was kept"
        kept = c.handle.state_dict()["residual"]
        off = distance(mean + torch.cat([kept[n].flatten() if n in kept else torch.zeros(p.numel()) for n, p in c.ddp.module.named_parameters()]))
    else:
        bytes_per_value = 2 if c.handle is None else commopt.wire_bytes(c.spec, 1 << 20) / (1 << 20)
        limit, what, off = (1e-6 if c.spec in ("plain", "none") else 0.02 if bytes_per_value > 1 else 0.3), "the mean", c.error
    if not off <= limit:
        raise RuntimeError(f"{c.spec}: {what} should be the exact mean within {limit:.0e} of its norm, but is {off:.1e} away")
    if c.spec == "none" and dist.get_world_size() in (2, 4) and not torch.equal(mean, plain):
        raise RuntimeError("none: the mean differs from plain DDP's")


def prepare(work: Work, specs: list[str], bucket_mb: float) -> list[Candidate]:
    """The candidates, verified and warm."""
    candidates: list[Candidate] = []
    shared: list[Tensor] = []
    exact = plain = torch.empty(0)
    for spec in specs:
        launch.progress(f"{spec}: verifying")
        c = candidate(spec, work, shared, bucket_mb)
        if not candidates:
            shared, exact = list(c.ddp.parameters()), exact_mean(c)
        # Ours compresses the second step first, with residuals of zero, and PyTorch's PowerSGD the third.
        for _ in range(3 if rough(spec) else 2):
            c.backward(work.batch(dist.get_rank(), 0))
        if not candidates:
            plain = c.gradient()
        verify(c, exact, plain)
        for _ in range(WARMUP if c.compressor is not None and c.compressor.ef else 2):
            c.backward(c.next_batch())
        c.ddp.zero_grad()
        candidates.append(c)
    return candidates


def measure(candidates: list[Candidate], rounds: int, count: Callable[[], int]) -> None:
    for c in candidates:
        c.backward(c.next_batch())  # uses up what the network lets through at once
        if c.handle:
            c.handle.reset_stats()
    for turn in range(rounds):
        for c in candidates:
            launch.progress(f"round {turn + 1}/{rounds}: {c.spec}")
            x = c.next_batch()
            with c.ddp.no_sync():
                c.alone.append(timed(lambda: c.backward(x)))
            before = count()
            c.step.append(timed(lambda: c.backward(x)))
            dist.barrier()  # what the others wait for has left this rank's socket
            c.counted.append(count() - before)
            c.ddp.zero_grad()


def row(c: Candidate, emulated: bool) -> dict:
    """What all ranks together found of a candidate. Of bytes, those of the rank that sends most."""
    mine = torch.tensor([c.step, c.alone, c.counted, [c.sent()] * len(c.step)], dtype=torch.float64)
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    step, alone, counted, sent = mine.tolist()
    stats = c.handle.stats() if c.handle else {}
    return {
        "spec": c.spec,
        "step_ms": 1e3 * statistics.median(step),
        "added_ms": 1e3 * statistics.median(s - a for s, a in zip(step, alone)),
        "sent": sent[0],
        "counted": statistics.median(counted) if emulated else None,
        "error": c.error,
        "stats": {k: stats[k] for k in stats if k.endswith("_ms")},
        "times_ms": [1e3 * s for s in step],
        "no_sync_ms": [1e3 * a for a in alone],
    }


def kernels_in_use(device: str = "cpu") -> str:
    """What serves the ops on this kind of device, e.g. "cpu (avx512)"."""
    from commopt import backends

    names = sorted(set(backends.owners(device).values()))
    if "cpu" in names:
        from commopt import _C

        names[names.index("cpu")] = f"cpu ({_C.cpu.isa()})"
    return " and ".join(names)


def buckets(ddp: DistributedDataParallel) -> list[int]:
    """Sizes of the buckets as DDP rebuilt them, in bytes."""
    sizes = ddp._get_ddp_logging_data().get("rebuilt_bucket_sizes") or ""
    return [int(size) for size in sizes.split(",") if size.strip()]
