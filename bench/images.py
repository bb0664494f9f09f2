"""Images that a classifier can learn and nobody has to download: waves of ten directions beneath noise."""

import math

import torch
from torch import Tensor

SIZE, CLASSES, NOISE = 32, 10, 3.0


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(float32 [size, 3, 32, 32], int64 [size]): the waves of class k run at an angle of k pi / 10, their lengths and phases are random."""
    kinds = torch.randint(0, CLASSES, (size,), generator=generator)
    angle = (kinds * (math.pi / CLASSES))[:, None, None, None]
    frequency, phase = torch.rand(2, size, 3, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    waves = torch.sin((0.4 + 0.6 * frequency) * (x * angle.cos() + y * angle.sin()) + 2 * math.pi * phase)
    return waves + NOISE * torch.randn(waves.shape, generator=generator), kinds
