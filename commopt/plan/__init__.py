"""What stays the same for one bucket."""

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..compressors import Compressor, parse
from .message import Fields, Message
from .parts import EXACT_BELOW, Parameter, Part, compressor_for, layout, narrow, split

__all__ = ["EXACT_BELOW", "Fields", "Message", "Parameter", "Part", "Plan", "compressor_for", "layout", "narrow", "split"]

GRAIN = 1024  # a shard or a piece begins at a multiple of this many elements
PIECES = 8  # of a bucket at most: what is encoded before anything travels is an eighth, and a host's work is bounded
PIECE, PIECE_ON_DEVICE = 1 << 18, 1 << 22  # bytes to each peer in one at least: 2 ms of 1 Gbit/s, 0.3 ms of 100 Gbit/s
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # others are averaged exactly
_CUT = ("sum", "two_shot", "integer_sum")  # collectives of compressors that know no more than their stretch of a bucket, as shards do
FEW = 4  # ranks up to which lists are gathered: at most three are sent


class Plan:
    """One bucket's parameters and compressors, how its messages combine, and its residual; or those of a piece of it. What a
    collective needs beside, buffers and messages, it makes from this."""

    def __init__(
        self, number: int, parameters: list[Parameter], dtype: torch.dtype, device: torch.device, default: Compressor,
        rules: dict[str, Compressor], rank: int, world: int, seed: int = 0, nodes: tuple[tuple[int, ...], ...] = (),
    ):
        self.number, self.parameters, self.dtype, self.device = number, parameters, dtype, device
        self.start = self._index = 0  # where in the bucket it begins, and which piece it is
        self.rank, self.world, self.seed, self.step = rank, world, seed, 0
        self.nodes = nodes or (tuple(range(world)),)  # the ranks on each machine
        self.weight = 1.0 / world  # of the sum
        self.n = sum(p.numel for p in parameters)
        self.name = parameters[0].name  # random numbers are drawn by it
        self.parts, self.exact = split(parameters, default, rules, dtype)
        self.collective = self._collective()
        self.loss_scale: Tensor | None = None
        self.residual: Tensor | None = None  # float32 [n], or [slots, n]
        self.wants_residual = self.collective != "sum" and any(part.compressor.ef for part in self.parts)
        self.slots = max((part.compressor.slots for part in self.parts if part.compressor.ef), default=1)
        self.finite: list[Tensor] = []  # of the last exchange: bools [], all of them true where the mean is finite
        self.sent = self.size = 0  # see sends()

    def _collective(self) -> str:
        if self.dtype not in _FLOATS or self.n == 0:
            return "sum"
        lossy = {part.compressor.collective for part in self.lossy}
        if "auto" in lossy:
            lossy = lossy - {"auto"} | {"gather" if self.world <= FEW else "sparse_two_shot"}
        for first in ("hierarchical", "rounds"):  # these take the other compressors' messages with them
            if first in lossy:
                return first
        collective = "gather" if len(lossy) > 1 else lossy.pop() if lossy else "sum"  # every compressor's messages can be gathered
        if self.world == 2 and collective in ("two_shot", "sparse_two_shot"):
            collective = "gather"  # as many bytes, in one round, and rounded once
        if collective == "gather" and self.world > 1 and (self.world - 1) * layout(self.parts, self.exact.numel()).nbytes >= self.reduced:
            return self._summed()  # that would be more than an all-reduce
        if collective == "integer_sum":
            words = sum(sum(part.compressor.shared_words(part.stop - part.start, self.world)) for part in self.lossy)
            if 4 * words >= self.n * self.dtype.itemsize:
                return self._summed()
        return collective

    def _summed(self) -> str:
        self.parts, self.exact = [Part(0, self.n, parse("none"))], self.exact[:0]
        return "sum"

    def split_sum(self) -> None:
        """An ordinary sum is to be taken in its two halves, where it is one of floats."""
        if self.collective == "sum" and self.dtype in _FLOATS and self.n:
            self.collective = "split_sum"

    @property
    def exchange(self) -> int:
        """The number of its exchange, its own among all plans and pieces."""
        return PIECES * self.number + self._index

    @property
    def span(self) -> slice:
        """Where in its bucket it lies."""
        return slice(self.start, self.start + self.n)

    def pieces(self, sums: bool) -> list["Plan"]:
        """The stretches of this bucket, one after the other, that are exchanged each for itself, so that one is encoded while another
        travels, and what is needed first can go first; itself, where messages are small or go by what the whole bucket holds.
        sums: whether a plain sum is cut too, which gains only by the order."""
        if self.dtype not in _FLOATS or not all(part.compressor.collective in _CUT for part in self.parts):
            return [self]
        if self.collective == "sum" and not sums or self.collective not in (*_CUT, "split_sum", "gather"):
            return [self]
        nbytes = self.n * self.dtype.itemsize if self.summed else layout(self.parts, self.exact.numel()).nbytes
        to_each = nbytes if self.collective == "gather" else nbytes // self.world
        count = min(PIECES, to_each // (PIECE if self.device.type == "cpu" else PIECE_ON_DEVICE))
        if count < 2:
            return [self]
        return [self._piece(i, start, stop) for i, (start, stop) in enumerate(self.shards(count)) if start < stop]

    def _piece(self, index: int, start: int, stop: int) -> "Plan":
        piece = copy.copy(self)
        piece.parts, piece.exact = self._within(start, stop, lambda part: part.compressor)
        piece.start, piece._index, piece.n, piece.name = start, index, stop - start, f"{self.name}+{start}"
        ends = list(itertools.accumulate(p.numel for p in self.parameters))
        piece.parameters = [p for p, end in zip(self.parameters, ends) if end > start and end - p.numel < stop]
        return piece

    @property
    def summed(self) -> bool:
        """Whether the gradient itself is summed, in its own dtype."""
        return self.collective in ("sum", "split_sum")

    @property
    def reduced(self) -> int:
        """Bytes that each rank sends in a ring or halving all-reduce of the gradient."""
        return 2 * (self.world - 1) * self.n * self.dtype.itemsize // self.world

    @property
    def lossy(self) -> list[Part]:
        return [part for part in self.parts if part.compressor.name != "none"]

    @property
    def exactly(self) -> list[tuple[Tensor | slice, int]]:
        """Where in the bucket something travels exactly, and how many values: single ones inside parts, and whole parts."""
        large = [part for part in self.parts if part.compressor.name == "none"]
        return [(self.exact.to(self.device), self.exact.numel()), *((slice(part.start, part.stop), part.stop - part.start) for part in large)]

    @property
    def draw(self) -> tuple[int, int]:
        return self.seed, self.step

    def fresh_residual(self) -> Tensor | None:
        """Nothing kept yet, float32 [n] or [slots, n]; None where nothing will be."""
        shape = (self.n,) if self.slots == 1 else (self.slots, self.n)
        return torch.zeros(shape, dtype=torch.float32, device=self.device) if self.wants_residual else None

    def sends(self, own: int, size: int | None = None) -> None:
        """What the collective says of an exchange. own: bytes that this rank hands to the network. size: those of a rank on
        average, where they differ: all ranks have the same, and decide by it which exchanges travel together."""
        self.sent, self.size = own, own if size is None else size

    def shards(self, count: int) -> list[tuple[int, int]]:
        """The bucket in `count` stretches of about equal length."""
        size = -(-self.n // (count * GRAIN)) * GRAIN
        return [(min(i * size, self.n), min((i + 1) * size, self.n)) for i in range(count)]

    def message(self, start: int, stop: int, phase: str, compressor: Callable[[Part], Compressor] = lambda part: part.compressor) -> Message:
        """The message of a stretch. phase: one name for each message that a rank makes of it, so that each draws its own
        numbers. compressor: of a part in the stretch, with positions relative to the bucket."""
        parts, exact = self._within(start, stop, compressor)
        return Message(parts, exact, self.device, f"{self.name}/{phase}/{start}/{self.rank}", f"{self.name}/{start}")

    def _within(self, start: int, stop: int, compressor: Callable[[Part], Compressor]) -> tuple[list[Part], Tensor]:
        parts = [p.within(start, stop) for p in self.parts if max(p.start, start) < min(p.stop, stop)]
        parts = [p.shifted(-start, compressor(p)) for p in parts]
        return parts, self.exact[(self.exact >= start) & (self.exact < stop)] - start

    def stretch(self, start: int, stop: int, rank: int, world: int, compressor: Callable[[Part], Compressor]) -> "Plan":
        """The plan for a stretch that this rank, as `rank` of `world` others, sums in float32 with other compressors."""
        plan = copy.copy(self)
        plan.parts, plan.exact = self._within(start, stop, compressor)
        plan.rank, plan.world, plan.weight = rank, world, 1.0
        plan.dtype, plan.n, plan.name = torch.float32, stop - start, f"{self.name}+{start}"
        plan.collective = plan._collective()
        if plan.collective in ("sum", "integer_sum"):  # an all-reduce is one of all ranks
            plan.collective = "gather" if world == 2 else "two_shot"
        return plan

    def rows(self, nbytes: int) -> Tensor:
        """uint8 [world, nbytes]: a message from, or for, each rank."""
        return torch.zeros(self.world, nbytes, dtype=torch.uint8, device=self.device)

    def describe(self) -> dict:
        return {
            "parameters": [p.name for p in self.parameters],
            "elements": self.n,
            "exact_elements": self.exact.numel() if not self.summed else self.n,
            "specs": sorted({str(p.compressor) for p in self.parts}),
            "collective": self.collective,
            "bytes_raw": self.n * self.dtype.itemsize,
            "bytes_sent": self.sent,
        }
