"""What the ops share: how a gradient and its residual become acc, and what is kept of it."""

import torch
from torch import Tensor

NON_FINITE = 0x7F800000  # magnitudes from here on are infinite or NaN
NAN = float("nan")


def magnitude(acc: Tensor) -> Tensor:
    """|acc| as int32 bits: ordered like the magnitude, NaN above infinity above every finite value."""
    return acc.view(torch.int32) & 0x7FFFFFFF


def accumulate(x: Tensor, residual: Tensor | None, loss_scale: Tensor) -> Tensor:
    acc = x.to(torch.float32)
    if residual is not None:
        acc = acc + residual * loss_scale
    return torch.where(acc.isnan(), NAN, acc)


def keep(residual: Tensor | None, error: Tensor, usable: Tensor, loss_scale: Tensor) -> None:
    if residual is not None:
        residual.copy_(torch.where(usable, error * (1.0 / loss_scale), residual))


def over(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, each rounded by itself. On a GPU torch multiplies by the reciprocal of a number, which is not the same."""
    return x / torch.tensor(divisor, dtype=torch.float32, device=x.device)


def sum_rows(out: Tensor, weight: float, decoded) -> None:
    """out <- weight * the sum of an iterable of float32 rows, in its order."""
    rows = iter(decoded)
    total = next(rows).clone()
    for row in rows:
        total += row
    out.copy_(total * torch.tensor(weight, dtype=torch.float32))


def blocks(acc: Tensor, block: int) -> Tensor:
    """acc as [blocks, block], the last one filled up with zeros."""
    padded = torch.zeros(-(-acc.numel() // block) * block, dtype=torch.float32, device=acc.device)
    padded[: acc.numel()] = acc
    return padded.view(-1, block)


def spread(per_block: Tensor, block: int, n: int) -> Tensor:
    return per_block.repeat_interleave(block)[:n]


def philox(seed: int, step: int, stream: int, n: int, device) -> Tensor:
    """16 uniform random bits for each of n elements, int32 [n]: Philox4x32 with 7 rounds, counter (index // 8, step,
    stream), key seed; element i takes half i % 2 of word i // 2 % 4. (Salmon et al., SC 2011.)"""
    mask = 0xFFFFFFFF
    group = torch.arange(-(-n // 8), dtype=torch.int64, device=device)
    c = [group & mask, group >> 32, torch.full_like(group, step & mask), torch.full_like(group, stream & mask)]
    k0, k1 = seed & mask, seed >> 32 & mask

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        low, high = b * (a & 0xFFFF), b * (a >> 16)  # 64-bit products of 32-bit words, without a sign in the way
        middle = high + (low >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(7):
        high0, low0 = multiply(0xD2511F53, c[0])
        high1, low1 = multiply(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    halves = [half for word in c for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, 1).flatten()[:n].to(torch.int32)
