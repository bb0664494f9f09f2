from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .base import Compressor, check_block, register
from .rotation import rotatable


class _Integers(Compressor):
    """Blocks of `block` values that share one float32 scale, the block's largest magnitude over the number of levels L
    (Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022; Alistarh et al., "QSGD", NeurIPS 2017).

        s = max |block| / L,   q = round(x / s) in [-L, L],   decoded = q s

    rounding=nearest: to nearest, ties to even; |decoded - x| <= s / 2. Deterministic, hence biased.
    rounding=stochastic: up with the probability of the fraction; unbiased, |decoded - x| < s. The random numbers are
        those of Philox keyed by (seed, step, stream, index): every backend draws the same.
    A block with an infinity or a NaN travels as a NaN scale, so that all ranks see it.

    collective=two_shot: every rank has scales of its own, and the owner of a shard encodes the sum of what arrives again.
    collective=integer_sum: s = max |block of any rank| / L, for which the ranks' largest magnitudes travel ahead; then the q are
        added up as integers of 4, 8 or 16 bits, the fewest that hold the sum of all ranks, and no second encoding loses
        anything (Mishchenko et al., "IntSGD", ICLR 2022; Li et al., "THC", NSDI 2024). What goes by fields() is the two_shot.
    """

    bits: ClassVar[int]
    witness = "scales"

    def __post_init__(self):
        check_block(self.block)
        if self.collective == "integer_sum" and getattr(self, "rotate", "none") != "none":
            raise ValueError(f"rotate={self.rotate} needs collective=two_shot")

    @property
    def biased(self) -> bool:
        return self.rounding == "nearest"

    def fields(self, n):
        codes = ("codes", torch.int8, n) if self.bits == 8 else ("codes", torch.uint8, -(-n * self.bits // 8))
        return [codes, ("scales", torch.float32, -(-n // self.block))]

    def encode(self, kernels, x, residual, codes, scales):
        stochastic = self.rounding == "stochastic"
        kernels.quant_encode(x, residual, kernels.loss_scale, codes, scales, self.bits, self.block, stochastic, kernels.draw)

    def decode_sum(self, kernels, out, weight, codes, scales):
        kernels.quant_decode_sum(out, weight, codes, scales, self.bits, self.block)

    def resum(self, kernels, total, residual, rows, fields):
        stochastic = self.resent().rounding == "stochastic"
        kernels.quant_resum(total.numel(), *rows, residual, kernels.loss_scale, *fields, self.bits, self.block, stochastic, kernels.draw)

    # What an integer_sum does, in this order. absmax: int32 [ceil(n / block)]. codes: uint8, the bytes of whole words.

    @property
    def levels(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def shared_width(self, world: int) -> int:
        """The bits of a code that hold the sum of this many ranks' codes."""
        for width in (4, 8, 16):
            if 2 * self.levels * world < 2**width:
                return width
        raise ValueError(f"{self}: integers of 16 bits hold the sum of {(2**16 - 1) // (2 * self.levels)} ranks at most, not of {world}; "
                         "use collective=two_shot, or fewer bits")

    def shared_words(self, n: int, world: int) -> tuple[int, int]:
        """int32 words of absmax and of codes."""
        return -(-n // self.block), -(-n * self.shared_width(world) // 32)

    def measure(self, kernels: Any, x: Tensor, residual: Tensor | None, absmax: Tensor) -> None:
        """absmax <- this rank's largest magnitudes. Their maximum over the ranks, as integers, is what the others take."""
        kernels.quant_absmax(x, residual, kernels.loss_scale, absmax, self.block)

    def encode_shared(self, kernels: Any, x: Tensor, residual: Tensor | None, absmax: Tensor, codes: Tensor, world: int) -> None:
        """codes <- those of x + residual. Their sum over the ranks, of int32 words, is what decode_shared takes."""
        kernels.quant_encode_shared(x, residual, kernels.loss_scale, absmax, codes, self.levels, self.shared_width(world), self.block,
                                    self.rounding == "stochastic", kernels.draw)

    def decode_shared(self, kernels: Any, out: Tensor, weight: float, absmax: Tensor, codes: Tensor, world: int) -> None:
        """out <- weight * the sum of what the ranks have encoded."""
        kernels.quant_decode_shared(out, weight, codes, absmax, world, self.levels, self.shared_width(world), self.block,
                                    self.rounding == "stochastic")


@register("int8")
class Int8(_Integers):
    __doc__ = "8-bit integers, L = 127; 1 + 4/block bytes per value.\n\n    " + _Integers.__doc__
    bits = 8
    uses = {"int8": "the default choice", "int8:rounding=stochastic": "the same without bias"}

    block: int = 256
    rounding: Literal["nearest", "stochastic"] = "nearest"
    collective: Literal["two_shot", "integer_sum"] = "two_shot"
    ef: bool = False


@register("int4")
@rotatable
class Int4(_Integers):
    __doc__ = "4-bit integers, L = 7, two to a byte; 1/2 + 4/block bytes per value.\n\n    " + _Integers.__doc__
    bits = 4
    uses = {"int4": "slow links", "int4:rotate=hadamard": "the same, for gradients with outliers"}

    block: int = 128
    rounding: Literal["nearest", "stochastic"] = "nearest"
    rotate: Literal["none", "hadamard"] = "none"
    collective: Literal["two_shot", "integer_sum"] = "two_shot"
    ef: bool = True


@register("int2")
@rotatable
class Int2(_Integers):
    __doc__ = """2-bit integers, L = 1, stored as q + 1, four to a byte; 1/4 + 4/block bytes per value.

    rounding=nearest has s = max |block| / 2, and what is larger than 3/2 s goes to s too: |decoded - x| <= s, and
    |decoded - x|^2 <= |x|^2 - 3/4 max^2 summed over a block, a contraction. With s = max |block| most values would round to
    zero: over blocks of 64 normal values that loses 52 % of the energy, this 20 %, of which error feedback keeps 24 %.

    """ + _Integers.__doc__
    bits = 2
    uses = {"int2": "very slow links, any number of ranks"}

    block: int = 64
    rounding: Literal["nearest", "stochastic"] = "nearest"
    rotate: Literal["none", "hadamard"] = "none"
    collective: Literal["two_shot", "integer_sum"] = "two_shot"
    ef: bool = True
