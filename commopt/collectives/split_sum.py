import torch
from torch import Tensor

from ..compressors import all_finite
from ..plan import Plan
from .link import Link
from .phases import Phases, Prepared


def split_sum(plan: Plan) -> Prepared:
    """A sum as its two halves, which can be launched apart: a reduce-scatter, in which each rank adds up its shard of what all
    ranks send, in rank order and in the gradient's dtype, and an all-gather. As many bytes as a ring all-reduce, and between
    two ranks the same bits.
    """
    starts, stops = zip(*plan.shards(plan.world))
    sizes = [(stop - start) * plan.dtype.itemsize for start, stop in zip(starts, stops)]
    departing, arriving, sums = (plan.rows(max(sizes)) for _ in range(3))

    def values(rows: Tensor, r: int, shard: int) -> Tensor:
        return rows[r, : sizes[shard]].view(plan.dtype)

    def begin(link: Link, x: Tensor, residual: Tensor | None) -> Phases:
        def divide(r: int) -> None:
            into = values(arriving if r == plan.rank else departing, r, r)
            torch.mul(x[starts[r] : stops[r]], plan.weight, out=into)

        def add(_: int) -> None:
            total = values(sums, plan.rank, plan.rank)
            total.copy_(values(arriving, 0, plan.rank))
            for r in range(1, plan.world):
                total.add_(values(arriving, r, plan.rank))

        failed = yield link.scatter(departing, arriving, sizes, divide, plan.exchange)
        failed = yield link.gather(sums, sizes, add, plan.exchange, failed)
        if failed:
            raise failed
        for r in range(plan.world):
            x[starts[r] : stops[r]].copy_(values(sums, r, r))
        plan.finite = [all_finite(x)]

    plan.sends(sum(sizes) - sizes[plan.rank] + (plan.world - 1) * sizes[plan.rank], plan.reduced)
    return Prepared(plan, begin, phases=2)
