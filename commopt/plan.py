"""What stays the same for one bucket: who is compressed how, where everything lies in the messages, and their buffers.

    bucket    | conv.weight | conv.bias | fc.weight            | fc.bias |
    parts     | topk: one stretch, small tensors inside it are zeros        |
    exact                   | * * *     |                      | * * *   |   copied to their own field of the same message

A stretch of neighbours with the same compressor is one part, encoded in one pass over memory. Small tensors inside a part
travel exactly: their values go to the message's last field and the part sees zeros there, so that the residual of an
exact parameter is zero for ever. A part whose compressor works in rounds has no message: it sees its tensors one by one,
and exact elements anywhere in its bucket travel with the values of the first round.
"""

import zlib
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .compressors import Compressor, never_larger, parse
from .wire import Field, Layout

EXACT_BELOW = 1024  # a tensor with fewer elements, or with one dimension, travels exactly unless a rule says otherwise
_SHARD = 1024  # shards of a two_shot begin at a multiple of this many elements


class Parameter(NamedTuple):
    name: str
    shape: torch.Size
    numel: int


class Part(NamedTuple):
    start: int
    stop: int
    compressor: Compressor
    tensors: tuple[tuple[int, torch.Size], ...] = ()  # where in the bucket what it compresses begins, and the shapes

    @property
    def fields(self) -> list[Field]:
        if self.compressor.collective == "rounds":
            return self.compressor.rounds([shape for _, shape in self.tensors])
        return self.compressor.fields(self.stop - self.start)

    def kept(self, residual: Tensor | None) -> Tensor | None:
        """What the compressor gets of a residual [n] or [slots, n]: all of its slots, or none without error feedback."""
        if residual is None or not self.compressor.ef:
            return None
        return residual[0] if residual.dim() > 1 and self.compressor.slots == 1 else residual


def compressor_for(parameter: Parameter, default: Compressor, rules: dict[str, Compressor]) -> Compressor:
    """The first rule with a pattern that matches the name; `a|b` are two patterns. Then: small tensors exact, others default.
    What a compressor does not take travels exactly."""
    for patterns, compressor in rules.items():
        if any(fnmatchcase(parameter.name, pattern) for pattern in patterns.split("|")):
            break
    else:
        small = len(parameter.shape) <= 1 or parameter.numel < EXACT_BELOW
        compressor = parse("none") if small else default
    return compressor if compressor.takes(parameter.shape) else parse("none")


def split(
    parameters: list[Parameter], default: Compressor, rules: dict[str, Compressor], dtype: torch.dtype
) -> tuple[list[Part], Tensor]:
    """The parts of a bucket, and the positions of the elements that travel exactly inside them, int64."""
    starts, exact, stop = [], [], 0  # where a part may begin, with what; the spans of small exact tensors
    for parameter in parameters:
        start, stop = stop, stop + parameter.numel
        compressor = compressor_for(parameter, default, rules)
        if compressor.name == "none" and parameter.numel < 64 * EXACT_BELOW:
            exact.append((start, stop))
        elif not starts or starts[-1][1] != compressor:
            starts.append((start if starts else 0, compressor, []))
        if starts and starts[-1][1] == compressor:
            starts[-1][2].append((start, parameter.shape))
    starts = starts or [(0, parse("none"), [])]
    ends = [start for start, *_ in starts[1:]] + [stop]
    parts = [Part(start, end, _paying(c, end - start, dtype), tuple(tensors)) for (start, c, tensors), end in zip(starts, ends)]
    lossy = [(p.start, p.stop) for p in parts if p.compressor.name != "none"]
    spans = [torch.arange(s, e) for s, e in exact if any(start <= s < end for start, end in lossy)]
    inside = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)
    if lossy and layout(parts, inside.numel()).nbytes >= stop * dtype.itemsize:  # little to compress among much that is exact
        return [Part(0, stop, parse("none"))], inside[:0]
    return parts, inside


def _paying(compressor: Compressor, n: int, dtype: torch.dtype) -> Compressor:
    """One that works in rounds takes only tensors that it makes smaller, whatever n is."""
    return compressor if compressor.collective == "rounds" else never_larger(compressor, n, dtype)


def layout(parts: list[Part], exact: int) -> Layout:
    """The fields of every part, and after them the values of `exact` elements."""
    fields = [field for part in parts for field in part.fields]
    return Layout([*fields, ("exact", torch.float32, exact)])


