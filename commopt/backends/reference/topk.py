"""The k values of largest magnitude, and where they are."""

import torch
from torch import Tensor

from .values import NON_FINITE, accumulate, keep, magnitude

TILE = 65536  # sparse indices are 16 bits within tiles of this many elements


def topk_workspace(n: int, k: int) -> int:
    """Bytes of scratch that topk_encode keeps between calls, zero before the first. It speeds up the next call and
    never changes a result."""
    return 0


def in_tiles(ascending: Tensor, index: Tensor, starts: Tensor) -> None:
    """index: int16 [k] <- where in their tiles the elements int64 [k] are; starts <- where in the list each tile begins."""
    within = ascending % TILE
    index.copy_((within - (within >= 32768) * TILE).to(torch.int16))
    starts.copy_(torch.searchsorted(ascending, torch.arange(starts.numel(), device=ascending.device) * TILE))


def topk_encode(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor,
    values: Tensor, index: Tensor, starts: Tensor, workspace: Tensor,
) -> None:
    """The k elements of largest |acc|, NaN before infinity before finite, ties to the lowest index.
    values: float32 [k] <- acc, in the order of the index. index: int16 [k], holding the unsigned index within a tile.
    starts: int64 [ceil(n / 65536)], the position in the list where each tile begins.
    residual <- 0 where selected, acc / loss_scale elsewhere; not touched where acc is not finite."""
    k, acc = values.numel(), accumulate(x, residual, loss_scale)
    size = magnitude(acc)
    chosen = torch.sort(size, descending=True, stable=True).indices[:k].sort().values
    values.copy_(acc[chosen])
    in_tiles(chosen, index, starts)
    error = acc.clone()
    error[chosen] = 0.0
    keep(residual, error, size < NON_FINITE, loss_scale)


def positions(n: int, index: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The element each list entry means, and whether it is one: entries before the first tile and entries that point
    past the end are none. A start outside the list or before its predecessor is taken as the nearest that is not."""
    k = index.numel()
    begin = starts.clamp(0, k).cummax(0).values if starts.numel() else starts
    tile = torch.searchsorted(begin, torch.arange(k, device=index.device), right=True) - 1
    position = tile * TILE + (index.to(torch.int64) & 0xFFFF)
    return position, (tile >= 0) & (position < n)


def topk_decode_sum(out: Tensor, weight: float, values: Tensor, index: Tensor, starts: Tensor) -> None:
    """values: float32 [rows, k], index: int16 [rows, k], starts: int64 [rows, tiles]. Where a hostile row names an
    element twice, its entries add up in the order of the list."""
    n = out.numel()
    total = torch.zeros(n, dtype=torch.float32, device=out.device)
    for v, i, s in zip(values, index, starts):
        position, valid = positions(n, i, s)
        total.index_add_(0, position[valid], v[valid])
    out.copy_(total * torch.tensor(weight, dtype=torch.float32))


def sparse_add(residual: Tensor, loss_scale: Tensor, values: Tensor, index: Tensor, starts: Tensor) -> None:
    """residual[selected] += values / loss_scale, with values: float32 [k] and index, starts as topk_encode wrote them."""
    position, valid = positions(residual.numel(), index, starts)
    residual.index_add_(0, position[valid], values[valid] * (1.0 / loss_scale))
