"""Training steps of DDP modules that differ in how they communicate, made in turns and timed from one to the next.

A schedule lets communication go on after the optimizer's step, into the next forward: no step can be timed alone. Every
candidate has a model of its own, from the same seed, and sees the same batches; all ranks begin its turn together. A turn is
7 consecutive steps, of which 4 are measured; it ends, behind the last measured moment, with handle.flush().

    t[i]      the moment at which the last rank begins the first backward of step i of a turn; i = 0, ..., 6
    step i    t[i + 1] - t[i], for i = 2, ..., 5: a backward, an optimizer step and the next forward, each once (as often as
              --accumulate says, but for the step), and what of communication they wait for

Before t[0] nothing was under way, so the steps up to t[2] are dropped, two because a schedule may wait one step later: t[2]
follows a full step, as t[6] does, and what is still under way at the one moment is at the other. The sum of a turn's measured
steps is t[6] - t[2]. Before its turns each candidate makes 14 steps.

Before the turns and after them all ranks must hold the same parameters, bit for bit, and with two ranks every schedule of a
spec those of the first one, `none` those of plain DDP. `delayed` need not: it computes something else.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.nn.parallel import DistributedDataParallel

import commopt

from . import launch, resident, timeline
from .candidates import EXTERNAL, bytes_per_step, wrap
from .steps import Work, check_same

NO_SYNC = "no_sync"  # the candidate that does not communicate
WARMUP = 14  # steps: orders are planned after 3 and after 8 with the same buckets, which DDP makes anew after the first
DROPPED, STEPS = 2, 4  # of a turn, not measured and measured
TURN = DROPPED + STEPS + 1  # in which the last ends what is measured
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, lr=0.01, momentum=0.9), "adamw": partial(torch.optim.AdamW, lr=3e-4)}
OTHER_MATHEMATICS = ("delayed",)  # schedules


@dataclass
class Candidate:
    """One row of the table: a model in training. passes: backward passes of a step, of which the last synchronises. starts: of each turn, when this rank began each backward. waited: seconds of
    each turn's measured steps that computation waited for communication."""

    spec: str
    schedule: str | None
    work: Work
    ddp: DistributedDataParallel
    handle: commopt.State | None
    optimizer: torch.optim.Optimizer
    passes: int
    grown: int | None = None
    steps: int = 0
    starts: list[list[float]] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.spec} {self.schedule}" if self.schedule else self.spec

    @property
    def same_as(self) -> str | None:
        """What this candidate's parameters have in common with those of others on two ranks; None: nothing."""
        if self.spec in EXTERNAL[1:] or (self.schedule or "").partition(":")[0] in OTHER_MATHEMATICS:
            return None
        return "none" if self.spec == "plain" else self.spec

    def parameters(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.ddp.parameters()])

    def exposed(self) -> float:
        """Seconds that computation has waited, by the candidate's own account."""
        stats = self.handle.stats() if self.handle else {"exposed_ms": 0.0, "steps": 0}
        return 1e-3 * stats["exposed_ms"] * stats["steps"]

    def train(self, steps: int) -> tuple[list[float], float]:
        """Consecutive steps, which all ranks begin together. When each backward began, and for how much of the measured
        time computation has waited. Afterwards nothing is under way."""
        batches = [self.work.batch(dist.get_rank(), self.steps * self.passes + i) for i in range(steps * self.passes)]
        self.steps += steps
        starts, waited = [], 0.0
        dist.barrier()
        for i, batch in enumerate(batches):
            step, number = divmod(i, self.passes)
            last = number == self.passes - 1
            with contextlib.nullcontext() if last and self.spec != NO_SYNC else self.ddp.no_sync():
                with record_function("forward"):
                    loss = self.work.loss(self.ddp, batch)
                with record_function("backward"):
                    if number == 0:
                        if step == DROPPED:
                            waited -= self.exposed()  # takes a while itself, here and below outside of the measured steps
                        starts.append(time.perf_counter())  # of one clock: the ranks are processes of one machine
                        if step == steps - 1:
                            waited += self.exposed()
                    loss.backward()
            if last:
                with record_function("optimizer"):
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        if self.handle:
            self.handle.flush()
        dist.barrier()
        return starts, waited


