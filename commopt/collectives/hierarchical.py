from collections.abc import Callable

import torch
from torch import Tensor

from ..compressors import Compressor
from ..plan import Fields, Message, Part, Plan, narrow
from .link import Link
from .phases import Phases, Prepared, together
from .shards import Shards


def hierarchical(plan: Plan, prepare: Callable[[Plan], Prepared]) -> Prepared:
    """Within each node (machine), between the nodes, and within each again:

    1. The ranks of a node share the bucket out: each gets the others' messages of its stretch and adds them in float32.
    2. Ranks that hold the same shard in different nodes exchange their sums, by the collective of the compressor between nodes.
    3. Each sends what it holds, now the sum over all ranks, to the others in its node.

    Between nodes a rank sends what the inner collective sends for 1 / G of the bucket, G ranks being in a node. Nodes may
    differ: there are as many shards as the largest has ranks, and a rank of a smaller one holds several neighbours.
    Every residual is this rank's: of all of its gradient what the compressor within nodes lost, of its own stretch what the
    one between nodes did.
    """
    node = next(i for i, ranks in enumerate(plan.nodes) if plan.rank in ranks)
    count = max(map(len, plan.nodes))
    shards = _shards(plan, count)
    held = [[s * len(ranks) // count for s in range(count)] for ranks in plan.nodes]  # [node][shard]: who, counted in the node
    here, me = plan.nodes[node], plan.nodes[node].index(plan.rank)
    stretches = [_span([shards[s] for s in range(count) if held[node][s] == i]) for i in range(len(here))]
    within = Shards(plan, stretches, me, _intra)
    start, stop = stretches[me]
    total = torch.empty(stop - start, dtype=torch.float32, device=plan.device)
    lossy_result = node == 0 and any(part.compressor.ef for part in within.sum.parts)
    inner: list[tuple[Prepared, tuple[int, ...], int, int]] = []  # with the ranks that hold the shard, and where it is
    if len(plan.nodes) > 1:
        for s in range(count):
            if held[node][s] == me and shards[s][0] < shards[s][1]:
                holders = tuple(sorted(ranks[held[i][s]] for i, ranks in enumerate(plan.nodes)))
                between = plan.stretch(*shards[s], holders.index(plan.rank), len(holders), _inter)
                inner.append((prepare(between), holders, *shards[s]))

    def begin(link: Link, x: Tensor, residual: Tensor | None) -> Phases:
        def encode_share(i: int) -> None:
            within.encode(i, x, residual)

        def encode_result(_: int) -> None:
            within.sum.encode(total, None, within.own_sum, plan.draw, plan.loss_scale)

        near = link.among(here)
        failed = yield near.scatter(within.departing, within.arriving, within.sizes, encode_share, plan.exchange)
        if failed is None:
            within.messages[me].decode_sum(total, 1.0, within.arrived)
        else:
            total.fill_(torch.nan)  # the others wait for what follows
        exchanges = []
        for prepared, holders, s, e in inner:
            prepared.plan.step, prepared.plan.loss_scale = plan.step, plan.loss_scale
            exchanges.append(prepared.begin(link.among(holders), total[s - start : e - start], narrow(residual, s, e)))
        try:
            yield from together(exchanges)
        except Exception as error:  # the others in this node wait for what follows
            failed = failed or error
        before = total.clone() if lossy_result and residual is not None else None
        failed = yield near.gather(within.sums, within.sizes, encode_result, plan.exchange, failed)
        if failed:
            raise failed
        if before is not None:
            _keep_lost(within.sum, before, narrow(residual, start, stop), within.each_sum[me], plan.loss_scale)
        plan.finite = within.decode(x)
        count_bytes()  # shards of lists are cut anew

    def count_bytes() -> None:
        plan.sends(within.sent + sum(prepared.plan.sent for prepared, *_ in inner))

    count_bytes()
    return Prepared(plan, begin, phases=2 + max((prepared.phases for prepared, *_ in inner), default=0), merges=False)


def _intra(part: Part) -> Compressor:
    return part.compressor.within_node


def _inter(part: Part) -> Compressor:
    return part.compressor.between_nodes


def _span(shards: list[tuple[int, int]]) -> tuple[int, int]:
    """Neighbours as one."""
    return shards[0][0], shards[-1][1]


def _shards(plan: Plan, count: int) -> list[tuple[int, int]]:
    """`count` stretches of about equal length; where a method compresses whole tensors, these stay whole."""
    shards = plan.shards(count)
    if all(_inter(part).collective != "rounds" for part in plan.parts):
        return shards
    begins, at = [0], 0
    for parameter in plan.parameters:
        at += parameter.numel
        begins.append(at)
    starts = [min(begins, key=lambda begin: abs(begin - start)) for start, _ in shards]
    return list(zip(starts, [*starts[1:], plan.n]))


def _keep_lost(message: Message, total: Tensor, residual: Tensor, row: Fields, loss_scale: Tensor | None) -> None:
    """residual += what the message of the total misses of it. All nodes send the same, so one rank keeps that."""
    lost = torch.empty_like(total)
    message.decode_sum(lost, 1.0, row)
    torch.sub(total, lost, out=lost)
    if loss_scale is not None:
        lost /= loss_scale
    (residual[0] if residual.dim() > 1 else residual).add_(lost.masked_fill_(~torch.isfinite(lost), 0.0))
