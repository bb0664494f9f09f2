"""One bucket of a gradient, averaged alone: by a spec of ours, or by the process group's own all-reduce."""

import itertools
import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from commopt.collectives import prepare
from commopt.collectives.phases import Prepared
from commopt.compressors import STEADY, parse
from commopt.hooks.traffic import Traffic
from commopt.plan import Parameter, Plan

_numbers = itertools.count(1)  # of plans, each with tags of its own


def matrix(count: int) -> tuple[int, int]:
    """(rows, columns) of a layer of as many parameters, as square as can be."""
    rows = next(r for r in range(math.isqrt(count), 0, -1) if count % r == 0)
    return rows, count // rows


class Plain:
    """An all-reduce of the gradient, divided first, as DDP does it."""

    collective, residual, exact = "all_reduce", None, True

    def __init__(self, count: int, dtype: torch.dtype):
        self.spec, self.world = "plain", dist.get_world_size()
        self.sent = 2 * (self.world - 1) * count * dtype.itemsize // self.world

    def exchange(self, x: Tensor) -> None:
        dist.all_reduce(x.div_(self.world))

    def split(self) -> tuple[float, float, float] | None:
        return None


class Ours:
    """A plan and its residual, as a DDP hook has them, past any warm-up that the spec prescribes. whole: not in pieces."""

    def __init__(
        self, spec: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, traffic: Traffic, nodes: tuple[tuple[int, ...], ...],
        whole: bool = False,
    ):
        self.spec, self.traffic, self.whole, self._began = spec, traffic, whole, 0.0
        self.plan = plan(next(_numbers), spec, shape, dtype, device, traffic.rank, traffic.world, nodes)
        self.pieces, self.residual = prepared(self.plan, whole), self.plan.fresh_residual()

    @property
    def collective(self) -> str:
        return self.plan.collective

    @property
    def exact(self) -> bool:
        """Whether the gradient itself is summed: of the spec `none`, and where a message would be no smaller."""
        return self.plan.summed

    @property
    def sent(self) -> int:
        """Bytes that this rank hands to the network."""
        return sum(piece.plan.sent for piece in self.pieces)

    def exchange(self, x: Tensor) -> None:
        """x <- the mean of all ranks' x."""
        self.plan.step += 1
        self.traffic.reset_clocks()
        begin = time.perf_counter()
        futures = []
        for piece in self.pieces:
            piece.plan.step, span = self.plan.step, piece.plan.span
            futures.append(self.traffic.exchange(piece, x[span], None if self.residual is None else self.residual[..., span]))
        self._began = time.perf_counter() - begin
        self.traffic.close()
        for future in futures:
            future.wait()
        self.traffic.alarm.raise_known()

    def split(self) -> tuple[float, float, float] | None:
        """Seconds of encode, comm and decode in the last exchange. None on a device, whose work the host does not wait for.
        Small messages are encoded by the thread that begins the exchange."""
        if self.plan.device.type != "cpu":
            return None
        clocks = self.traffic.clocks()
        return clocks["encode"] + self._began, clocks["comm"], clocks["decode"]


def prepared(plan: Plan, whole: bool) -> list[Prepared]:
    """The pieces that a bucket is exchanged in."""
    return [prepare(piece) for piece in ([plan] if whole else plan.pieces(sums=False))]


def plan(
    number: int, spec: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, rank: int, world: int, nodes: tuple[tuple[int, ...], ...]
) -> Plan:
    """That of a bucket with one parameter."""
    parameters = [Parameter("weight", torch.Size(shape), shape[0] * shape[1])]
    return Plan(number, parameters, dtype, device, parse(spec).at(STEADY), {}, rank, world, nodes=nodes)
