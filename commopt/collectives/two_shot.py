from collections.abc import Callable

import torch
from torch import Tensor

from ..compressors import Compressor
from ..plan import Part, Plan, narrow
from .link import Link
from .phases import Phases, Prepared
from .shards import Shards


def two_shot(
    plan: Plan, spans: list[tuple[int, int]] | None = None, compressor: Callable[[Part], Compressor] = lambda part: part.compressor
) -> Prepared:
    """Two rounds, 2 (W - 1) / W messages per rank however many ranks there are:

    1. Rank r gets everybody's message of shard r of the bucket and adds them in float32, in rank order.
    2. It encodes that sum, together with what it kept of the shard in round 1, and sends it to all. What this second
       encoding loses stays in its residual, so nothing is lost: what all ranks kept plus what they sent is what there was.
    """
    shards = Shards(plan, spans or plan.shards(plan.world), plan.rank, compressor)
    start, stop = shards.start, shards.stop
    wide = None if plan.dtype == torch.float32 else torch.empty(stop - start, dtype=torch.float32, device=plan.device)

    def begin(link: Link, x: Tensor, residual: Tensor | None) -> Phases:
        def encode_share(r: int) -> None:
            shards.encode(r, x, residual)

        def encode_sum(_: int) -> None:
            total = narrow(x, start, stop) if wide is None else wide
            shards.sum.resum(total, narrow(residual, start, stop), shards.arrived, shards.own_sum, plan.draw, plan.loss_scale)

        failed = yield link.scatter(shards.departing, shards.arriving, shards.sizes, encode_share, plan.exchange)
        failed = yield link.gather(shards.sums, shards.sizes, encode_sum, plan.exchange, failed)
        if failed:
            raise failed
        plan.finite = shards.decode(x)

    plan.sends(shards.sent, shards.size)
    return Prepared(plan, begin, phases=2)
