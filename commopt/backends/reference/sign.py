"""The sign of each value and the mean magnitude of its block."""

import torch
from torch import Tensor

from .values import NAN, NON_FINITE, accumulate, blocks, keep, magnitude, spread, sum_rows

PARTIALS = 128
LARGEST = torch.finfo(torch.float32).max


def sign_encode(x: Tensor, residual: Tensor | None, loss_scale: Tensor, signs: Tensor, scales: Tensor, block: int) -> None:
    """signs: uint8 [ceil(n / 8)]: bit i % 8 of byte i // 8 is set where acc < 0. Both zeros count as positive, and so does
    all of a block that holds an infinity or a NaN, and what is past the end.
    scales: float32 [ceil(n / block)] <- the mean of |acc| over the elements of the block that exist; NaN for a block with
    an infinity or a NaN. Element i of a block is added to partial sum i % 128, in order; then, as long as there is more
    than one, the second half of the partial sums is added to the first; a sum that overflows counts as the largest float32.
    """
    n, acc = x.numel(), accumulate(x, residual, loss_scale)
    if n == 0:
        return
    lanes = blocks(acc, block)
    finite = magnitude(lanes).amax(1) < NON_FINITE
    partial = torch.zeros(lanes.shape[0], PARTIALS, dtype=torch.float32, device=x.device)
    for first in range(0, block, PARTIALS):
        some = lanes[:, first : first + PARTIALS].abs()
        partial[:, : some.shape[1]] += some
    while partial.shape[1] > 1:
        half = partial.shape[1] // 2
        partial = partial[:, :half] + partial[:, half:]
    present = (n - block * torch.arange(lanes.shape[0], device=x.device)).clamp_max(block)
    scale = torch.where(finite, partial[:, 0].clamp_max(LARGEST) / present.to(torch.float32), NAN)
    scales.copy_(scale)
    usable = spread(finite, block, n)
    negative = usable & (acc < 0)
    sent = spread(scale, block, n)
    keep(residual, acc - torch.where(negative, -sent, sent), usable, loss_scale)
    bits = torch.zeros(8 * signs.numel(), dtype=torch.uint8, device=x.device)
    bits[:n] = negative
    signs.copy_(sum(bits[i::8] << i for i in range(8)))


def sign_decode_sum(out: Tensor, weight: float, signs: Tensor, scales: Tensor, block: int) -> None:
    """signs: uint8 [rows, ceil(n / 8)], scales: float32 [rows, ceil(n / block)]."""
    n = out.numel()

    def row(b: Tensor, s: Tensor) -> Tensor:
        negative = torch.stack([b >> i & 1 for i in range(8)], 1).flatten()[:n].bool()
        value = spread(s, block, n)
        return torch.where(negative, -value, value)

    sum_rows(out, weight, map(row, signs, scales))
