"""Who is compressed how.

    bucket    | conv.weight | conv.bias | fc.weight            | fc.bias |
    parts     | topk: one stretch, small tensors inside it are zeros        |
    exact                   | * * *     |                      | * * *   |   copied to their own field of the same message

A stretch of neighbours with the same compressor is one part, encoded in one pass over memory. Small tensors inside a part
travel exactly: their values go to the message's last field and the part sees zeros there, so that the residual of an
exact parameter is zero for ever. A part whose compressor works in rounds has no message: it sees its tensors one by one,
and exact elements anywhere in its bucket travel with the values of the first round.
"""

from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from ..compressors import Compressor, never_larger, parse
from ..wire import Field, Layout

EXACT_BELOW = 1024  # a tensor with fewer elements, or with one dimension, travels exactly unless a rule says otherwise


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
            return [field for _, way, count in self.rounds for field in way.fields(count)]
        return self.compressor.fields(self.stop - self.start)

    @property
    def rounds(self) -> list[tuple[str, Compressor, int]]:
        return self.compressor.rounds([shape for _, shape in self.tensors])

    def kept(self, residual: Tensor | None) -> Tensor | None:
        """What the compressor gets of a residual [n] or [slots, n]: all of its slots, or none without error feedback."""
        if residual is None or not self.compressor.ef:
            return None
        return residual[0] if residual.dim() > 1 and self.compressor.slots == 1 else residual

    def of(self, residual: Tensor | None) -> Tensor | None:
        """Its stretch of that."""
        return narrow(self.kept(residual), self.start, self.stop)

    def within(self, start: int, stop: int) -> "Part":
        """What lies in a stretch of the bucket."""
        tensors = tuple(tensor for tensor in self.tensors if start <= tensor[0] < stop)
        return Part(max(self.start, start), min(self.stop, stop), self.compressor, tensors)

    def shifted(self, by: int, compressor: Compressor) -> "Part":
        """With positions relative to another place, and another compressor perhaps."""
        tensors = tuple((at + by, shape) for at, shape in self.tensors)
        return Part(self.start + by, self.stop + by, compressor, tensors)


def narrow(t: Tensor | None, start: int, stop: int) -> Tensor | None:
    """t[..., start:stop]; t itself where that is all of it, which is usual, since a view takes as long as a launch."""
    return t if t is None or (start == 0 and stop == t.shape[-1]) else t[..., start:stop]


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
    spans = [torch.arange(s, e, device="cpu") for s, e in exact if any(start <= s < end for start, end in lossy)]
    inside = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64, device="cpu")
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
