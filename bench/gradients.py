"""Gradients for the benches that have no model: the scale of real ones changes from layer to layer, and steps resemble each other."""

import torch
from torch import Tensor


def layered(n: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Normal values whose scale changes from tile to tile, as it does from layer to layer."""
    g = torch.Generator().manual_seed(0)
    scale = torch.exp(torch.randn(-(-n // 65536), generator=g)).repeat_interleave(65536)[:n]
    return [(torch.randn(n, generator=g) * scale).to(dtype) for _ in range(count)]


def alike(n: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Normal values of one scale, each two of the gradients with a correlation of 0.9."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(n, generator=g).mul_(0.9**0.5)
    return [torch.randn(n, generator=g).mul_(0.1**0.5).add_(shared).to(dtype) for _ in range(count)]
