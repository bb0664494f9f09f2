"""How one stretch of a bucket becomes a row of bytes, and rows become their sum."""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..compressors import all_finite
from .parts import Part, layout, narrow


class Fields(NamedTuple):
    """Where a message lies in a row of bytes, or each of several messages in its row: views of it, made once.

    parts: of each part its fields. exact: the values that travel exactly, float32 [count], or [rows, count]."""

    parts: list[list[Tensor]]
    exact: Tensor


class Message:
    """The fields of every part of a stretch, and what travels exactly in it. Positions are relative to the stretch."""

    def __init__(self, parts: list[Part], exact: Tensor, device: torch.device, identity: str, shared: str):
        self.parts, self.exact = parts, exact.to(device)
        self.kernels = [backends.select(device) for _ in parts]
        self._streams = [[zlib.crc32(f"{name}/{i}".encode()) for name in (identity, shared)] for i in range(len(parts))]
        self.layout = layout(parts, exact.numel())
        lost = torch.zeros_like(exact, dtype=torch.bool)
        for part in parts:
            if not part.compressor.keeps_zero:
                lost |= (exact >= part.start) & (exact < part.stop)
        self._lost_zeros = exact[lost].to(device)  # exact positions where a part would keep what it decodes for a zero
        self._names = [[name for name, _, _ in part.fields] for part in parts]
        self.nbytes = self.layout.nbytes

    def fields(self, rows: Tensor) -> Fields:
        """Of a row, uint8 [at least nbytes], or of rows, uint8 [rows, at least nbytes]."""
        *views, exact = self.layout.views(rows)
        views = iter(views)
        return Fields([[next(views) for _ in names] for names in self._names], exact)

    def encode(self, x: Tensor, residual: Tensor | None, into: Fields, draw: tuple[int, int], loss_scale: Tensor | None) -> None:
        """into <- the message of x, which is left with zeros where it travels exactly. into: of a row. draw: (seed, step)."""
        if self.exact.numel():
            into.exact.copy_(x[self.exact])
            x.index_fill_(0, self.exact, 0)
        for (part, kernels), fields in zip(self.ready(draw, loss_scale), into.parts):
            part.compressor.encode(kernels, narrow(x, part.start, part.stop), part.of(residual), *fields)
        if residual is not None and self._lost_zeros.numel():
            residual.index_fill_(-1, self._lost_zeros, 0)

    def ready(self, draw: tuple[int, int], loss_scale: Tensor | None) -> Iterator[tuple[Part, backends.Kernels]]:
        """Each part, and its kernels as the step needs them."""
        for part, kernels, (stream, shared) in zip(self.parts, self.kernels, self._streams):
            kernels.draw, kernels.shared_draw = (*draw, stream), (*draw, shared)
            if loss_scale is not None:
                kernels.loss_scale = loss_scale
            yield part, kernels

    def resum(self, total: Tensor, residual: Tensor | None, rows: Fields, into: Fields, draw: tuple[int, int], loss_scale: Tensor | None) -> None:
        """into <- the message of the sum of the rows and the residual. into: of a row. total: float32 [n], to work in."""
        if self.exact.numel():
            _sum_in_order(rows.exact, into.exact)
        for (part, kernels), fields, summands in zip(self.ready(draw, loss_scale), into.parts, rows.parts):
            kept = part._replace(compressor=part.compressor.resent()).of(residual)
            part.compressor.resum(kernels, narrow(total, part.start, part.stop), kept, summands, fields)
        if residual is not None and self._lost_zeros.numel():
            residual.index_fill_(-1, self._lost_zeros, 0)

    def decode_sum(self, out: Tensor, weight: float, rows: Fields) -> None:
        """out <- weight * the sum of the rows, in their order."""
        for part, kernels, fields in zip(self.parts, self.kernels, rows.parts):
            part.compressor.decode_sum(kernels, narrow(out, part.start, part.stop), weight, *fields)
        if self.exact.numel():
            total = _sum_in_order(rows.exact, torch.empty_like(rows.exact[0]))
            out.index_copy_(0, self.exact, total.mul_(weight).to(out.dtype))

    def finite(self, rows: Fields) -> list[Tensor]:
        """bools [], all of them true where no row shows an infinity or a NaN."""
        seen = [part.compressor.finite(dict(zip(names, fields))) for part, names, fields in zip(self.parts, self._names, rows.parts)]
        return seen + ([all_finite(rows.exact)] if rows.exact.numel() else [])


def _sum_in_order(rows: Tensor, total: Tensor) -> Tensor:
    total.copy_(rows[0])
    for row in rows[1:]:
        total.add_(row)
    return total
