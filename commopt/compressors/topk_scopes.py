"""Among which elements top-k takes the largest.

A scope has count(n, ratio), the entries of the list; places(n, count), the fields that say where they were, as the ops take
them, of which the first is index, int16 [count]; `coding`, how these travel in the fewest bytes; encode(...), which fills
values: float32 [count] and the places; add(...), which returns an error to the residual; positions(n, ratio, *places),
where the entries are, int64 [count]; and decode_sum.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..wire import Field
from .sparse_index import Bits, EliasFano

_TILE = 65536


class Global:
    """The whole bucket. An index is 16 bits within a tile of 65536 elements, and `starts` says where in the list a tile begins."""

    coding = EliasFano()

    def count(self, n: int, ratio: float) -> int:
        return min(n, max(1, round(ratio * n)))

    def places(self, n: int, count: int) -> list[Field]:
        return [("index", torch.int16, count), ("starts", torch.int64, -(-n // _TILE))]

    def encode(self, kernels: Any, x: Tensor, residual: Tensor | None, ratio: float, values: Tensor, *places: Tensor) -> None:
        workspace = kernels.scratch("workspace", torch.uint8, kernels.topk_workspace(x.numel(), values.numel()))
        kernels.topk_encode(x, residual, kernels.loss_scale, values, *places, workspace)

    def add(self, kernels: Any, residual: Tensor, ratio: float, error: Tensor, *places: Tensor) -> None:
        kernels.sparse_add(residual, kernels.loss_scale, error, *places)

    def positions(self, n: int, ratio: float, index: Tensor, starts: Tensor) -> Tensor:
        tile = torch.searchsorted(starts, torch.arange(index.numel(), device=index.device), right=True) - 1
        return tile * _TILE + (index.long() & 0xFFFF)

    def decode_sum(self, kernels: Any, out: Tensor, weight: float, ratio: float, values: Tensor, *places: Tensor) -> None:
        kernels.topk_decode_sum(out, weight, values, *places)


class Threshold(Global):
    """Of the whole bucket what reaches a threshold, up to count of it; what has no room waits for the next step. The threshold
    is carried from step to step. Where the list begins moves on by the golden ratio of the bucket, so that no element waits
    more often than another (Deep Gradient Compression and its kin drop the last ones)."""

    golden = 0x9E3779B97F4A7C15  # times 2^-64

    def encode(self, kernels: Any, x: Tensor, residual: Tensor | None, ratio: float, values: Tensor, *places: Tensor) -> None:
        n = x.numel()
        workspace = kernels.scratch("workspace", torch.uint8, kernels.threshold_workspace(n, values.numel()))
        control = kernels.scratch("control", torch.int32, 2)
        begin = (kernels.draw[1] * self.golden % 2**64) * n >> 64
        kernels.threshold_encode(x, residual, kernels.loss_scale, values, *places, control, begin, workspace)


class Block:
    """Each block of 1024 by itself, where a block is 32 lines of 32 elements at equal distances over the whole bucket, so
    that every layer is in every block."""

    size, coding = 1024, Bits(10)

    def each(self, ratio: float) -> int:
        return max(1, round(ratio * self.size))

    def count(self, n: int, ratio: float) -> int:
        return n // self.size * self.each(ratio) + math.ceil(ratio * (n % self.size))

    def places(self, n: int, count: int) -> list[Field]:
        return [("index", torch.int16, count)]

    def encode(self, kernels: Any, x: Tensor, residual: Tensor | None, ratio: float, values: Tensor, index: Tensor) -> None:
        kernels.blocktopk_encode(x, residual, kernels.loss_scale, values, index, self.each(ratio))

    def add(self, kernels: Any, residual: Tensor, ratio: float, error: Tensor, index: Tensor) -> None:
        kernels.blocktopk_add(residual, kernels.loss_scale, error, index, self.each(ratio))

    def positions(self, n: int, ratio: float, index: Tensor) -> Tensor:
        blocks, index = n // self.size, index.long()
        block = torch.arange(index.numel(), device=index.device) // self.each(ratio)
        whole = (index // 32 * blocks + block) * 32 + index % 32
        return torch.where(torch.arange(index.numel(), device=index.device) < blocks * self.each(ratio), whole, blocks * self.size + index)

    def decode_sum(self, kernels: Any, out: Tensor, weight: float, ratio: float, values: Tensor, index: Tensor) -> None:
        kernels.blocktopk_decode_sum(out, weight, values, index, self.each(ratio))


SCOPES = {"global": Global(), "threshold": Threshold(), "block": Block()}
