"""One of DDP's buckets: its plan, and the exchange of each of its pieces."""

import itertools
from collections import defaultdict

from torch import Tensor
from torch.futures import Future

from ..collectives import prepare
from ..collectives.phases import Prepared
from ..collectives.run import future_of
from ..plan import Plan, narrow
from ..schedulers.late import laid_out
from .traffic import Traffic


class Bucket:
    """plan: of the whole. sums: whether a plain sum has pieces too, see `Plan.pieces`."""

    def __init__(self, plan: Plan, sums: bool):
        self.plan, self.pieces = plan, [prepare(piece) for piece in plan.pieces(sums)]
        plan.sends(sum(piece.plan.sent for piece in self.pieces), sum(piece.plan.size for piece in self.pieces))
        self._runs = self._neighbours()
        self._where: int | None = None  # the address of the bucket that was seen last
        self._views: list[Tensor] = []  # of it

    def _neighbours(self) -> list[tuple[list[int], list[int]]]:
        """The parameters that lie in the same pieces, and those pieces; both by their places."""
        spans = [piece.plan.span for piece in self.pieces]
        runs, stop = defaultdict(list), 0
        for place, parameter in enumerate(self.plan.parameters):
            start, stop = stop, stop + parameter.numel
            runs[tuple(i for i, span in enumerate(spans) if span.start < stop and span.stop > start)].append(place)
        return [(places, list(pieces)) for pieces, places in runs.items()]

    def begin(self, traffic: Traffic, x: Tensor, joined: bool) -> tuple[Future, list[Future]]:
        """Begins to average x in place: a future of the whole, and one of each piece. joined: whether this rank only contributes
        zeros, and keeps its residual."""
        residual = None if joined else self.plan.residual
        if len(self.pieces) == 1:
            future = traffic.exchange(self._ready(self.pieces[0]), x, residual)
            return future, [future]
        whole, ended = future_of(x), itertools.count(1)

        def one_ended() -> None:
            if next(ended) == len(self.pieces):
                whole.set_result(x)

        futures = []
        for piece in self.pieces:
            span = piece.plan.span
            futures.append(traffic.exchange(self._ready(piece), x[span], narrow(residual, span.start, span.stop), one_ended))
        return whole, futures

    def _ready(self, piece: Prepared) -> Prepared:
        piece.plan.step, piece.plan.loss_scale, piece.plan.finite = self.plan.step, self.plan.loss_scale, []
        return piece

    def awaited(self, x: Tensor, parameters: list[Tensor], traffic: Traffic, futures: list[Future]) -> list[tuple[list[int], list[Tensor], list[Tensor], list[Future]]]:
        """What there is to wait for when `begin` has begun: numbers of exchanges, the parameters whose gradients they bring, those
        gradients, and the futures of both."""
        if self._where != x.data_ptr():
            self._where, self._views = x.data_ptr(), laid_out(x, parameters)
        numbers = [traffic.travels_as[piece.plan.exchange] for piece in self.pieces]
        return [(sorted({numbers[i] for i in pieces}), [parameters[i] for i in places], [self._views[i] for i in places], [futures[i] for i in pieces])
                for places, pieces in self._runs]

    @property
    def numbers(self) -> list[int]:
        return [piece.plan.exchange for piece in self.pieces]

    def describe(self) -> dict:
        return self.plan.describe() | {"pieces": len(self.pieces)}
