from dataclasses import dataclass, replace
from typing import ClassVar

from .base import Compressor, composed, parse


@composed("intra=")
@dataclass(frozen=True)
class Hierarchical(Compressor):
    """One compressor among the ranks of a machine, another between machines: `intra=none,inter=int4`, where what follows
    `inter=` is any spec (the scheme of CGX and of ZeRO++'s hierarchical exchange, Wang et al., ICLR 2024).

    Of G ranks on a machine each sums a G-th of the bucket over them and exchanges that with the other machines, so that
    between machines travel the bytes of `inter` for 1/G of the gradient per rank. intra: none, bf16, fp16 or another that
    is summed in shards.
    """

    intra: Compressor
    inter: Compressor

    name: ClassVar[str] = "hierarchical"
    collective: ClassVar[str] = "hierarchical"

    def __post_init__(self):
        if self.intra.collective not in ("sum", "two_shot"):
            raise ValueError(f"intra must be none or a spec that is summed in shards, such as bf16, got {self.intra}")
        if isinstance(self.inter, Hierarchical):
            raise ValueError(f"inter must be a spec without intra= and inter=, got {self.inter}")

    @staticmethod
    def read(text: str) -> "Hierarchical":
        intra, comma, inter = text.removeprefix("intra=").partition(",inter=")
        if not comma:
            raise ValueError(f"{text!r}: after intra=SPEC comes ,inter=SPEC, as in intra=none,inter=int4")
        return Hierarchical(parse(intra), parse(inter))

    def __str__(self) -> str:
        return f"intra={self.intra},inter={self.inter}"

    @property
    def ef(self) -> bool:
        return any(c.name != "none" and c.ef for c in (self.intra, self.inter))

    @property
    def biased(self) -> bool:
        return self.intra.biased or self.inter.biased

    @property
    def slots(self) -> int:
        return self.inter.slots

    @property
    def within_node(self):
        return self.intra

    @property
    def between_nodes(self):
        return self.inter

    def takes(self, shape):
        return self.inter.takes(shape)

    def at(self, step):
        return replace(self, intra=self.intra.at(step), inter=self.inter.at(step))

    def fields(self, n):
        """Those of a message between machines."""
        return self.inter.fields(n)
