"""What every compressor is: a frozen dataclass that says which fields its message has and how to fill and sum them."""

from collections.abc import Generator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..spec import Table, keys
from ..wire import Field, Layout

_table = Table("compressor")
register, composed, parse = _table.register, _table.composed, _table.parse

STEADY = 1 << 62  # a step after every warm-up


class Compressor:
    """Turns a gradient into a message and messages into their sum. Stateless: the residual belongs to the caller.

    `collective` says how messages combine: "sum" (an all-reduce of the gradient itself), "gather" (every rank gets every
    message), "two_shot" (shards are summed by their owner, who sends the compressed sum to all), "sparse_two_shot" (the
    same with shards of equally many entries), "integer_sum" (an all-reduce adds integers: such a method has shared_words,
    measure, encode_shared and decode_shared beside the others) or "rounds" (what is sent depends on a mean that came before: such a method
    has `rounds` and `average` in place of encode and decode_sum). It may be a key of the spec. "auto" leaves it to the number of ranks.
    `biased` is whether the expected decoded value differs from the gradient; then error feedback is what makes it converge.
    `loses` is what a biased one without error feedback loses.
    `keeps_zero` is whether a zero without a residual is decoded as zero; where not, the exact parameters inside a part,
    zeros to the compressor, would gather a residual, and the plan clears it.
    `witness` names the field that holds a NaN or an infinity exactly when the gradient did, for `finite` to look at.
    `uses` are the specs that its users want, and when: {spec: a few words}.
    `slots` is how many float32 values it keeps for each gradient value: 1 is the residual; with more, what encode gets as
    its residual is [slots, n] and row 0 is what was not sent.
    """

    name: ClassVar[str]
    collective: ClassVar[str]
    biased: ClassVar[bool] = True
    loses: ClassVar[str] = "rounding"
    keeps_zero: ClassVar[bool] = True
    witness: ClassVar[str] = "values"
    uses: ClassVar[dict[str, str]] = {}
    slots: ClassVar[int] = 1
    ef: bool = False  # a key of every lossy compressor

    def fields(self, n: int) -> list[Field]:
        """(name, dtype, count) of each field of the message for n gradient elements."""
        raise NotImplementedError

    def encode(self, kernels: Any, x: Tensor, residual: Tensor | None, *fields: Tensor) -> None:
        """fields <- C(x + residual), residual <- x + residual - decoded, by the ops of `kernels` (backends.select). Values of
        the tensors change, never their shapes: they are the plan's, the same in each step."""
        raise NotImplementedError

    def decode_sum(self, kernels: Any, out: Tensor, weight: float, *fields: Tensor) -> None:
        """out <- weight * sum of the rows, in rank order. Fields are [rows, count]."""
        raise NotImplementedError

    def finite(self, fields: dict[str, Tensor]) -> Tensor:
        """Whether no row of a message's fields, [rows, count] by name, shows an infinity or a NaN: bool []."""
        return all_finite(*fields[self.witness])

    def takes(self, shape: torch.Size) -> bool:
        """Whether it compresses a tensor of this shape. What it does not take travels exactly."""
        return True

    def rounds(self, shapes: list[torch.Size]) -> list[tuple[str, "Compressor", int]]:
        """(name, way, count) of the values that are averaged in each round, of which there are at most two, for tensors of
        these shapes. They travel as messages of another compressor, the way, without a residual: what is lost on the way,
        twice, is that of every rank alike, and `average` finds it in what it gets. It computes with float32."""
        raise NotImplementedError

    def average(self, kernels: Any, tensors: list[Tensor], residuals: list[Tensor] | None, *values: Tensor) -> Generator[None]:
        """tensors <- the decoded mean of all ranks' tensors + residuals, residuals <- what this rank has not sent. A
        generator: fills values[0], yields, finds their mean over the ranks there, fills values[1], and so on. It goes on
        behind the last yield only when all rounds went well, so residuals change there. All ranks decode the same."""
        raise NotImplementedError

    def at(self, step: int) -> "Compressor":
        """The compressor to use in the given compressed step, counted from 0; differs from self during a warm-up."""
        return self

    def entries(self, n: int) -> int:
        """How many of n elements a message names, where it names some and that number can be chosen; else 0."""
        return 0

    def naming(self, entries: int, n: int) -> "Compressor":
        """The same, with that many entries for n elements."""
        raise NotImplementedError

    def resum(self, kernels: Any, total: Tensor, residual: Tensor | None, rows: list[Tensor], fields: list[Tensor]) -> None:
        """fields <- C(the sum of the rows + residual), residual <- what that misses; what the owner of a shard does in a
        two_shot. rows: fields [rows, count]. total: float32 [n], to work in; whoever needs no such place may leave it as it is."""
        self.decode_sum(kernels, total, 1.0, *rows)
        self.resent().encode(kernels, total, residual, *fields)

    @property
    def within_node(self) -> "Compressor":
        """What a hierarchical exchange uses among the ranks of a machine."""
        return parse("none")

    @property
    def between_nodes(self) -> "Compressor":
        """What it uses between machines."""
        return self

    def resent(self) -> "Compressor":
        """The compressor that a two_shot encodes the sum of a shard with; differs from self where that sum must be treated
        otherwise than a gradient. Same fields, decoded by self."""
        return self


