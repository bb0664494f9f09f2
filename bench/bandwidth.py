"""What communication costs in time: a DDP step over a slow link, with each spec, beside plain DDP and PyTorch's hooks.

    python -m commopt bench bandwidth --spec plain,int8,topk:ratio=0.01 --emulate 1gbit

A step is the forward and backward pass of a stack of linear layers on a small batch, another one each time. Every candidate
has a DDP module of its own over the same parameters. They take turns; a turn is one step under no_sync and one step, each
begun by all ranks together, after WARMUP steps of each: what is shown is the steady state, past any warm-up that a spec prescribes.

    step      median over the turns of the slowest rank's time for a step
    added     median over the turns of that less the time of the step under no_sync: encode, transfer and decode
    of plain  added, as a fraction of plain DDP's
    sent      bytes that a rank hands to the network in a step, by the candidate's own account
    counted   bytes that leave the interface in a step, protocol headers included (with --emulate)
    floor     sent / rate (with --emulate): an exchange that overlaps with backward may add less

First every candidate proves itself: all ranks hold the same bits, plain DDP's for `none` on 2 and 4 ranks; without error
feedback the mean is near the exact one, and with it the mean that was sent and the mean that was kept add up to it.
"""

import argparse
import contextlib
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commopt

from . import launch, link
from .candidates import EXTERNAL, POWERSGD, bytes_per_step, check, wrap

BATCH = 8  # rows of input: few, so that a step is mostly communication
WARMUP = 20  # steps: DDP rebuilds its buckets after the first, PowerSGD begins with the third, residuals need some to grow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", default="plain,torch:fp16,torch:powersgd1,none,int8,topk:ratio=0.01",
                        help=f"specs, separated by blanks or by commas before a name; beside ours: {', '.join(EXTERNAL)}; plain is always run")
    parser.add_argument("--emulate", metavar="RATE", help="over a link shaped to RATE per rank, such as 1gbit; needs root. Default: the loopback")
    parser.add_argument("--world", type=int, default=2, help="number of ranks")
    parser.add_argument("--size", type=_count, default=25_000_000, help="number of parameters, about; 25M")
    parser.add_argument("--width", type=int, default=1280, help="of a layer; 1280 makes four layers one bucket of 25 MiB")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every candidate")
    parser.add_argument("--timeout", type=float, help="seconds for everything; default: what plain DDP would take, and some more")


def main(args: argparse.Namespace) -> tuple[dict, str]:
    """The result, and the table that shows it."""
    specs = list(dict.fromkeys(["plain", *launch.split_specs(args.spec)]))
    check(specs)
    if args.world < 2 or args.rounds < 1 or args.size < 4096 or args.width < 64:
        raise ValueError(f"a bench needs at least 2 ranks, 1 round, 4096 parameters and layers 64 wide, got --world {args.world} "
                         f"--rounds {args.rounds} --size {args.size} --width {args.width}")
    network = link.Link(args.world, args.emulate) if args.emulate else None
    rate = link.bits_per_second(args.emulate) if args.emulate else None
    longest = 2.0 + (2 * 32 * args.size / rate if rate else 0.0)  # of one step, in seconds
    timeout = args.timeout or 120 + longest * len(specs) * (args.rounds + 2)
    arguments = {"specs": specs, "size": args.size, "width": args.width, "rounds": args.rounds, "rate": args.emulate}
    result = launch.run("commopt.bench.bandwidth", arguments, args.world, timeout=timeout, link=network)
    plain = result["rows"][0]["added_ms"]
    for row in result["rows"]:
        row["of_plain"] = row["added_ms"] / plain if plain > 0 else None
        row["floor_ms"] = 8e3 * row["sent"] / rate if rate else None
    return result, table(result)


def table(result: dict) -> str:
    width = max(len(row["spec"]) for row in result["rows"]) + 1
    lines = [f"{'spec':{width}}{'step ms':>9}{'added ms':>10}{'of plain':>10}{'floor ms':>10}{'sent MB':>9}{'counted MB':>12}"
             f"{'encode':>9}{'comm':>9}{'decode':>9}{'exposed ms':>12}{'error':>10}"]
    for row in result["rows"]:
        stats = "".join(_cell(row["stats"].get(f"{key}_ms"), w, 1) for key, w in (("encode", 9), ("comm", 9), ("decode", 9), ("exposed", 12)))
        lines.append(f"{row['spec']:{width}}{row['step_ms']:>9.1f}{row['added_ms']:>10.1f}" + _cell(row["of_plain"], 10, 3) + _cell(row["floor_ms"], 10, 1)
                     + _cell(row["sent"] / 1e6, 9, 3) + _cell(row["counted"] and row["counted"] / 1e6, 12, 3) + stats + f"{row['error']:>10.1e}")
    what = result["what"]
    return "\n".join(lines + [f"{what['parameters'] / 1e6:.1f}M parameters in buckets of {', '.join(f'{b / 2**20:.1f}' for b in what['buckets'])} MiB, "
                              f"{what['world']} ranks of {what['threads']} threads, {what['rounds']} rounds, link {what['link']}, kernels {what['kernels']}, "
                              f"torch {what['torch']}, commopt {what['commopt']}"])


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def _count(text: str) -> int:
    """"25M" -> 25000000."""
    unit = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].upper())
    return int(float(text[:-1]) * unit) if unit else int(text)


