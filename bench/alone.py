"""What the mean of an exchange must be, bit for bit: the same collective for all ranks, one after the other in this process,
with the reference kernels and nothing between them but memory."""

import os
from collections import defaultdict, deque

import torch
import torch.distributed as dist
from torch import Tensor

from commopt.collectives.link import Link
from commopt.collectives.phases import Phases

from .exchange import plan, prepared


def mean(spec: str, shape: tuple[int, int], gradients: list[Tensor], step: int, nodes: tuple[tuple[int, ...], ...], whole: bool) -> Tensor:
    """Of the gradients of all ranks, on the CPU, in the step with this number. Nothing is kept from earlier steps. whole: not
    in pieces."""
    before = os.environ.get("COMMOPT_BACKEND")
    os.environ["COMMOPT_BACKEND"] = "reference"
    try:
        return _mean(spec, shape, [x.clone() for x in gradients], step, nodes, whole)
    finally:
        os.environ.pop("COMMOPT_BACKEND") if before is None else os.environ.update(COMMOPT_BACKEND=before)


def _mean(spec: str, shape: tuple[int, int], xs: list[Tensor], step: int, nodes: tuple[tuple[int, ...], ...], whole: bool) -> Tensor:
    ranks = [prepared(plan(0, spec, shape, x.dtype, x.device, rank, len(xs), nodes), whole) for rank, x in enumerate(xs)]
    for pieces in zip(*ranks):
        memory, everyone, running = _Memory(), tuple(range(len(xs))), []
        for rank, (piece, x) in enumerate(zip(pieces, xs)):
            piece.plan.step = step
            running.append(piece.begin(_Between(memory, everyone, rank), x[piece.plan.span], None))
        _run(running)
    return xs[0]


def _run(running: list[Phases]) -> None:
    """Each phase of all ranks before the next of any."""
    failed: list[Exception | None] = [None] * len(running)
    while True:
        begun = []
        for phases, wrong in zip(running, failed):
            try:
                begun.append(phases.send(wrong))
            except StopIteration:
                begun.append(None)
        if None in begun:
            return
        failed = [pending.wait() for pending in begun]


class _Memory:
    def __init__(self):
        self.rows: dict[tuple, deque[Tensor]] = defaultdict(deque)  # (from, to, tag) -> rows on their way
        self.summands: dict[tuple, list[Tensor]] = defaultdict(list)  # by all-reduce, in rank order


class _Between(Link):
    """Rows through memory."""

    def __init__(self, memory: _Memory, members: tuple[int, ...], me: int):
        self.rank, self.world, self.heard = members.index(me), len(members), lambda: None
        self._memory, self._members, self._me, self._parts, self._sums = memory, members, me, {}, 0

    def _on_failure(self, error: Exception) -> None:
        raise error

    def _part(self, members: tuple[int, ...]) -> "_Between":
        return _Between(self._memory, tuple(self._members[r] for r in members), self._me)

    def open_late(self) -> None:
        pass

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, late: bool = False):
        summands = self._memory.summands[self._members, self._sums]
        self._sums += 1
        summands.append(x.clone())
        return self._pending([_Sum(summands, op, x)], None, x.new_empty(self.world, 0), [0] * self.world)

    def _send(self, row: Tensor, r: int, tag: int, works: list) -> None:
        if row.numel():
            self._memory.rows[self._me, self._members[r], tag].append(row.clone())

    def _receive(self, rows: Tensor, sizes: list[int], tag: int, works: list) -> None:
        works += [_Row(self._memory.rows[self._members[r], self._me, tag], rows[r, : sizes[r]]) for r in self.others() if sizes[r]]


class _Row:
    def __init__(self, rows: deque[Tensor], into: Tensor):
        self._rows, self._into = rows, into

    def wait(self) -> None:
        self._into.copy_(self._rows.popleft())


class _Sum:
    def __init__(self, summands: list[Tensor], op: dist.ReduceOp.RedOpType, into: Tensor):
        self._summands, self._op, self._into = summands, op, into

    def wait(self) -> None:
        total = self._summands[0]
        for x in self._summands[1:]:
            total = torch.maximum(total, x) if self._op == dist.ReduceOp.MAX else total + x
        self._into.copy_(total)
