"""Integers in blocks that share a scale."""

import torch
from torch import Tensor

from .values import NAN, NON_FINITE, accumulate, blocks, keep, magnitude, philox, spread, sum_rows


def quant_encode(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor, codes: Tensor, scales: Tensor,
    bits: int, block: int, stochastic: bool, draw: tuple[int, int, int],
) -> None:
    """codes: 8 bits: int8 [n]; 4 bits: uint8 [ceil(n / 2)], the even element in the low nibble, stored as q + 8.
    scales: float32 [ceil(n / block)] <- absmax / levels, levels = 127 or 7; NaN for a block with an infinity or a NaN.
    q = round(acc / scale), to nearest even or, stochastic, floor(acc / scale + u) with u from philox(*draw).
    draw: (seed, step, stream)."""
    n, acc, levels = x.numel(), accumulate(x, residual, loss_scale), {8: 127.0, 4: 7.0}[bits]
    if n == 0:
        return
    absmax = magnitude(blocks(acc, block)).amax(1)
    finite = absmax < NON_FINITE
    scale = torch.where(finite, absmax.view(torch.float32) / levels, 0.0)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
    scales.copy_(torch.where(finite, scale, NAN))
    usable = spread(finite, block, n)
    scaled = torch.where(usable, acc * spread(inverse, block, n), 0.0)
    if stochastic:
        q = torch.floor(scaled + philox(*draw, n, x.device).to(torch.float32) * (1.0 / 65536.0))
    else:
        q = torch.round(scaled) + 0.0  # no -0, which an integer code cannot carry
    q = q.clamp(-levels, levels)
    q = torch.where(usable, q, 0.0)
    keep(residual, acc - q * spread(scale, block, n), usable, loss_scale)
    if bits == 8:
        codes.copy_(q)
    else:
        nibbles = torch.full((2 * codes.numel(),), 8, dtype=torch.uint8, device=x.device)
        nibbles[:n] = (q + 8).to(torch.uint8)
        codes.copy_(nibbles[0::2] | nibbles[1::2] << 4)


def quant_decode_sum(out: Tensor, weight: float, codes: Tensor, scales: Tensor, bits: int, block: int) -> None:
    """codes: int8 [rows, n] or uint8 [rows, ceil(n / 2)], scales: float32 [rows, ceil(n / block)]."""
    n = out.numel()

    def row(c: Tensor, s: Tensor) -> Tensor:
        q = c if bits == 8 else torch.stack([c & 15, c >> 4], 1).flatten()[:n].to(torch.int8) - 8
        return q.to(torch.float32) * spread(s, block, n)

    sum_rows(out, weight, map(row, codes, scales))
