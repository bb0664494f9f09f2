"""A rotation that spreads an outlier over 128 neighbours: D flips the signs of a fixed pattern, H is the orthonormal
Walsh-Hadamard matrix of order 128. rotated = H D acc for each stretch of 128 elements; a last shorter one stays as it is.

H = 2^-3.5 times a butterfly: first the product with float32(2^-3.5), then for h = 1, 2, 4, ..., 64 the pair
(a_i, a_{i+h}) becomes (a_i + a_{i+h}, a_i - a_{i+h}).
"""

import torch
from torch import Tensor

from .values import accumulate, keep

STRETCH = 128
ROOT = 2.0**-3.5
# Element i is negated where bit i % 32 of word i // 32 is set: the first 128 bits of the fraction of pi. The pattern is
# fixed, so that all ranks, both phases and all steps have the same.
FLIPS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


def _signs(device) -> Tensor:
    return torch.tensor([1.0 - 2.0 * (FLIPS[i // 32] >> i % 32 & 1) for i in range(STRETCH)], device=device)


def _butterfly(stretches: Tensor) -> Tensor:
    v, h = stretches * torch.tensor(ROOT, dtype=torch.float32, device=stretches.device), 1
    while h < STRETCH:
        a, b = v.view(-1, STRETCH // (2 * h), 2, h).unbind(2)
        v = torch.stack([a + b, a - b], 2).view(-1, STRETCH)
        h *= 2
    return v


def _whole(n: int) -> int:
    return n // STRETCH * STRETCH


def _back(rotated: Tensor) -> Tensor:
    value, whole = rotated.clone(), _whole(rotated.numel())
    value[:whole] = (_butterfly(rotated[:whole].view(-1, STRETCH)) * _signs(rotated.device)).flatten()
    return value


def hadamard_encode(x: Tensor, residual: Tensor | None, loss_scale: Tensor, rotated: Tensor) -> None:
    """rotated: float32 [n] <- H D acc. Only read: residual."""
    acc, whole = accumulate(x, residual, loss_scale), _whole(x.numel())
    rotated.copy_(acc)
    rotated[:whole] = _butterfly(acc[:whole].view(-1, STRETCH) * _signs(x.device)).flatten()


def hadamard_keep(x: Tensor, residual: Tensor, loss_scale: Tensor, rotated: Tensor) -> None:
    """residual <- (acc - decoded) / loss_scale, decoded = D H rotated; unchanged where decoded is not finite.
    rotated: float32 [n], what was sent, still rotated."""
    decoded = _back(rotated)
    keep(residual, accumulate(x, residual, loss_scale) - decoded, torch.isfinite(decoded), loss_scale)


def hadamard_decode(out: Tensor, weight: float, rotated: Tensor) -> None:
    """out <- weight * D H rotated, rotated: float32 [n]."""
    out.copy_(_back(rotated) * torch.tensor(weight, dtype=torch.float32))
