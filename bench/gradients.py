"""Gradients for the benches that have no model: the scale of real ones changes from layer to layer, and steps resemble each other."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def layered(n: int, dtype: torch.dtype, count: int, device: str | torch.device = "cpu") -> list[Tensor]:
    """Normal values whose scale changes from tile to tile, as it does from layer to layer. Others on each kind of device."""
    normal = _normal(device)
    scale = torch.exp(normal(-(-n // 65536))).repeat_interleave(65536)[:n]
    return [(normal(n) * scale).to(dtype) for _ in range(count)]


def alike(n: int, dtype: torch.dtype, count: int, device: str | torch.device = "cpu") -> list[Tensor]:
    """Normal values of one scale, each two of the gradients with a correlation of 0.9. Others on each kind of device."""
    normal = _normal(device)
    shared = normal(n).mul_(0.9**0.5)
    return [normal(n).mul_(0.1**0.5).add_(shared).to(dtype) for _ in range(count)]


def _normal(device: str | torch.device) -> Callable[[int], Tensor]:
    """Draws so many values, each time others."""
    return partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
