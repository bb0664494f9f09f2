"""All ranks of a group in one process: what one sends lies in a mailbox until the other looks. Each rank goes on when all
that it waits for has arrived, so that any number of ranks run through the collectives as they are, byte for byte."""

from collections import defaultdict, deque

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from commopt import parse
from commopt.collectives import prepare
from commopt.plan import Parameter, Plan


class Network:
    def __init__(self):
        self.mail: dict[tuple, deque] = defaultdict(deque)  # (from, to, tag) -> messages
        self.sums: dict[tuple, list] = defaultdict(list)
        self.sent: dict[int, int] = defaultdict(int)  # bytes by rank
        self.pairs: dict[tuple[int, int], int] = defaultdict(int)  # bytes by (from, to)
        self.messages: dict[int, int] = defaultdict(int)  # messages by rank

    def send(self, source: int, target: int, tag, row: Tensor) -> None:
        self.mail[source, target, tag].append(row.clone())
        self.sent[source] += row.numel()
        self.pairs[source, target] += row.numel()
        self.messages[source] += 1


class Awaited:
    """A Pending of the simulation."""

    def __init__(self, network: Network, expected=(), total=None, failed=None):
        self.network, self.expected, self.total, self.failed = network, list(expected), total, failed

    def ready(self) -> bool:
        waiting = defaultdict(int)
        for key, _ in self.expected:
            waiting[key] += 1
        arrived = all(len(self.network.mail[key]) >= count for key, count in waiting.items())
        return arrived and (self.total is None or len(self.network.sums[self.total[0]]) == self.total[1])

    def wait(self):
        assert self.ready()
        for key, into in self.expected:
            row = self.network.mail[key].popleft()
            assert row.numel() == into.numel(), f"{key}: {row.numel()} bytes arrived where {into.numel()} were awaited"
            into.copy_(row)
        if self.total is not None:
            key, _, x = self.total
            rows = [row for _, row in sorted(self.network.sums[key], key=lambda pair: pair[0])]
            total = rows[0].clone()
            for row in rows[1:]:
                total = torch.maximum(total, row) if key[-1] == ReduceOp.MAX else total + row
            x.copy_(total)
        return self.failed


class SimulatedLink:
    def __init__(self, network: Network, me: int, members: tuple[int, ...]):
        self.network, self.members, self.me = network, members, me
        self.rank, self.world = members.index(me), len(members)
        self._reductions = {False: 0, True: 0}
        self._parts: dict[tuple, SimulatedLink] = {}
        self.failures: list[Exception] = []
        self.heard = lambda: None

    def among(self, members):
        return self._parts.setdefault(members, SimulatedLink(self.network, self.me, tuple(self.members[r] for r in members)))

    def others(self):
        return [*range(self.rank + 1, self.world), *range(self.rank)]

    def open_late(self):
        pass

    def all_reduce(self, x, op=ReduceOp.SUM, late=False):
        key = (self.members, late, self._reductions[late], op)
        self._reductions[late] += 1
        self.network.sums[key].append((self.rank, x.clone()))
        self.network.sent[self.me] += 2 * (self.world - 1) * x.numel() * x.element_size() // self.world
        return Awaited(self.network, total=(key, self.world, x))

    def written(self, fill, r, row, failed):
        try:
            if failed is None:
                fill(r)
                return None
        except Exception as error:
            self.failures.append(error)
            failed = error
        row.fill_(0xFF)
        return failed

    def _expected(self, rows, sizes, tag):
        return [((self.members[r], self.me, tag), rows[r, : sizes[r]]) for r in range(self.world) if r != self.rank and sizes[r]]

    def scatter(self, departing, arriving, sizes, fill, number, failed=None, coming=None):
        for r in self.others():
            failed = self.written(fill, r, departing[r, : sizes[r]], failed)
            if sizes[r]:
                self.network.send(self.me, self.members[r], 2 * number, departing[r, : sizes[r]])
        failed = self.written(fill, self.rank, arriving[self.rank], failed)
        return Awaited(self.network, self._expected(arriving, coming or [sizes[self.rank]] * self.world, 2 * number), failed=failed)

    def gather(self, rows, sizes, fill, number, failed=None):
        own = rows[self.rank, : sizes[self.rank]]
        failed = self.written(fill, self.rank, own, failed)
        for r in range(self.world):
            if r != self.rank and own.numel():
                self.network.send(self.me, self.members[r], 2 * number + 1, own)
        return Awaited(self.network, self._expected(rows, sizes, 2 * number + 1), failed=failed)


def run(phases: list) -> list[Exception | None]:
    """Runs one generator of phases per rank to its end. What each raised. AssertionError when all wait for each other."""
    begun = [None] * len(phases)
    ended: list = [None] * len(phases)
    running = set(range(len(phases)))
    while running:
        moved = False
        for r in sorted(running):
            if begun[r] is not None and not _ready(begun[r]):
                continue
            moved = True
            try:
                begun[r] = phases[r].send(None if begun[r] is None else begun[r].wait())
            except StopIteration:
                running.discard(r)
            except Exception as error:
                ended[r] = error
                running.discard(r)
        assert moved, f"ranks {sorted(running)} wait for what nobody sends"
    return ended


def _ready(pending) -> bool:
    parts = getattr(pending, "_begun", None)  # several exchanges together
    return all(map(_ready, parts)) if parts is not None else not hasattr(pending, "ready") or pending.ready()


def exchange(plans: list[Plan], xs: list[Tensor], residuals: list) -> Network:
    """Averages xs in place."""
    network, everyone = Network(), tuple(range(len(plans)))
    links = [SimulatedLink(network, r, everyone) for r in everyone]
    wrong = run([plan.prepared.begin(link, x, residual) for plan, link, x, residual in zip(plans, links, xs, residuals)])
    for error in wrong:
        if error is not None:
            raise error
    return network


def parameters(*shapes) -> list[Parameter]:
    return [Parameter(f"p{i}", torch.Size(s), torch.Size(s).numel()) for i, s in enumerate(shapes)]


def plans_for(shapes, spec, world, dtype=torch.float32, rules=None, nodes=(), seed=0) -> list[Plan]:
    """The plan of each rank for a bucket, with its collective ready."""
    rules = {k: parse(v) for k, v in (rules or {}).items()}
    plans = [Plan(0, parameters(*shapes), dtype, torch.device("cpu"), parse(spec), rules, r, world, seed, nodes) for r in range(world)]
    for plan in plans:
        plan.prepared = prepare(plan)
    return plans
