"""How the places of a sparse list travel: a coding has fields(n, places), those of a message, and write(...) and read(...)
between these and the places as the ops take them, of which the first is index, int16 [k]."""

import functools
from typing import Any

import torch
from torch import Tensor

from ..wire import Field


class Plain:
    """16 bits each. The fields are the places: there is nothing to write or read."""

    def fields(self, n: int, places: list[Field]) -> list[Field]:
        return places


class Bits:
    """The low bits of each, one after the other."""

    def __init__(self, width: int):
        self.width = width

    def fields(self, n: int, places: list[Field]) -> list[Field]:
        return [("places", torch.uint8, -(-places[0][2] * self.width // 8))]

    def write(self, kernels: Any, n: int, places: tuple[Tensor, ...], fields: tuple[Tensor, ...]) -> None:
        kernels.bits_pack(*places, *fields, self.width)

    def read(self, kernels: Any, n: int, places: tuple[Tensor, ...], fields: tuple[Tensor, ...]) -> None:
        kernels.bits_unpack(*fields, *places, self.width)


class EliasFano:
    """An ascending list of k among n elements in k (l + 1) + n / 2^l bits, whatever it holds: l low bits of each, and the
    others in unary, a bit for each entry and one for each stretch of 2^l elements (Elias, "Efficient storage and retrieval
    by content and address of static files", J. ACM 1974; Fano, 1971). For k = n / 100 that is 8.56 bits an entry, where the
    entropy of a random list is 8.08."""

    @staticmethod
    @functools.lru_cache  # asked for each row of each message
    def low_bits(n: int, k: int) -> int:
        return min(range(1, 17), key=lambda bits: k * bits + (n >> bits))

    def fields(self, n: int, places: list[Field]) -> list[Field]:
        k = places[0][2]
        bits = self.low_bits(n, k)
        return [("low", torch.uint8, -(-k * bits // 8)), ("high", torch.uint8, -(-(k + (n >> bits)) // 8))]

    def write(self, kernels: Any, n: int, places: tuple[Tensor, ...], fields: tuple[Tensor, ...]) -> None:
        (index, starts), (low, high) = places, fields
        bits = self.low_bits(n, index.numel())
        kernels.bits_pack(index, low, bits)
        kernels.eliasfano_pack(index, starts, high, n, bits)

    def read(self, kernels: Any, n: int, places: tuple[Tensor, ...], fields: tuple[Tensor, ...]) -> None:
        (index, starts), (low, high) = places, fields
        bits = self.low_bits(n, index.numel())
        kernels.bits_unpack(low, index, bits)
        kernels.eliasfano_unpack(high, index, starts, n, bits)


PLAIN = Plain()
