import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ..wire import Layout
from .base import Compressor, register

_TILE = 65536
_VALUE_BLOCK = 64  # values=int8: how many entries of the list share a scale


@register("topk")
class TopK(Compressor):
    """The k = ratio n values of largest magnitude in the whole bucket, exactly, ties to the lowest index (Aji & Heafield,
    "Sparse communication for distributed gradient descent", EMNLP 2017; error feedback: Stich et al., "Sparsified SGD
    with memory", NeurIPS 2018).

        S = the k indices of largest |x|,   decoded_i = x_i for i in S, else 0
        |x - decoded|^2 <= (1 - k/n) |x|^2: biased, and a contraction, which error feedback needs

    values=float32: 6 bytes per entry, 4 for the value and 2 for the index within a tile of 65536 elements;
    values=bf16: 4 bytes; values=int8: 3 + 1/16 bytes, blocks of 64 entries share a scale. What rounding a value loses
    stays in the residual. A tile costs 8 bytes more.

    warmup: in the first `warmup` steps the ratio falls in four equal stages from 25 % to its value (Lin et al., "Deep
    Gradient Compression", ICLR 2018): early gradients change fast, and what waits in the residual then is stale.

    momentum: above 0, what is accumulated is a velocity u <- momentum u + x and not x, so that an entry that waits gathers
    the momentum it would have had, and u is set to zero where it was sent (momentum correction and factor masking of the
    same paper). It takes the place of the optimizer's own momentum, for SGD without one, and one more float32 per value.
    """

    collective = "gather"
    uses = {"topk:ratio=0.01": "very slow links, few ranks"}

    ratio: float = 0.01
    values: Literal["float32", "bf16", "int8"] = "float32"
    warmup: int = 100
    momentum: float = 0.0
    ef: bool = True

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {self.ratio}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be a number of steps, got {self.warmup}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.momentum and not self.ef:
            raise ValueError("momentum is accumulated in the residual: it needs ef=true")

    @property
    def witness(self) -> str:
        return "scales" if self.values == "int8" else "values"

    @property
    def slots(self) -> int:
        return 2 if self.momentum else 1

    def at(self, step):
        if step >= self.warmup or self.ratio >= 0.25:
            return dataclasses.replace(self, warmup=0)
        stage = 4 * step // self.warmup
        return dataclasses.replace(self, warmup=0, ratio=0.25 * (self.ratio / 0.25) ** (stage / 4))

    def k(self, n: int) -> int:
        return min(n, max(1, round(self.ratio * n)))

    def fields(self, n):
        k = self.k(n)
        place = [("index", torch.int16, k), ("starts", torch.int64, -(-n // _TILE))]
        if self.values == "int8":
            return [("codes", torch.int8, k), ("scales", torch.float32, -(-k // _VALUE_BLOCK)), *place]
        return [("values", {"float32": torch.float32, "bf16": torch.bfloat16}[self.values], k), *place]

    def encode(self, kernels, x, residual, *fields):
        *coded, index, starts = fields
        velocity = None
        if residual is not None and self.momentum:
            residual, velocity = residual
            x = self._accelerate(x, velocity, kernels.loss_scale)
        k, one = index.numel(), kernels.scratch("one", torch.float32, 1).fill_(1.0)
        values = coded[0] if self.values == "float32" else kernels.scratch("values", torch.float32, k)
        workspace = kernels.scratch("workspace", torch.uint8, kernels.topk_workspace(x.numel(), k))
        kernels.topk_encode(x, residual, kernels.loss_scale, values, index, starts, workspace)
        if velocity is not None:
            tile = torch.searchsorted(starts, torch.arange(k, device=x.device), right=True) - 1
            sent = (tile * _TILE + (index.long() & 0xFFFF))[torch.isfinite(values)]
            velocity.index_fill_(0, sent, 0.0)
        if self.values == "float32":
            return
        error = kernels.scratch("error", torch.float32, k).zero_()
        if self.values == "bf16":
            kernels.dense_encode(values, error, one, *coded)
        else:
            kernels.quant_encode(values, error, one, *coded, 8, _VALUE_BLOCK, False, (0, 0, 0))
        if residual is not None:
            kernels.sparse_add(residual, kernels.loss_scale, error, index, starts)

    def _accelerate(self, x: Tensor, velocity: Tensor, loss_scale: Tensor) -> Tensor:
        """velocity <- momentum velocity + x / loss_scale; returns it in the units of x, float32. Where x is not finite, x
        goes through and the velocity stays."""
        finite = torch.isfinite(x)
        torch.where(finite, velocity * self.momentum + x.float() / loss_scale, velocity, out=velocity)
        return torch.where(finite, velocity * loss_scale, x)

    def decode_sum(self, kernels, out, weight, *fields):
        *coded, index, starts = fields
        if self.values == "float32":
            return kernels.topk_decode_sum(out, weight, *coded, index, starts)
        # One row at a time to float32: the sum of one row is the row. The places move beside the values.
        rows, k = index.shape
        wide = Layout([("values", torch.float32, k), ("index", torch.int16, k), ("starts", torch.int64, starts.shape[1])])
        values, *places = wide.views(kernels.scratch("wide", torch.uint8, rows * wide.nbytes).view(rows, wide.nbytes))
        for place, given in zip(places, (index, starts)):
            place.copy_(given)
        for r in range(rows):
            row = [field[r : r + 1] for field in coded]
            if self.values == "bf16":
                kernels.dense_decode_sum(values[r], 1.0, *row)
            else:
                kernels.quant_decode_sum(values[r], 1.0, *row, 8, _VALUE_BLOCK)
        kernels.topk_decode_sum(out, weight, values, *places)
