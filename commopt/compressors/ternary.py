from typing import Literal

import torch

from .base import Compressor, register
from .rotation import rotatable


@register("ternary")
@rotatable
class Ternary(Compressor):
    """TernGrad (Wen et al., "TernGrad: ternary gradients to reduce communication in distributed deep learning", NeurIPS
    2017): one of three values each, five to a byte in base 3; 1/5 + 4/block bytes per value, a last block counts whole.

        q in {-1, 0, 1},   decoded = q s,   s of blocks of `block` values

    rounding=stochastic: s = max |block| and q = sign x with probability |x| / s, else 0; unbiased, |decoded - x| < s. The
        random numbers are those of Philox keyed by (seed, step, stream, index): every backend draws the same. The variance
        is up to that of x times sqrt(block); averaging over ranks is what makes it small, error feedback does not.
    rounding=nearest: the values of int2, s = max |block| / 2, |decoded - x| <= s; biased, give it ef=true.
    A block with an infinity or a NaN travels as a NaN scale, so that all ranks see it.

    Byte j of a block holds its elements j, j + m, ..., j + 4 m, m = block / 5, as the sum of 3^i (q + 1).
    """

    collective = "two_shot"
    uses = {"ternary": "no bias below two bits, for many ranks"}
    witness = "scales"

    block: int = 320
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    rotate: Literal["none", "hadamard"] = "none"
    ef: bool = False

    def __post_init__(self):
        if self.block not in (blocks := [5 * 2**k for k in range(3, 9)]):
            raise ValueError(f"block must be one of {', '.join(map(str, blocks))}, got {self.block}")

    @property
    def biased(self) -> bool:
        return self.rounding == "nearest"

    def fields(self, n):
        blocks = -(-n // self.block)
        return [("codes", torch.uint8, blocks * (self.block // 5)), ("scales", torch.float32, blocks)]

    def encode(self, kernels, x, residual, codes, scales):
        stochastic = self.rounding == "stochastic"
        kernels.ternary_encode(x, residual, kernels.loss_scale, codes, scales, self.block, stochastic, kernels.draw)

    def decode_sum(self, kernels, out, weight, codes, scales):
        kernels.ternary_decode_sum(out, weight, codes, scales, self.block)