def all_finite(*tensors: Tensor) -> Tensor:
    """Whether they hold no infinity and no NaN; bool []. One read of each, no copy, and as few launches as there can be: a NaN is
    both extremes, and zero times an infinity is a NaN."""
    extremes = [torch.aminmax(tensor) for tensor in tensors if tensor.numel()]
    if not extremes:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device)
    if len(extremes) == 1:
        (least, greatest), = extremes
        return torch.sub(greatest, least, alpha=0) < torch.inf
    return (torch.stack([extreme for both in extremes for extreme in both]) * 0 == 0).all()


def compressors() -> dict[str, dict[str, tuple[type, Any]]]:
    """Name -> {key: (type, default)} of every registered compressor."""
    return {name: keys(cls) for name, cls in sorted(_table.classes.items())}


def check_block(block: int) -> None:
    """ValueError unless the kernels can take blocks of this length: eight elements are their unit, and one random draw's."""
    if block < 8 or block % 8 or block > 65536:
        raise ValueError(f"block must be a multiple of 8 from 8 to 65536, got {block}")


def never_larger(compressor: Compressor, n: int, dtype: torch.dtype = torch.float32) -> Compressor:
    """The compressor, or `none` where its message for n gradient elements would be no smaller than the gradient itself."""
    dense = n * dtype.itemsize
    return compressor if Layout(compressor.fields(n)).nbytes < dense else parse("none")


def wire_bytes(spec: str | Compressor, n: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one message for a gradient of n elements, exact and known before the first step.

    `none` sends the gradient itself. Where a message would be no smaller than that, the gradient is sent.
    """
    if n < 0:
        raise ValueError(f"n must be the number of gradient elements, got {n}")
    compressor = never_larger(parse(spec), n, dtype)
    if compressor.name == "none":
        return n * dtype.itemsize
    return Layout(compressor.fields(n)).nbytes


def overview(n: int = 1 << 24) -> list[dict[str, Any]]:
    """What there is, mildest first: spec, bits per value of a float32 gradient of n elements, bias, collective, when to use it."""
    rows = []
    for cls in _table.classes.values():
        for spec, when in (vars(cls).get("uses") or {str(cls()): ""}).items():
            compressor = parse(spec)
            bias = "none" if not compressor.biased else "error feedback" if compressor.ef else compressor.loses
            rows.append({"spec": spec, "bits": 8 * wire_bytes(spec, n) / n, "bias": bias, "collective": compressor.collective, "when": when})
    return sorted(rows, key=lambda row: -row["bits"])
