"""What the network does, measured by the link that the exchanges use."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..collectives.link import Link

_LONG = 0.1  # seconds of a row that is long enough to tell the rate
_TURNS = 5


class Network(NamedTuple):
    """latency: seconds from when all ranks have a few bytes to send until all have got them. rate: bytes per second that a
    rank sends while it receives as many."""

    latency: float
    rate: float


def probe(link: Link, group: dist.ProcessGroup, number: int) -> Network:
    """Measures with exchanges of rows among all ranks of a link for tensors on the CPU; the same result on all of them. A
    collective call, of about two seconds. group: of these ranks, on which nothing else is under way. number: of an exchange
    that nothing else has."""

    def seconds(nbytes: int) -> float:
        rows, arriving = (torch.zeros(link.world, nbytes, dtype=torch.uint8, device="cpu") for _ in range(2))
        exchange = lambda: link.scatter(rows, arriving, [nbytes] * link.world, lambda r: None, number).wait()
        return _agreed(statistics.median(timed(exchange, group) for _ in range(_TURNS)), group)

    latency, nbytes = seconds(16), 1 << 16
    while (took := seconds(nbytes)) < _LONG and nbytes < 1 << 28:
        nbytes *= 4
    return Network(latency, (link.world - 1) * nbytes / max(took - latency, 1e-9))


def timed(work: Callable[[], Exception | None], group: dist.ProcessGroup | None = None) -> float:
    """Seconds that work takes which all ranks of the group, by default all, begin together. Raises what it returns, if anything."""
    dist.barrier(group)
    begin = time.perf_counter()
    failed = work()
    took = time.perf_counter() - begin
    if failed:
        raise failed
    return took


def _agreed(seconds: float, group: dist.ProcessGroup) -> float:
    """The slowest rank's."""
    slowest = torch.tensor(seconds, dtype=torch.float64, device="cpu")
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
    return float(slowest)
