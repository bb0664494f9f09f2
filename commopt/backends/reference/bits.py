"""A list of small integers as a stream of bits."""

import torch
from torch import Tensor


def streamed(words: Tensor, width: int) -> Tensor:
    """The low `width` bits of int64 [count] one after the other, lowest first, uint8 [ceil(count * width / 8)]."""
    bits = (words[:, None] >> torch.arange(width, device=words.device) & 1).flatten()
    padded = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.int64, device=words.device)
    padded[: bits.numel()] = bits
    return (padded.view(-1, 8) << torch.arange(8, device=words.device)).sum(1).to(torch.uint8)


def bits_pack(index: Tensor, packed: Tensor, width: int) -> None:
    """packed: uint8 [ceil(k * width / 8)] <- the low `width` bits of each of index, int16 [k]: entry i has the bits
    i * width to (i + 1) * width - 1, where bit b is bit b % 8 of byte b // 8. Bits after the last entry are 0."""
    packed.copy_(streamed(index.to(torch.int64), width))


def bits_unpack(packed: Tensor, index: Tensor, width: int) -> None:
    """index: int16 [k] <- what bits_pack has packed."""
    k = index.numel()
    bits = packed.to(torch.int64)[:, None] >> torch.arange(8, device=packed.device) & 1
    entries = (bits.flatten()[: k * width].view(k, width) << torch.arange(width, device=packed.device)).sum(1)
    index.copy_(((entries ^ 0x8000) - 0x8000).to(torch.int16))
