import torch
from torch import Tensor

from ..compressors import Compressor
from ..plan import GRAIN, Part, Plan
from .link import Link
from .phases import Phases, Prepared
from .two_shot import two_shot

_PERIOD = 64  # exchanges between two looks at the density; the first ones come after 1, 2, 4, ... exchanges


def sparse_two_shot(plan: Plan) -> Prepared:
    """A two_shot of lists, whose shards have about equally many entries each (after Ok-Topk, Li & Hoefler, "Near-optimal
    sparse allreduce for distributed deep learning", PPoPP 2022, which counts entries on all ranks for that).

    A rank sends k entries in all to the owners of the shards, and the owner k / W of the sum to all: at most twice its
    own list, for any W. How many entries a shard has is fixed until the next cut: what finds no room stays in the residual,
    and so does what the second selection leaves of the sum.

    Shards are cut, and the entries of a part divided among them, by how many elements of the last mean were not zero.
    All ranks have the same bits of that, so they cut alike without a word. At first elements count alike.
    On a device this waits for it: once in 64 exchanges.
    """
    density = torch.ones(-(-plan.n // GRAIN), dtype=torch.float64, device="cpu")
    inner, exchanges = _cut(plan, density), 0

    def begin(link: Link, x: Tensor, residual: Tensor | None) -> Phases:
        nonlocal inner, exchanges
        yield from inner.begin(link, x, residual)
        exchanges += 1
        if exchanges & (exchanges - 1) == 0 or exchanges % _PERIOD == 0:
            inner = _cut(plan, _density(x))

    return Prepared(plan, begin, phases=2)


def _density(x: Tensor) -> Tensor:
    """Per GRAIN elements how many are not zero, and a tenth of the mean more: float64 [ceil(n / GRAIN)]."""
    whole = x[: x.numel() // GRAIN * GRAIN].view(-1, GRAIN).count_nonzero(1)
    rest = x[whole.numel() * GRAIN :]
    counts = torch.cat([whole, rest.count_nonzero()[None]] if rest.numel() else [whole]).cpu().to(torch.float64)
    return counts + 0.1 * counts.mean() + 1e-9


def _cut(plan: Plan, density: Tensor) -> Prepared:
    """density: of entries, float64 [ceil(n / GRAIN)], any unit."""
    before = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), density.cumsum(0)])

    def upto(element: int) -> float:
        whole, rest = divmod(element, GRAIN)
        return float(before[whole] + (density[whole] * rest / GRAIN if rest else 0.0))

    def entries(part: Part) -> int:
        return part.compressor.entries(part.stop - part.start)

    def compressor(piece: Part) -> Compressor:
        if not entries(piece):
            return piece.compressor
        part = next(p for p in plan.parts if p.start <= piece.start < p.stop)
        first = upto(part.start)
        each = entries(part) / (upto(part.stop) - first)
        count = round(each * (upto(piece.stop) - first)) - round(each * (upto(piece.start) - first))
        n = piece.stop - piece.start
        return piece.compressor.naming(min(max(count, 1), n), n)

    reached = torch.zeros_like(density)  # entries before each grain
    for part in plan.parts:
        first, all_of_it = upto(part.start), upto(part.stop) - upto(part.start)
        reached += (entries(part) or part.stop - part.start) * (before[:-1] - first).clamp(0, all_of_it) / all_of_it
    borders = torch.searchsorted(reached, reached[-1] * torch.arange(1, plan.world, device="cpu") / plan.world).clamp_max(density.numel() - 1)
    starts = [0, *(GRAIN * borders).tolist()]
    return two_shot(plan, list(zip(starts, [*starts[1:], plan.n])), compressor)