def candidate(spec: str, schedule: str | None, work: Work, optimizer: str, bucket_mb: float, passes: int) -> Candidate:
    torch.manual_seed(0)
    ddp, handle = wrap("plain" if spec == NO_SYNC else spec, work.model(), steady=True, bucket_mb=bucket_mb,
                       schedule=schedule or "pipelined")
    return Candidate(spec, schedule, work, ddp, handle, OPTIMIZERS[optimizer](ddp.parameters()), passes)


def prepare(names: list[tuple[str, str | None]], work: Work, optimizer: str, bucket_mb: float, passes: int, unshaped: Callable) -> list[Candidate]:
    """The candidates, warm. unshaped(): a context in which the network is fast; the warm-up is not made there, because
    schedules plan by what it takes."""
    made = []
    model = work.model()  # one step of it has torch load what it needs: memory of no candidate
    work.loss(model, work.batch(0, 0)).backward()
    OPTIMIZERS[optimizer](model.parameters()).step()
    del model
    for spec, schedule in names:
        launch.progress(f"{spec} {schedule or ''}".strip() + ": warming up")
        growth = resident.growth()
        with unshaped():
            made.append(candidate(spec, schedule, work, optimizer, bucket_mb, passes))
            dist.barrier()
        made[-1].train(WARMUP)
        made[-1].grown = growth()
    return made


def check(candidates: list[Candidate]) -> None:
    """RuntimeError unless the parameters are finite and as equal as the module's docstring says."""
    firsts: dict[str, Candidate] = {}
    for c in candidates:
        if c.spec == NO_SYNC:
            continue
        mine = c.parameters()
        check_same(c.name, mine, "parameters")
        if not mine.isfinite().all():
            raise RuntimeError(f"{c.name}: parameters are not finite after {c.steps} steps, so nothing can be told from their bits")
        if dist.get_world_size() == 2 and c.same_as:
            first = firsts.setdefault(c.same_as, c)
            if off := int((mine.view(torch.int32) != first.parameters().view(torch.int32)).sum()):
                raise RuntimeError(f"{c.name}: after {c.steps} steps {off} of {mine.numel()} parameters differ from those of {first.name}")


def measure(candidates: list[Candidate], rounds: int) -> None:
    for c in candidates:
        if c.handle:
            c.handle.reset_stats()
    for turn in range(rounds):
        for c in candidates:
            launch.progress(f"round {turn + 1}/{rounds}: {c.name}")
            starts, waited = c.train(TURN)
            c.starts.append(starts)
            c.waited.append(waited)


def durations(starts: list[list[float]]) -> list[float]:
    """The measured steps of all turns, in ms, from t."""
    return [1e3 * (after - before) for t in starts for before, after in zip(t[DROPPED:], t[DROPPED + 1 :])]


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two values next to it: percentile(values, 0) is the least, percentile(values, 100) the greatest."""
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), percent / 100))


def row(c: Candidate) -> dict[str, Any]:
    """What all ranks together found of a candidate, and when the parts of one more step were at work on this one. Of bytes,
    waiting and memory those of the rank that has most."""
    stats = c.handle.stats() if c.handle else {}
    sent = 0.0 if c.spec == NO_SYNC else bytes_per_step(c.spec, c.ddp, c.handle)
    most = torch.tensor([sent, 1e3 * sum(c.waited) / (len(c.waited) * STEPS), c.grown or 0], dtype=torch.float64)
    last = torch.tensor(c.starts, dtype=torch.float64)
    for mine in (most, last):
        dist.all_reduce(mine, dist.ReduceOp.MAX)
    times = durations(last.tolist())
    launch.progress(f"timeline: {c.name}")
    events, period = timeline.record(lambda: c.train(TURN), c.passes)
    return {
        "spec": c.spec, "schedule": c.schedule, "times_ms": times, **{f"p{p}_ms": percentile(times, p) for p in (50, 75, 90)},
        "sent": float(most[0]), "exposed_ms": float(most[1]) if c.handle else None, "grown": int(most[2]) if c.grown is not None else None,
        "predicted_ms": stats.get("predicted_ms"), "stats": {k: stats[k] for k in stats if k.endswith("_ms")},
        "events": [{"lane": lane, "start_ms": start, "stop_ms": stop} for lane, start, stop in events], "period_ms": period,
    }
