"""Among which elements top-k takes the largest, and how it says where they were.

A scope has fields(n, ratio), the fields of the places; count(n, ratio), the entries of the list; encode(...), which fills
values: float32 [count] and the fields and returns the places as the ops take them; add(...), which returns an error to the
residual; positions(n, ratio, *places), where that is, int64 [count]; places(n, count), the layout of those places;
read(...), places of one row; and decode_sum.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..wire import Field

_TILE = 65536


class Global:
    """The whole bucket. An index is 16 bits within a tile of 65536 elements, and `starts` says where in the list a tile begins."""

    def count(self, n: int, ratio: float) -> int:
        return min(n, max(1, round(ratio * n)))

    def places(self, n: int, count: int) -> list[Field]:
        return [("index", torch.int16, count), ("starts", torch.int64, -(-n // _TILE))]

    def fields(self, n: int, ratio: float) -> list[Field]:
        return self.places(n, self.count(n, ratio))

    def encode(self, kernels: Any, x: Tensor, residual: Tensor | None, ratio: float, values: Tensor, *fields: Tensor) -> tuple[Tensor, ...]:
        workspace = kernels.scratch("workspace", torch.uint8, kernels.topk_workspace(x.numel(), values.numel()))
        kernels.topk_encode(x, residual, kernels.loss_scale, values, *fields, workspace)
        return fields

    def add(self, kernels: Any, residual: Tensor, ratio: float, error: Tensor, *places: Tensor) -> None:
        kernels.sparse_add(residual, kernels.loss_scale, error, *places)

    def positions(self, n: int, ratio: float, index: Tensor, starts: Tensor) -> Tensor:
        tile = torch.searchsorted(starts, torch.arange(index.numel(), device=index.device), right=True) - 1
        return tile * _TILE + (index.long() & 0xFFFF)

    def read(self, kernels: Any, n: int, places: list[Tensor], fields: list[Tensor]) -> None:
        for place, field in zip(places, fields):
            place.copy_(field)

    def decode_sum(self, kernels: Any, out: Tensor, weight: float, ratio: float, values: Tensor, *places: Tensor) -> None:
        kernels.topk_decode_sum(out, weight, values, *places)


class Block:
    """Each block of 1024 by itself, where a block is 32 lines of 32 elements at equal distances over the whole bucket, so
    that every layer is in every block. An index is 10 bits, packed over the whole list."""

    size, bits = 1024, 10

    def each(self, ratio: float) -> int:
        return max(1, round(ratio * self.size))

    def count(self, n: int, ratio: float) -> int:
        return n // self.size * self.each(ratio) + math.ceil(ratio * (n % self.size))

    def places(self, n: int, count: int) -> list[Field]:
        return [("index", torch.int16, count)]

    def fields(self, n: int, ratio: float) -> list[Field]:
        return [("places", torch.uint8, -(-self.count(n, ratio) * self.bits // 8))]

    def encode(self, kernels: Any, x: Tensor, residual: Tensor | None, ratio: float, values: Tensor, packed: Tensor) -> tuple[Tensor, ...]:
        index = kernels.scratch("index", torch.int16, values.numel())
        kernels.blocktopk_encode(x, residual, kernels.loss_scale, values, index, self.each(ratio))
        kernels.bits_pack(index, packed, self.bits)
        return (index,)

    def add(self, kernels: Any, residual: Tensor, ratio: float, error: Tensor, index: Tensor) -> None:
        kernels.blocktopk_add(residual, kernels.loss_scale, error, index, self.each(ratio))

    def positions(self, n: int, ratio: float, index: Tensor) -> Tensor:
        blocks, index = n // self.size, index.long()
        block = torch.arange(index.numel(), device=index.device) // self.each(ratio)
        whole = (index // 32 * blocks + block) * 32 + index % 32
        return torch.where(torch.arange(index.numel(), device=index.device) < blocks * self.each(ratio), whole, blocks * self.size + index)

    def read(self, kernels: Any, n: int, places: list[Tensor], fields: list[Tensor]) -> None:
        kernels.bits_unpack(*fields, *places, self.bits)

    def decode_sum(self, kernels: Any, out: Tensor, weight: float, ratio: float, values: Tensor, index: Tensor) -> None:
        kernels.blocktopk_decode_sum(out, weight, values, index, self.each(ratio))


SCOPES = {"global": Global(), "block": Block()}