class Message:
    """How one stretch of a bucket becomes a row of bytes, and rows become their sum. Positions are relative to the stretch."""

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
        for part, kernels, fields, (stream, shared) in zip(self.parts, self.kernels, groups, self._streams):
            kernels.draw, kernels.shared_draw = (*draw, stream), (*draw, shared)
            if loss_scale is not None:
                kernels.loss_scale = loss_scale
            kept = part.kept(residual)
            kept = None if kept is None else kept[..., part.start : part.stop]
            part.compressor.encode(kernels, x[part.start : part.stop], kept, *fields)
        if residual is not None and self._lost_zeros.numel():
            residual.index_fill_(-1, self._lost_zeros, 0)

    def decode_sum(self, out: Tensor, weight: float, rows: Tensor) -> None:
        """out <- weight * the sum of the rows, uint8 [rows, at least nbytes], in their order."""
        groups, exact = self._fields(rows)
        for part, kernels, fields in zip(self.parts, self.kernels, groups):
            part.compressor.decode_sum(kernels, out[part.start : part.stop], weight, *fields)
        if self.exact.numel():
            total = exact[0].clone()
            for row in exact[1:]:
                total += row
            out.index_copy_(0, self.exact, total.mul_(weight).to(out.dtype))

    def finite(self, rows: Tensor) -> Tensor:
        """Whether no row shows an infinity or a NaN; bool []."""
        groups, exact = self._fields(rows)
        seen = torch.isfinite(exact).all()
        for part, fields in zip(self.parts, groups):
            names = [name for name, _, _ in part.fields]
            seen &= part.compressor.finite(dict(zip(names, fields)))
        return seen