class Stack(nn.Module):
    """Linear layers with tanh and a path around each, so that gradients have one scale at any depth."""

    def __init__(self, size: int, width: int):
        super().__init__()
        width = min(width, max(64, int((size / 8) ** 0.5)))  # a small model has eight layers too
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(max(1, round(size / (width * width + width)))))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.3 * torch.tanh(layer(x))
        return x.square().mean()


@dataclass
class Candidate:
    """One row of the table: a DDP module with its hook, and what was measured of it on this rank."""

    spec: str
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
        self.ddp(x).backward()

    def next_batch(self) -> Tensor:
        """The same sequence for every candidate, another one on every rank."""
        self.batches += 1
        return batch(dist.get_rank(), self.ddp, self.batches)

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.ddp.parameters()])

    def sent(self) -> float:
        """Bytes per step that this rank hands to the network, for what is not ours those of a ring all-reduce."""
        return bytes_per_step(self.spec, self.ddp, self.handle)


def candidate(spec: str, size: int, width: int, shared: list[Tensor]) -> Candidate:
    """`shared`: the parameters of the first candidate, which the others use too; a step does not change them."""
    torch.manual_seed(0)
    model = Stack(size, width)
    for mine, other in zip(model.parameters(), shared):
        mine.data = other.data
    ddp, handle = wrap(spec, model, steady=True)
    return Candidate(spec, ddp, handle)


def batch(rank: int, ddp: DistributedDataParallel, number: int) -> Tensor:
    width = ddp.module.layers[0].in_features
    return torch.randn(BATCH, width, generator=torch.Generator().manual_seed(1000 * number + rank))


def exact_mean(c: Candidate) -> Tensor:
    """The mean of all ranks' gradients, computed here without communication, in float64."""
    total: Tensor | float = 0.0
    with c.ddp.no_sync():
        for rank in range(dist.get_world_size()):
            c.backward(batch(rank, c.ddp, 0))
            total = total + c.gradient().double()
    return total / dist.get_world_size()


def verify(c: Candidate, exact: Tensor, plain: Tensor) -> None:
    """RuntimeError unless the step that was just made has averaged the gradients as the candidate promises."""
    mean = c.gradient()
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, zlib.crc32(mean.numpy()))
    if len(set(digests)) > 1:
        raise RuntimeError(f"{c.spec}: the ranks hold different gradients")
    distance = lambda a: float((a - exact).norm() / exact.norm())
    c.error = distance(mean)
    if c.spec in POWERSGD:
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


def prepare(arguments: dict) -> list[Candidate]:
    """The candidates, verified and warm."""
    candidates: list[Candidate] = []
    shared: list[Tensor] = []
    exact = plain = torch.empty(0)
    for spec in arguments["specs"]:
        launch.progress(f"{spec}: verifying")
        c = candidate(spec, arguments["size"], arguments["width"], shared)
        if not candidates:
            shared, exact = list(c.ddp.parameters()), exact_mean(c)
        # Ours compresses the second step first, with residuals of zero, and PowerSGD the third.
        for _ in range(3 if spec in POWERSGD else 2):
            c.backward(batch(dist.get_rank(), c.ddp, 0))
        if not candidates:
            plain = c.gradient()
        verify(c, exact, plain)
        for _ in range(WARMUP if c.compressor is not None and c.compressor.ef else 2):
            c.backward(c.next_batch())
        c.ddp.zero_grad()
        candidates.append(c)
    return candidates


def together(step: Callable[[], None]) -> float:
    """Seconds that a step takes which all ranks begin together."""
    dist.barrier()
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


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
                c.alone.append(together(lambda: c.backward(x)))
            before = count()
            c.step.append(together(lambda: c.backward(x)))
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


def kernels_in_use() -> str:
    """What serves the ops, e.g. "cpu (avx512)"."""
    from commopt import backends

    names = sorted(set(backends.owners("cpu").values()))
    if "cpu" in names:
        from commopt import _C

        names[names.index("cpu")] = f"cpu ({_C.cpu.isa()})"
    return " and ".join(names)


def buckets(c: Candidate) -> list[int]:
    """Sizes of the buckets as DDP rebuilt them, in bytes."""
    sizes = c.ddp._get_ddp_logging_data().get("rebuilt_bucket_sizes") or ""
    return [int(size) for size in sizes.split(",") if size.strip()]


def worker() -> None:
    arguments = launch.worker_arguments()
    dist.init_process_group("gloo")
    rate = arguments["rate"]
    with link.unshaped(rate) if rate else contextlib.nullcontext():
        candidates = prepare(arguments)
        dist.barrier()
    dist.barrier()
    measure(candidates, arguments["rounds"], (lambda: link.counters()[0]) if rate else (lambda: 0))
    rows = [row(c, bool(rate)) for c in candidates]
    what = {"parameters": sum(p.numel() for p in candidates[0].ddp.parameters()), "buckets": buckets(candidates[0]),
            "world": dist.get_world_size(), "threads": torch.get_num_threads(), "rounds": arguments["rounds"], "link": rate or "loopback",
            "kernels": kernels_in_use(), "torch": torch.__version__, "commopt": commopt.__version__}
    launch.finish({"what": what, "rows": rows})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    worker()
