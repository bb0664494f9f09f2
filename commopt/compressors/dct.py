import functools
import math
from typing import Literal

import torch
from torch import Tensor

from .base import Compressor, register


@register("dct")
class DCT(Compressor):
    """The k largest coefficients of the cosine transform of each chunk of `chunk` values (after Peng, Quesnelle & Kingma,
    "DeMo: Decoupled Momentum Optimization", 2024, which transforms momentum; here it is the gradient with its residual).

        c = D x,  D_ij = sqrt((i ? 2 : 1) / chunk) cos(pi i (2 j + 1) / (2 chunk)),   decoded = D^T (the k largest |c|, else 0)
        |x - decoded|^2 = the squares that are not sent <= (1 - k / chunk) |x|^2, as D is orthonormal (Parseval): biased, and a
        contraction, which error feedback needs. Ties go to the lowest index.

    values=float32: 5 bytes per coefficient, 5 k / chunk per value (0.625 for the default); values=bf16: 3 k / chunk. What
    rounding a coefficient loses stays in the residual. A chunk with an infinity or a NaN is sent as NaN.

    Plain torch and this one file, as an example of a method. All ranks decode the same rows by the same product with D,
    so their processors and builds of torch must not differ.
    """

    collective, keeps_zero = "gather", False
    uses = {"dct:chunk=64,k=8": "smooth gradients; an example of a method in one file"}

    chunk: int = 64
    k: int = 8
    values: Literal["float32", "bf16"] = "float32"
    ef: bool = True

    def __post_init__(self):
        if not 1 <= self.chunk <= 256:
            raise ValueError(f"chunk must be from 1 to 256, so that an index is one byte, got {self.chunk}")
        if not 1 <= self.k <= self.chunk:
            raise ValueError(f"k must be from 1 to chunk={self.chunk}, got {self.k}")

    def fields(self, n):
        count = -(-n // self.chunk) * self.k
        return [("values", {"float32": torch.float32, "bf16": torch.bfloat16}[self.values], count), ("index", torch.uint8, count)]

    def encode(self, kernels, x, residual, values, index):
        acc = x.float() if residual is None else x.float() + residual * kernels.loss_scale
        chunks = torch.nn.functional.pad(acc, (0, -acc.numel() % self.chunk)).view(-1, self.chunk)
        coefficients = chunks @ _matrix(self.chunk, x.device).T
        finite = torch.isfinite(coefficients).all(1, keepdim=True)
        coefficients.masked_fill_(~finite, torch.nan)
        places = coefficients.abs().argsort(dim=1, descending=True, stable=True)[:, : self.k]
        index.view(-1, self.k).copy_(places)
        values.view(-1, self.k).copy_(coefficients.gather(1, places))
        if residual is not None:
            sent = self._decode(values[None], index[None]).view(-1)[: x.numel()]
            kept = finite.expand_as(chunks).reshape(-1)[: x.numel()]
            residual.copy_(torch.where(kept, (acc - sent) / kernels.loss_scale, residual))

    def decode_sum(self, kernels, out, weight, values, index):
        out.copy_(self._decode(values, index).view(-1)[: out.numel()] * weight)

    def _decode(self, values: Tensor, index: Tensor) -> Tensor:
        """float32 [chunks, chunk]: the sum of the rows' coefficients, in their order, transformed back at once."""
        rows, chunks = values.shape[0], values.shape[1] // self.k
        total = torch.zeros(chunks, self.chunk, device=values.device)
        for row in range(rows):
            places = index[row].view(-1, self.k).long().clamp(max=self.chunk - 1)  # whatever bytes arrive
            total += torch.zeros_like(total).scatter_(1, places, values[row].view(-1, self.k).float())
        return total @ _matrix(self.chunk, values.device)


@functools.cache
def _matrix(chunk: int, device: torch.device) -> Tensor:
    """D, float32 [chunk, chunk], rounded from float64."""
    j = torch.arange(chunk, dtype=torch.float64, device="cpu")
    i = j[:, None]
    matrix = torch.cos(math.pi * i * (2 * j + 1) / (2 * chunk)) * math.sqrt(2 / chunk)
    matrix[0] /= math.sqrt(2)
    return matrix.float().to(device)