class Round(NamedTuple):
    """Values to be averaged over the ranks, of which rank r sums row r. One tensor for each dtype that they travel in:

    values: float32 [world, shard], computed with. departing and arriving: uint8 [world, nbytes]; out and into: their rows in
    the dtypes that travel, [world, shard].
    """

    values: list[Tensor]
    departing: Tensor
    arriving: Tensor
    out: list[Tensor]
    into: list[Tensor]

    @property
    def nbytes(self) -> int:
        return self.departing.shape[1]

    @staticmethod
    def of(fields: list[Field], world: int, device: torch.device) -> tuple["Round", list[Tensor]]:
        """The round of some fields, and float32 views of its values for each of them."""
        dtypes = sorted({dtype for _, dtype, _ in fields}, key=str)
        counts = {dtype: sum(count for _, d, count in fields if d == dtype) for dtype in dtypes}
        shards = {dtype: 8 * -(-count // (8 * world)) for dtype, count in counts.items()}  # of whole 16 bytes
        rows = Layout([("", dtype, shard) for dtype, shard in shards.items()])
        departing, arriving = (torch.zeros(world, rows.nbytes, dtype=torch.uint8, device=device) for _ in range(2))
        values = {dtype: torch.zeros(world, shard, dtype=torch.float32, device=device) for dtype, shard in shards.items()}
        begin, views = dict.fromkeys(dtypes, 0), []
        for _, dtype, count in fields:
            views.append(values[dtype].view(-1)[begin[dtype] : begin[dtype] + count])
            begin[dtype] += count
        return Round(list(values.values()), departing, arriving, rows.views(departing), rows.views(arriving)), views


class Plan:
    """One bucket's parameters, compressors, messages and residual. Its buffers serve one exchange in flight."""

    def __init__(
        self, number: int, parameters: list[Parameter], dtype: torch.dtype, device: torch.device, default: Compressor,
        rules: dict[str, Compressor], rank: int, world: int, seed: int = 0,
    ):
        self.number, self.parameters, self.dtype, self.device = number, parameters, dtype, device
        self.rank, self.world, self.seed, self.step = rank, world, seed, 0
        self.n = sum(p.numel for p in parameters)
        self.parts, self.exact = split(parameters, default, rules, dtype)
        self.collective = self._collective()
        self.loss_scale: Tensor | None = None
        self.residual: Tensor | None = None  # float32 [n], or [slots, n]
        self.wants_residual = self.collective != "sum" and any(part.compressor.ef for part in self.parts)
        self.slots = max((part.compressor.slots for part in self.parts if part.compressor.ef), default=1)
        self.finite: Tensor | None = None
        self.sent = 0  # bytes that this rank hands to the network in one exchange
        if self.collective == "gather":
            self.message = self._message(0, self.n, "gather")
            self.rows = self._rows(self.message.nbytes)
            self.sent = (world - 1) * self.message.nbytes
        elif self.collective == "two_shot":
            self._cut()
        elif self.collective == "rounds":
            self._arrange()
        else:
            self.sent = self._reduced

    def _collective(self) -> str:
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16) or self.n == 0:
            return "sum"
        lossy = {part.compressor.collective for part in self.parts if part.compressor.name != "none"}
        if "rounds" in lossy:
            return "rounds"  # which gathers the other compressors' messages first
        collective = "gather" if len(lossy) > 1 else lossy.pop() if lossy else "sum"  # every compressor's messages can be gathered
        if collective == "gather" and (self.world - 1) * layout(self.parts, self.exact.numel()).nbytes >= self._reduced:
            self.parts, self.exact = [Part(0, self.n, parse("none"))], self.exact[:0]  # that would be more than an all-reduce
            return "sum"
        return collective

    @property
    def _reduced(self) -> int:
        """Bytes that each rank sends in a ring or halving all-reduce of the gradient."""
        return 2 * (self.world - 1) * self.n * self.dtype.itemsize // self.world

    def _message(self, start: int, stop: int, phase: str) -> Message:
        parts = [
            Part(max(p.start, start) - start, min(p.stop, stop) - start, p.compressor.resent() if phase == "sum" else p.compressor)
            for p in self.parts if p.start < stop and p.stop > start
        ]
        exact = self.exact[(self.exact >= start) & (self.exact < stop)] - start
        name = self.parameters[0].name
        return Message(parts, exact, self.device, f"{name}/{phase}/{start}/{self.rank}", f"{name}/{start}")

    def _rows(self, nbytes: int) -> Tensor:
        return torch.zeros(self.world, nbytes, dtype=torch.uint8, device=self.device)

    def _cut(self) -> None:
        """Shard r of the bucket belongs to rank r, who sums it."""
        size = -(-self.n // (self.world * _SHARD)) * _SHARD
        self.shards = [(min(r * size, self.n), min((r + 1) * size, self.n)) for r in range(self.world)]
        self.shares = [self._message(start, stop, "share") for start, stop in self.shards]
        self.sum = self._message(*self.shards[self.rank], "sum")
        longest = max(m.nbytes for m in self.shares)
        self.departing, self.arriving, self.sums = self._rows(longest), self._rows(longest), self._rows(longest)
        own = self.shares[self.rank].nbytes
        self.sent = sum(m.nbytes for m in self.shares) - own + (self.world - 1) * own

    def _arrange(self) -> None:
        """Round i averages the i-th field of every part, and the first one what travels exactly too."""
        parts = [p for p in self.parts if p.compressor.collective == "rounds"]
        others = [p for p in self.parts if p.compressor.collective not in ("rounds", "sum")]
        large = [(p.start, p.stop) for p in self.parts if p.compressor.name == "none"]
        self.exact = self.exact.to(self.device)
        self.rounds: list[Round] = []
        averaged: list[list[Tensor]] = [[] for _ in parts]  # of each part
        exact = [("", torch.float32, count) for count in (self.exact.numel(), *(stop - start for start, stop in large))]
        for i in range(max(len(p.fields) for p in parts)):
            taking = [fields for p, fields in zip(parts, averaged) if i < len(p.fields)]
            fields = [p.fields[i] for p in parts if i < len(p.fields)] + (exact if i == 0 else [])
            trip, values = Round.of(fields, self.world, self.device)
            self.rounds.append(trip)
            for held, field in zip(taking, values):
                held.append(field)
            if i == 0:
                self.exactly = list(zip([self.exact, *(slice(*span) for span in large)], values[len(parts) :]))
        self.methods = [(part, backends.select(self.device), fields) for part, fields in zip(parts, averaged)]
        name = f"{self.parameters[0].name}/rounds"
        self.message = Message(others, self.exact[:0], self.device, f"{name}/{self.rank}", name) if others else None
        self.rows = self._rows(self.message.nbytes if others else 0)
        self.sent = (self.world - 1) * (sum(2 * trip.nbytes for trip in self.rounds) + self.rows.shape[1])

    @property
    def draw(self) -> tuple[int, int]:
        return self.seed, self.step

    @property
    def weight(self) -> float:
        return 1.0 / self.world

    def describe(self) -> dict:
        return {
            "parameters": [p.name for p in self.parameters],
            "elements": self.n,
            "exact_elements": self.exact.numel() if self.collective != "sum" else self.n,
            "specs": sorted({str(p.compressor) for p in self.parts}),
            "collective": self.collective,
            "bytes_raw": self.n * self.dtype.itemsize,
            "bytes_sent": self.sent,
        }
