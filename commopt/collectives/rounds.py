from collections.abc import Generator

from torch import Tensor

from .. import backends
from ..compressors import parse
from ..plan import Message, Plan
from .link import Link
from .phases import Phases, Prepared
from .round import Round


def rounds(plan: Plan) -> Prepared:
    """Means over the ranks, one after the other, each of values computed from the mean before it. A round is two phases:

    1. Rank r gets everybody's shard r of the round's values and adds them in float32, in rank order.
    2. It sends the mean to all. What it lost on its way, all have lost alike.

    2 (W - 1) / W of the values per rank and round, as in a ring all-reduce, but in one hop each and with the same bits on
    any network. What travels exactly is averaged in the first round. Messages of other compressors in the same bucket
    are gathered before it.
    """
    trips, methods, exactly = _arrange(plan)
    others = [p for p in plan.parts if p.compressor.collective not in ("rounds", "sum")]
    name = f"{plan.name}/rounds"
    message = Message(others, plan.exact[:0], plan.device, f"{name}/{plan.rank}", name) if others else None
    rows = plan.rows(message.nbytes if message else 0)
    own, everyones = (message.fields(rows[plan.rank]), message.fields(rows)) if message else (None, None)

    def begin(link: Link, x: Tensor, residual: Tensor | None) -> Phases:
        steps, begun, failed = _steps(plan, methods, exactly, x, residual), -1, None

        def encode(_: int) -> None:
            message.encode(x, residual, own, plan.draw, plan.loss_scale)

        if message is not None:
            failed = yield link.gather(rows, [message.nbytes] * plan.world, encode, plan.exchange)
        for i, trip in enumerate(trips):

            def fill_shard(r: int) -> None:
                nonlocal begun
                if begun < i:  # a step fills all shards of its round
                    begun = i
                    for step in steps:
                        next(step, None)
                trip.encode(r, arrived=r == plan.rank)

            def fill_mean(_: int) -> None:
                trip.average(plan.rank, 1.0 / plan.world)
                trip.encode(plan.rank)

            sizes = [trip.nbytes] * plan.world
            failed = yield link.scatter(trip.departing, trip.arriving, sizes, fill_shard, plan.exchange, failed)
            failed = yield link.gather(trip.departing, sizes, fill_mean, plan.exchange, failed)
            trip.decode()
        if failed:
            raise failed
        for step in steps:
            next(step, None)
        if plan.weight != 1.0 / plan.world:
            x.mul_(plan.weight * plan.world)
        finite = [trip.finite() for trip in trips]
        if message is not None:
            message.decode_sum(x, plan.weight, everyones)
            finite += message.finite(everyones)
        plan.finite = finite

    plan.sends((plan.world - 1) * (sum(2 * trip.nbytes for trip in trips) + rows.shape[1]))
    return Prepared(plan, begin, phases=2 * len(trips) + (message is not None))


def _arrange(plan: Plan) -> tuple[list[Round], list, list]:
    """Round i averages the i-th field of every part, and the first one what travels exactly too. Returns the rounds, (part,
    its kernels, its fields' values) of each that works in rounds, and (where in the bucket, values) of what is exact."""
    parts = [p for p in plan.parts if p.compressor.collective == "rounds"]
    places, counts = zip(*plan.exactly)
    exact = [("", parse("none"), count) for count in counts]
    trips: list[Round] = []
    averaged: list[list[Tensor]] = [[] for _ in parts]  # of each part
    exactly: list[tuple[Tensor | slice, Tensor]] = []
    for i in range(max(len(p.rounds) for p in parts)):
        taking = [fields for p, fields in zip(parts, averaged) if i < len(p.rounds)]
        fields = [p.rounds[i] for p in parts if i < len(p.rounds)] + (exact if i == 0 else [])
        trip = Round(fields, plan.world, plan.device)
        trips.append(trip)
        for held, field in zip(taking, trip.views):
            held.append(field)
        if i == 0:
            exactly = [(place, values) for place, values in zip(places, trip.views[len(parts) :]) if values.numel()]
    return trips, [(part, backends.select(plan.device), fields) for part, fields in zip(parts, averaged)], exactly


def _steps(plan: Plan, methods: list, exactly: list, x: Tensor, residual: Tensor | None) -> list[Generator[None]]:
    """What fills the values of one round at each `next`, and afterwards writes its part of x."""
    steps = [_exactly(x, place, values) for place, values in exactly]
    for part, kernels, fields in methods:
        tensors, kept = ([t[start : start + shape.numel()].view(shape) for start, shape in part.tensors] if t is not None else None
                         for t in (x, part.kept(residual)))
        kernels.draw = (*plan.draw, 0)
        if plan.loss_scale is not None:
            kernels.loss_scale = plan.loss_scale
        steps.append(part.compressor.average(kernels, tensors, kept, *fields))
    return steps


def _exactly(x: Tensor, place: Tensor | slice, values: Tensor) -> Generator[None]:
    values.copy_(x[place])
    yield
    x[place] = values.to(x.dtype)
