"""The upper bits of an ascending list of indices in unary (Elias, 1974; Fano, 1971); the low ones go through bits_pack."""

import torch
from torch import Tensor

from .bits import streamed
from .topk import in_tiles, positions


def eliasfano_pack(index: Tensor, starts: Tensor, high: Tensor, n: int, bits: int) -> None:
    """high: uint8 [ceil((k + n // 2^bits) / 8)] <- the list that topk_encode wrote of n elements, index: int16 [k], starts:
    int64 [ceil(n / 65536)], without the low `bits` bits of an element, 1 to 16: the j-th entry, element p, sets bit
    (p >> bits) + j, where bit b is bit b % 8 of byte b // 8. All others are 0."""
    position, _ = positions(n, index, starts)
    stream = torch.zeros(high.numel() * 8, dtype=torch.int64, device=high.device)
    stream[(position >> bits) + torch.arange(index.numel(), device=index.device)] = 1
    high.copy_(streamed(stream, 1))


def eliasfano_unpack(high: Tensor, index: Tensor, starts: Tensor, n: int, bits: int) -> None:
    """index: int16 [k], in which the low `bits` bits are, and starts: int64 [ceil(n / 65536)] <- the list that
    eliasfano_pack wrote. Behind its last bit any stream goes on in ones, so that there are k of them."""
    k = index.numel()
    length = k + (n >> bits)
    ones = (high.to(torch.int64)[:, None] >> torch.arange(8, device=high.device) & 1).flatten()[:length].nonzero().flatten()
    ones = torch.cat([ones, torch.arange(length, length + k, device=high.device)])[:k]
    low = index.to(torch.int64) & (1 << bits) - 1
    position = (ones - torch.arange(k, device=high.device) << bits) | low
    in_tiles(position, index, starts)
