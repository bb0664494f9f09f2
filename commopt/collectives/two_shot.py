import torch
from torch import Tensor

from ..plan import Plan
from .link import Link, Phases


def two_shot(plan: Plan, link: Link, x: Tensor, residual: Tensor | None) -> Phases:
    """Two rounds, 2 (W - 1) / W messages per rank however many ranks there are:

    1. Rank r gets everybody's message of shard r of the bucket and adds them in float32, in rank order.
    2. It encodes that sum, together with what it kept of the shard in round 1, and sends it to all. What this second
       encoding loses stays in its residual, so nothing is lost: what all ranks kept plus what they sent is what there was.
    """
    start, stop = plan.shards[plan.rank]

    def encode_share(r: int) -> None:
        s, e = plan.shards[r]
        kept = None if residual is None else residual[..., s:e]
        row = plan.departing[r] if r != plan.rank else plan.arriving[r]
        plan.shares[r].encode(x[s:e], kept, row, plan.draw, plan.loss_scale)

    def encode_sum(_: int) -> None:
        total = x[start:stop]
        if total.dtype != torch.float32:
            total = torch.empty(stop - start, dtype=torch.float32, device=x.device)
        plan.shares[plan.rank].decode_sum(total, 1.0, plan.arriving)
        kept = None if residual is None else residual[..., start:stop]
        plan.sum.encode(total, kept, plan.sums[plan.rank], plan.draw, plan.loss_scale)

    sizes = [share.nbytes for share in plan.shares]
    failed = yield link.scatter(plan.departing, plan.arriving, sizes, encode_share, plan.number)
    failed = yield link.gather(plan.sums, sizes, encode_sum, plan.number, failed)
    if failed:
        raise failed
    finite = torch.ones((), dtype=torch.bool, device=x.device)
    for r, (s, e) in enumerate(plan.shards):
        plan.shares[r].decode_sum(x[s:e], plan.weight, plan.sums[r : r + 1])
        finite &= plan.shares[r].finite(plan.sums[r : r + 1])
    plan.finite = finite
