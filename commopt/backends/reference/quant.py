"""Integers in blocks that share a scale."""

import torch
from torch import Tensor

from .values import NAN, NON_FINITE, accumulate, blocks, keep, magnitude, over, philox, spread, sum_rows

LEVELS = {8: 127, 4: 7, 2: 1}
ZERO = {4: 8, 2: 1}  # the code of q = 0


def quant_encode(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor, codes: Tensor, scales: Tensor,
    bits: int, block: int, stochastic: bool, draw: tuple[int, int, int],
) -> None:
    """codes: 8 bits: int8 [n]; 4 bits: uint8 [ceil(n / 2)], the even element in the low nibble, stored as q + 8; 2 bits:
    uint8 [ceil(n / 4)], element i in bits 2 (i % 4), stored as q + 1. Codes past the end are those of q = 0.
    scales, draw and what q is: see rounded()."""
    n = x.numel()
    if n == 0:
        return
    q = rounded(x, residual, loss_scale, scales, LEVELS[bits], block, stochastic, draw)
    if bits == 8:
        codes.copy_(q)
    else:
        zero, per_byte = ZERO[bits], 8 // bits
        padded = torch.full((per_byte * codes.numel(),), zero, dtype=torch.uint8, device=x.device)
        padded[:n] = (q + zero).to(torch.uint8)
        codes.copy_(sum(padded[i::per_byte] << bits * i for i in range(per_byte)))


def rounded(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor, scales: Tensor, levels: int, block: int, stochastic: bool,
    draw: tuple[int, int, int],
) -> Tensor:
    """q, float32 [n], whole numbers in [-levels, levels]; residual becomes what they miss.
    scales: float32 [ceil(n / block)], see scale_of(). What q is: see quantized(). draw: (seed, step, stream)."""
    acc = accumulate(x, residual, loss_scale)
    scales.copy_(scale_of(magnitude(blocks(acc, block)).amax(1), levels, stochastic))
    return quantized(acc, scales, residual, loss_scale, levels, block, stochastic, draw)


def scale_of(absmax: Tensor, levels: int, stochastic: bool) -> Tensor:
    """What one step of each block is worth, float32: its largest magnitude, by the bits of absmax, over `steps`; NaN where that
    is an infinity or a NaN. steps is levels, but 2 for one level to nearest: larger values then saturate, smaller ones are no
    longer lost."""
    steps = 2.0 if levels == 1 and not stochastic else float(levels)
    return torch.where((absmax >= 0) & (absmax < NON_FINITE), over(absmax.view(torch.float32), steps), NAN)


def quantized(
    acc: Tensor, scales: Tensor, residual: Tensor | None, loss_scale: Tensor, levels: int, block: int, stochastic: bool,
    draw: tuple[int, int, int],
) -> Tensor:
    """q = round(acc / scale), to nearest even or, stochastic, floor(acc / scale + u) with u from philox(*draw); 0 in a block
    whose scale is NaN. residual <- what they miss, but there."""
    n, finite = acc.numel(), ~scales.isnan()
    scale = torch.where(finite, scales, 0.0)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
    usable = spread(finite, block, n)
    scaled = torch.where(usable, acc * spread(inverse, block, n), 0.0)
    if stochastic:
        q = torch.floor(scaled + philox(*draw, n, acc.device).to(torch.float32) * (1.0 / 65536.0))
    else:
        q = torch.round(scaled) + 0.0  # no -0, which an integer code cannot carry
    q = torch.where(usable, q.clamp(-levels, levels), 0.0)
    keep(residual, acc - q * spread(scale, block, n), usable, loss_scale)
    return q


def quant_decode_sum(out: Tensor, weight: float, codes: Tensor, scales: Tensor, bits: int, block: int) -> None:
    """codes: int8 [rows, n] or uint8 [rows, ceil(n bits / 8)], scales: float32 [rows, ceil(n / block)]."""
    n = out.numel()

    def row(c: Tensor, s: Tensor) -> Tensor:
        if bits == 8:
            q = c
        else:
            codes = [c >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
            q = torch.stack(codes, 1).flatten()[:n].to(torch.int8) - ZERO[bits]
        return q.to(torch.float32) * spread(s, block, n)

    sum_rows(out, weight, map(row, codes, scales))


def quant_resum(
    n: int, row_codes: Tensor, row_scales: Tensor, residual: Tensor | None, loss_scale: Tensor, codes: Tensor, scales: Tensor,
    bits: int, block: int, stochastic: bool, draw: tuple[int, int, int],
) -> None:
    """The sum of messages of n elements, encoded again as quant_encode does: what the owner of a shard does with it in a
    two_shot. row_codes, row_scales: as in quant_decode_sum. The other arguments: as in quant_encode, of which the sum,
    float32 [n], is the x. Elsewhere than here that sum is nowhere in memory."""
    total = torch.empty(n, dtype=torch.float32, device=codes.device)
    quant_decode_sum(total, 1.0, row_codes, row_scales, bits, block)
    quant_encode(total, residual, loss_scale, codes, scales, bits, block, stochastic, draw)
