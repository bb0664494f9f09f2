"""float16 in blocks that share a power of two."""

import torch
from torch import Tensor

from .values import NAN, NON_FINITE, accumulate, blocks, keep, magnitude, spread, sum_rows


def half_encode(x: Tensor, residual: Tensor | None, loss_scale: Tensor, values: Tensor, scales: Tensor, block: int) -> None:
    """values: float16 [n] <- acc / scale. scales: float32 [ceil(n / block)], the power of two that brings the block's
    largest magnitude into [2^14, 2^15); NaN for a block that holds an infinity or a NaN, with values 0."""
    n, acc = x.numel(), accumulate(x, residual, loss_scale)
    if n == 0:
        return
    absmax = magnitude(blocks(acc, block)).amax(1)
    finite = absmax < NON_FINITE
    exponent = ((absmax >> 23) - 14).clamp_min(1)
    scale = (exponent << 23).view(torch.float32)
    inverse = torch.where(finite, ((254 - exponent) << 23).view(torch.float32), 0.0)
    scales.copy_(torch.where(finite, scale, NAN))
    usable = spread(finite, block, n)
    values.copy_(torch.where(usable, acc * spread(inverse, block, n), 0.0))
    sent = values.to(torch.float32) * spread(scale, block, n)
    keep(residual, acc - sent, usable, loss_scale)


def half_decode_sum(out: Tensor, weight: float, values: Tensor, scales: Tensor, block: int) -> None:
    """values: float16 [rows, n], scales: float32 [rows, ceil(n / block)]."""
    n = out.numel()
    sum_rows(out, weight, (v.to(torch.float32) * spread(s, block, n) for v, s in zip(values, scales)))
