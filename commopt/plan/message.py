"""How one stretch of a bucket becomes a row of bytes, and rows become their sum."""

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import backends
from .parts import Part, layout


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
        self._counts = [len(part.fields) for part in parts]
        self.nbytes = self.layout.nbytes

    def _fields(self, rows: Tensor) -> tuple[list[list[Tensor]], Tensor]:
        *views, exact = self.layout.views(rows)
        ends = [sum(self._counts[: i + 1]) for i in range(len(self._counts))]
        return [views[end - count : end] for count, end in zip(self._counts, ends)], exact

    def encode(self, x: Tensor, residual: Tensor | None, row: Tensor, draw: tuple[int, int], loss_scale: Tensor | None) -> None:
        """row <- the message of x, which is left with zeros where it travels exactly. draw: (seed, step)."""
        groups, exact = self._fields(row)
        if self.exact.numel():
            exact.copy_(x[self.exact])
            x.index_fill_(0, self.exact, 0)
        for (part, kernels), fields in zip(self.ready(draw, loss_scale), groups):
            part.compressor.encode(kernels, x[part.start : part.stop], part.of(residual), *fields)
        if residual is not None and self._lost_zeros.numel():
            residual.index_fill_(-1, self._lost_zeros, 0)

    def ready(self, draw: tuple[int, int], loss_scale: Tensor | None) -> Iterator[tuple[Part, backends.Kernels]]:
        """Each part, and its kernels as the step needs them."""
        for part, kernels, (stream, shared) in zip(self.parts, self.kernels, self._streams):
            kernels.draw, kernels.shared_draw = (*draw, stream), (*draw, shared)
            if loss_scale is not None:
                kernels.loss_scale = loss_scale
            yield part, kernels

    def resum(self, total: Tensor, residual: Tensor | None, rows: Tensor, row: Tensor, draw: tuple[int, int], loss_scale: Tensor | None) -> None:
        """row <- the message of the sum of the rows and the residual. total: float32 [n], to work in."""
        groups, exact = self._fields(rows)
        into, exact_sum = self._fields(row)
        if self.exact.numel():
            _sum_in_order(exact, exact_sum)
        for (part, kernels), fields, summands in zip(self.ready(draw, loss_scale), into, groups):
            kept = part._replace(compressor=part.compressor.resent()).of(residual)
            part.compressor.resum(kernels, total[part.start : part.stop], kept, summands, fields)
        if residual is not None and self._lost_zeros.numel():
            residual.index_fill_(-1, self._lost_zeros, 0)

    def decode_sum(self, out: Tensor, weight: float, rows: Tensor) -> None:
        """out <- weight * the sum of the rows, uint8 [rows, at least nbytes], in their order."""
        groups, exact = self._fields(rows)
        for part, kernels, fields in zip(self.parts, self.kernels, groups):
            part.compressor.decode_sum(kernels, out[part.start : part.stop], weight, *fields)
        if self.exact.numel():
            total = _sum_in_order(exact, torch.empty_like(exact[0]))
            out.index_copy_(0, self.exact, total.mul_(weight).to(out.dtype))

    def finite(self, rows: Tensor) -> Tensor:
        """Whether no row shows an infinity or a NaN; bool []."""
        groups, exact = self._fields(rows)
        seen = torch.isfinite(exact).all()
        for part, fields in zip(self.parts, groups):
            names = [name for name, _, _ in part.fields]
            seen &= part.compressor.finite(dict(zip(names, fields)))
        return seen


def _sum_in_order(rows: Tensor, total: Tensor) -> Tensor:
    total.copy_(rows[0])
    for row in rows[1:]:
        total.add_(row)
    return total
