from collections.abc import Generator

import torch
from torch import Tensor

from ..plan import Plan
from .link import Link, Phases


def rounds(plan: Plan, link: Link, x: Tensor, residual: Tensor | None) -> Phases:
    """Means over the ranks, one after the other, each of values computed from the mean before it. A round is two phases:

    1. Rank r gets everybody's shard r of the round's values and adds them in float32, in rank order.
    2. It sends the mean to all.

    2 (W - 1) / W of the values per rank and round, as in a ring all-reduce, but in one hop each and with the same bits on
    any network. What travels exactly is averaged in the first round. Messages of other compressors in the same bucket
    are gathered before it.
    """
    steps, begun, failed = _steps(plan, x, residual), -1, None

    def encode(_: int) -> None:
        plan.message.encode(x, residual, plan.rows[plan.rank], plan.draw, plan.loss_scale)

    if plan.message is not None:
        failed = yield link.gather(plan.rows, [plan.message.nbytes] * plan.world, encode, plan.number)
    for i, trip in enumerate(plan.rounds):

        def fill_shard(r: int) -> None:
            nonlocal begun
            if begun < i:  # a step fills all shards of its round
                begun = i
                for step in steps:
                    next(step, None)
            for values, rows in zip(trip.values, trip.into if r == plan.rank else trip.out):
                rows[r].copy_(values[r])

        def fill_mean(_: int) -> None:
            for values, into, out in zip(trip.values, trip.into, trip.out):
                mean = values[plan.rank].copy_(into[0])
                for other in into[1:]:
                    mean.add_(other)
                out[plan.rank].copy_(mean.mul_(plan.weight))

        sizes = [trip.nbytes] * plan.world
        failed = yield link.scatter(trip.departing, trip.arriving, sizes, fill_shard, plan.number, failed)
        failed = yield link.gather(trip.departing, sizes, fill_mean, plan.number, failed)
        for values, out in zip(trip.values, trip.out):
            values.copy_(out)
    if failed:
        raise failed
    for step in steps:
        next(step, None)
    plan.finite = torch.stack([torch.isfinite(values).all() for trip in plan.rounds for values in trip.values]).all()
    if plan.message is not None:
        plan.message.decode_sum(x, plan.weight, plan.rows)
        plan.finite &= plan.message.finite(plan.rows)


def _steps(plan: Plan, x: Tensor, residual: Tensor | None) -> list[Generator[None]]:
    """What fills the values of one round at each `next`, and afterwards writes its part of x."""
    steps = [_exactly(x, place, values) for place, values in plan.exactly]
    for part, kernels, fields in plan.methods:
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
