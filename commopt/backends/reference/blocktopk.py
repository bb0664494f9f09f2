"""The k largest of every block of 1024, where a block is spread over the whole gradient.

There are n // 1024 blocks of 32 lines of 32 elements; line t of block j is the elements (t * blocks + j) * 32 and the 31 after
it. What is left, n % 1024 elements, is a last block of neighbours. The entries of a block stand together and in order.
"""

import torch
from torch import Tensor

from .values import NON_FINITE, accumulate, keep, magnitude

BLOCK, LINE = 1024, 32


def _elements(n: int, device) -> tuple[Tensor, Tensor]:
    """int64 [blocks, 1024] and [n % 1024]: the elements of each block, and of the last."""
    blocks = n // BLOCK
    whole = torch.arange(blocks * BLOCK, device=device).view(BLOCK // LINE, blocks, LINE)
    return whole.transpose(0, 1).reshape(blocks, BLOCK), torch.arange(blocks * BLOCK, n, device=device)


def _largest(size: Tensor, k: int) -> Tensor:
    """Where in each row of int32 [blocks, width] the k largest are, ties to the lowest, in order."""
    return torch.sort(size, descending=True, stable=True, dim=1).indices[:, :k].sort(1).values


def blocktopk_encode(x: Tensor, residual: Tensor | None, loss_scale: Tensor, values: Tensor, index: Tensor, k: int) -> None:
    """The k elements of largest |acc| of each block, ties to the lowest index in it, NaN before infinity before finite;
    of the last block as many as are left of the list.
    values: float32 [k * (n // 1024) + k of the last] <- acc. index: int16, the index within the block.
    residual <- 0 where selected, acc / loss_scale elsewhere; not touched where acc is not finite."""
    acc = accumulate(x, residual, loss_scale)
    error, size, at = acc.clone(), magnitude(acc), 0
    for elements, count in zip(_elements(x.numel(), x.device), (k, values.numel() - k * (x.numel() // BLOCK))):
        elements = elements.view(-1, elements.shape[-1]) if elements.numel() else elements.view(0, 1)
        within = _largest(size[elements], count)
        chosen = elements.gather(1, within).flatten()
        values[at : at + chosen.numel()] = acc[chosen]
        index[at : at + chosen.numel()] = within.flatten().to(torch.int16)
        error[chosen] = 0.0
        at += chosen.numel()
    keep(residual, error, size < NON_FINITE, loss_scale)


def _places(n: int, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The element that each entry means, and whether it is one: an entry that points past the end of its block, or not
    beyond all entries of its block before it, is none, so that no row names an element twice."""
    blocks, within = n // BLOCK, index.to(torch.int64)
    parts = within[: k * blocks].view(blocks, k), within[k * blocks :].view(1, -1)
    places, valid = [], []
    for elements, part in zip(_elements(n, index.device), parts):
        width = elements.shape[-1]
        highest = part.clamp_min(-1).cummax(1).values if part.numel() else part
        before = torch.cat([torch.full_like(part[:, :1], -1), highest[:, :-1]], 1)
        good = (part > before) & (part < width)
        row = torch.arange(part.shape[0], device=index.device)[:, None] * width
        places.append(elements.flatten()[(row + part)[good]])
        valid.append(good.flatten())
    return torch.cat(places), torch.cat(valid)


def blocktopk_decode_sum(out: Tensor, weight: float, values: Tensor, index: Tensor, k: int) -> None:
    """values: float32 [rows, count], index: int16 [rows, count]."""
    total = torch.zeros(out.numel(), dtype=torch.float32, device=out.device)
    for v, i in zip(values, index):
        places, valid = _places(out.numel(), i, k)
        total[places] += v[valid]
    out.copy_(total * torch.tensor(weight, dtype=torch.float32))


def blocktopk_add(residual: Tensor, loss_scale: Tensor, values: Tensor, index: Tensor, k: int) -> None:
    """residual[selected] += values / loss_scale, with values: float32 [count] and index as blocktopk_encode wrote it."""
    places, valid = _places(residual.numel(), index, k)
    residual[places] += values[valid] * (1.0 / loss_scale)
