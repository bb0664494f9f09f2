from collections.abc import Callable

import torch
from torch import Tensor

from ..compressors import Compressor
from ..plan import Part, Plan
from .link import Link
from .phases import Phases, Prepared


def two_shot(
    plan: Plan, shards: list[tuple[int, int]] | None = None, compressor: Callable[[Part], Compressor] = lambda part: part.compressor
) -> Prepared:
    """Two rounds, 2 (W - 1) / W messages per rank however many ranks there are:

    1. Rank r gets everybody's message of shard r of the bucket and adds them in float32, in rank order.
    2. It encodes that sum, together with what it kept of the shard in round 1, and sends it to all. What this second
       encoding loses stays in its residual, so nothing is lost: what all ranks kept plus what they sent is what there was.
    """
    shards = shards or plan.shards(plan.world)
    shares = [plan.message(start, stop, "share", compressor) for start, stop in shards]
    resum = plan.message(*shards[plan.rank], "sum", compressor)
    sizes = [share.nbytes for share in shares]
    departing, arriving, sums = (plan.rows(max(sizes)) for _ in range(3))
    start, stop = shards[plan.rank]
    wide = None if plan.dtype == torch.float32 else torch.empty(stop - start, dtype=torch.float32, device=plan.device)

    def begin(link: Link, x: Tensor, residual: Tensor | None) -> Phases:
        def encode_share(r: int) -> None:
            s, e = shards[r]
            row = departing[r] if r != plan.rank else arriving[r]
            shares[r].encode(x[s:e], kept_of(residual, s, e), row, plan.draw, plan.loss_scale)

        def encode_sum(_: int) -> None:
            total = x[start:stop] if wide is None else wide
            resum.resum(total, kept_of(residual, start, stop), arriving, sums[plan.rank], plan.draw, plan.loss_scale)

        failed = yield link.scatter(departing, arriving, sizes, encode_share, plan.number)
        failed = yield link.gather(sums, sizes, encode_sum, plan.number, failed)
        if failed:
            raise failed
        finite = torch.ones((), dtype=torch.bool, device=x.device)
        for r, (s, e) in enumerate(shards):
            shares[r].decode_sum(x[s:e], plan.weight, sums[r : r + 1])
            finite &= shares[r].finite(sums[r : r + 1])
        plan.finite = finite

    own = sizes[plan.rank]
    return Prepared(begin, sum(sizes) - own + (plan.world - 1) * own, hops=2)


def kept_of(residual: Tensor | None, start: int, stop: int) -> Tensor | None:
    """A stretch of a residual [n] or [slots, n]."""
    return None if residual is None else residual[..., start:stop]
