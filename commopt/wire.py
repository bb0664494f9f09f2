"""The layout of a message: one flat row of bytes with no header.

A message is its fields in the order in which they are declared, little endian, each beginning at a multiple of 16 bytes;
the bytes between fields are zero, and the row ends at a multiple of 16. All ranks derive the same layout from the same
(spec, n), so nothing but values travels. Example: int8 with block=256 on n=300 elements:

    bytes    0..299   codes   int8 [300]
    bytes  304..311   scales  float32 [2]
    bytes  312..319   zero

The fields of a decoder's input are the same views over several rows: [rows, count], a row's bytes apart.
"""

import torch
from torch import Tensor

ALIGNMENT = 16
Field = tuple[str, torch.dtype, int]  # name, dtype, count


class Layout:
    """Where the fields of a row begin, and how long the row is."""

    def __init__(self, fields: list[Field]):
        self.fields = fields
        self.offsets: list[int] = []
        end = 0
        for _, dtype, count in fields:
            self.offsets.append(end)
            end += -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.nbytes = end

    def views(self, rows: Tensor) -> list[Tensor]:
        """The fields of uint8 [rows, at least nbytes] as [rows, count], or of one row as [count]."""
        return [
            rows[..., offset : offset + count * dtype.itemsize].view(dtype)
            for (_, dtype, count), offset in zip(self.fields, self.offsets)
        ]
