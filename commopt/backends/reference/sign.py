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
    signs.copy_(packed(negative))


def sign_decode_sum(out: Tensor, weight: float, signs: Tensor, scales: Tensor, block: int) -> None:
    """signs: uint8 [rows, ceil(n / 8)], scales: float32 [rows, ceil(n / block)]."""
    n = out.numel()

    def row(b: Tensor, s: Tensor) -> Tensor:
        value = spread(s, block, n)
        return torch.where(unpacked(b, n), -value, value)

    sum_rows(out, weight, map(row, signs, scales))


def sign_vote(n: int, row_signs: Tensor, row_scales: Tensor, signs: Tensor, scales: Tensor, block: int) -> None:
    """row_signs: uint8 [rows, ceil(n / 8)], row_scales: float32 [rows, ceil(n / block)].
    signs: as in sign_encode <- where more rows are negative than positive, and where as many are, whether the sum of the rows,
    in their order, is below 0.
    scales <- the sum of the scales in the order of the rows; one that overflows counts as the largest float32. NaN for a block
    in which one of them is an infinity or a NaN, and whose signs are then positive."""
    if n == 0:
        return
    total, ahead = torch.empty(n, dtype=torch.float32, device=signs.device), torch.zeros(n, dtype=torch.int32, device=signs.device)
    sign_decode_sum(total, 1.0, row_signs, row_scales, block)
    for b in row_signs:
        ahead += torch.where(unpacked(b, n), 1, -1)
    scale = torch.empty_like(scales)
    sum_rows(scale, 1.0, row_scales)
    usable = torch.isfinite(row_scales).all(0)
    scales.copy_(torch.where(usable, torch.where(torch.isfinite(scale), scale, LARGEST), NAN))
    signs.copy_(packed(spread(usable, block, n) & ((ahead > 0) | (ahead == 0) & (total < 0))))


def packed(negative: Tensor) -> Tensor:
    bits = torch.zeros(-(-negative.numel() // 8) * 8, dtype=torch.uint8, device=negative.device)
    bits[: negative.numel()] = negative
    return sum(bits[i::8] << i for i in range(8))


def unpacked(signs: Tensor, n: int) -> Tensor:
    return torch.stack([signs >> i & 1 for i in range(8)], 1).flatten()[:n].bool()
