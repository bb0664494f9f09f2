"""What one exchange costs on a network: its own phases run, alone, on a link that carries nothing, and what they hand to it
is put on a line of the network's rate."""

import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import prepare
from ..collectives.link import Link
from ..collectives.phases import Pending, Prepared
from ..compressors import STEADY, Compressor, parse
from ..plan import Parameter, Plan
from .probe import Network

_TURNS = 5
_CACHES = 1 << 27  # bytes; more than any processor's have


class Cost(NamedTuple):
    """Of one rank and exchange.

    sent: bytes that it hands to the network. rounds: how often it waits for others, each time for a latency at least.
    work: seconds of encoding, adding and decoding. passes: work in units of what copying the bucket takes. seconds: from the
    beginning to the mean, what travels while the next row is encoded counted once.
    """

    collective: str
    sent: int
    rounds: int
    work: float
    passes: float
    seconds: float


def cost(
    spec: str | Compressor, shape: tuple[int, ...], world: int, network: Network, *, near: Network | None = None, rank: int = 0,
    nodes: tuple[tuple[int, ...], ...] = (), dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
) -> Cost:
    """Predicts an exchange of a gradient of this shape, normally distributed, in one bucket, among `world` ranks that are
    all like this machine. It needs no other rank, so any number can be asked for; memory is needed as for the real one.

    network: between ranks, when all of a node use it at the same time; near: between those of a node, by default the same. On
    each a rank's rows leave one after the other at its rate, and what it waits for has arrived when its own have left and a
    latency is over: all ranks do the same.
    """
    parameters = [Parameter("0", torch.Size(shape), torch.Size(shape).numel())]
    plan = Plan(0, parameters, dtype, torch.device(device), parse(spec).at(STEADY), {}, rank, world, nodes=nodes)
    prepared, residual = prepare(plan), plan.fresh_residual()
    gradient = torch.randn(plan.n, device=device).to(dtype)
    timelines, elsewhere = [], torch.empty(_CACHES, dtype=torch.uint8, device=device)
    for step in range(_TURNS + 1):  # the first one writes to memory that nobody has touched
        elsewhere.fill_(step)  # a backward pass leaves nothing of the last exchange in the caches but a part of the gradient
        plan.step, x = step, gradient.roll(step)
        timelines.append(_run(prepared, x, residual, Timeline(network, near or network, torch.device(device))))
    copied = _seconds_of_a_copy(gradient)
    typical = sorted(timelines[1:], key=lambda timeline: timeline.now)[_TURNS // 2]  # one, as lists' lengths differ from exchange to exchange
    return Cost(plan.collective, typical.sent, typical.rounds, typical.work, typical.work / copied, typical.now)


class Timeline:
    """When things would happen: `now` is how far the exchange is, in seconds."""

    def __init__(self, far: Network, near: Network, device: torch.device):
        self.far, self.near, self._device = far, near, device
        self.now = self.work = 0.0
        self.sent = self.rounds = 0
        self._free: dict[Network, float] = {}  # when the last row will have left
        self._awaited: set[Network] = set()  # where rows are under way
        self._since: float | None = None

    def run(self) -> None:
        """Work goes on from here."""
        self._since = self._clock()

    def stop(self) -> None:
        took = self._clock() - self._since
        self.now, self.work = self.now + took, self.work + took

    def row(self, nbytes: int, network: Network) -> None:
        """A row is on its way."""
        self._free[network] = max(self._free.get(network, 0.0), self.now) + nbytes / network.rate
        self._awaited.add(network)
        self.sent += nbytes

    def all_reduce(self, nbytes: int, world: int, network: Network) -> None:
        """In a ring: 2 (world - 1) times a share of it to the neighbour, the last latency in arrive()."""
        steps = 2 * (world - 1)
        self.row(steps * nbytes // world, network)
        self._free[network] += (steps - 1) * network.latency
        self.rounds += steps - 1

    def arrive(self) -> None:
        """All that is awaited has come."""
        self.now = max([self.now, *(self._free[network] + network.latency for network in self._awaited)])
        self._awaited.clear()
        self.rounds += 1

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens here takes no time."""
        self.stop()
        yield
        self.run()

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Mute(Link):
    """Carries nothing. What others would have sent is what this rank has written itself."""

    def __init__(self, timeline: Timeline, nodes: tuple[tuple[int, ...], ...], rank: int, ranks: tuple[int, ...]):
        self.rank, self.world = ranks.index(rank), len(ranks)
        self._timeline, self._nodes, self._ranks, self._parts = timeline, nodes, ranks, {}
        self.heard = lambda: None

    def _near(self, ranks: Iterable[int]) -> bool:
        """Whether these are in one node."""
        return any({self._ranks[r] for r in ranks} <= set(node) for node in self._nodes)

    def _on_failure(self, error: Exception) -> None:
        raise error

    def _part(self, members: tuple[int, ...]) -> "Mute":
        return Mute(self._timeline, self._nodes, self._ranks[self.rank], tuple(self._ranks[r] for r in members))

    def open_late(self) -> None:
        pass

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, late: bool = False) -> Pending:
        near, far = self._timeline.near, self._timeline.far
        leaving = far._replace(rate=far.rate * max(map(len, self._nodes)))  # a ring leaves a node once
        with self._timeline.aside():
            self._timeline.all_reduce(x.nbytes, self.world, near if self._near(range(self.world)) else leaving)
        return Pending()

    def scatter(self, departing, arriving, sizes, fill, number, failed=None, coming=None):
        pending = super().scatter(departing, arriving, sizes, fill, number, failed, coming)
        self._hand_out(arriving)
        return pending

    def gather(self, rows, sizes, fill, number, failed=None):
        pending = super().gather(rows, sizes, fill, number, failed)
        self._hand_out(rows)
        return pending

    def _hand_out(self, rows: Tensor) -> None:
        with self._timeline.aside():
            for r in self.others():
                rows[r] = rows[self.rank]

    def _send(self, row: Tensor, r: int, tag: int, works: list) -> None:
        with self._timeline.aside():
            self._timeline.row(row.numel(), self._timeline.near if self._near((self.rank, r)) else self._timeline.far)

    def _receive(self, rows: Tensor, sizes: list[int], tag: int, works: list) -> None:
        pass


def _run(prepared: Prepared, x: Tensor, residual: Tensor | None, timeline: Timeline) -> Timeline:
    plan = prepared.plan
    phases = prepared.begin(Mute(timeline, plan.nodes, plan.rank, tuple(range(plan.world))), x, residual)
    timeline.run()
    for _ in phases:
        with timeline.aside():
            timeline.arrive()
    timeline.stop()
    return timeline


def _seconds_of_a_copy(gradient: Tensor) -> float:
    nowhere, to, seconds = Network(0.0, 1.0), torch.empty_like(gradient), []
    for _ in range(_TURNS):
        timeline = Timeline(nowhere, nowhere, gradient.device)
        timeline.run()
        to.copy_(gradient)
        timeline.stop()
        seconds.append(timeline.work)
    return statistics.median(seconds)
