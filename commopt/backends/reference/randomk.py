"""One element, drawn at random, of each of k strata of neighbours."""

import torch
from torch import Tensor

from .values import NAN, NON_FINITE, accumulate, keep, magnitude, philox


def _strata(n: int, k: int, draw: tuple[int, int, int], device) -> tuple[Tensor, Tensor]:
    """int64 [k]: how many elements each stratum has, the first n % k one more than the others, and which one is drawn:
    the one at (u * size) >> 32, u the 32 bits of elements 2 i and 2 i + 1 of philox(*draw)."""
    stratum = torch.arange(k, device=device)
    size = n // max(k, 1) + (stratum < n % max(k, 1)).to(torch.int64)
    start = size.cumsum(0) - size
    halves = philox(*draw, 2 * k, device).to(torch.int64).view(k, 2)
    return size, start + ((halves[:, 0] | halves[:, 1] << 16) * size >> 32)


def randomk_encode(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor, values: Tensor, scaled: bool, draw: tuple[int, int, int],
) -> None:
    """values: float32 [k] <- acc of the element drawn in each of k strata, times the size of the stratum if `scaled`; NaN
    for a stratum that holds an infinity or a NaN anywhere, whose residual is then not touched. draw: (seed, step, stream).
    residual <- 0 where drawn, acc / loss_scale elsewhere."""
    n, k, acc = x.numel(), values.numel(), accumulate(x, residual, loss_scale)
    size, drawn = _strata(n, k, draw, x.device)
    bad = torch.zeros(k, dtype=torch.bool, device=x.device)
    stratum = torch.arange(k, device=x.device).repeat_interleave(size)
    bad[stratum[magnitude(acc) >= NON_FINITE]] = True
    values.copy_(torch.where(bad, NAN, acc[drawn] * size if scaled else acc[drawn]))
    error = acc.clone()
    error[drawn] = 0.0
    keep(residual, error, ~bad[stratum], loss_scale)


def randomk_decode_sum(out: Tensor, weight: float, values: Tensor, draw: tuple[int, int, int]) -> None:
    """values: float32 [rows, k] with the draw that encoded all of them; the elements that were not drawn are 0 * weight."""
    total = values[0].clone()
    for row in values[1:]:
        total += row
    dense = torch.zeros(out.numel(), dtype=torch.float32, device=out.device)
    dense[_strata(out.numel(), values.shape[1], draw, out.device)[1]] = total
    out.copy_(dense * torch.tensor(weight, dtype=torch.float32))
