from typing import Literal

import torch

from .base import Compressor, register


@register("natural")
class Natural(Compressor):
    """Each value rounded to a power of two: a sign and how many octaves it lies below the block's largest, which is a byte
    (Horvath et al., "Natural compression for distributed deep learning", 2019, whose code has the whole exponent: 9 bits).

        decoded = sign(x) 2^k,   2^floor(log2 |x|) or twice that,   126 octaves and 0 below them

    rounding=stochastic: up with the probability of the fraction. Unbiased, E (decoded - x)^2 <= x^2 / 8.
    rounding=nearest: to the nearer of the two; |decoded - x| <= |x| / 3. Biased.
    Values from 2^127 on are sent as 2^127. 1 + 1/256 bytes per value. A block with an infinity or a NaN travels as the scale
    0xff, so that all ranks see it.
    """

    collective = "two_shot"
    uses = {"natural": "no bias and an error in proportion to each value"}
    block = 256

    rounding: Literal["stochastic", "nearest"] = "stochastic"
    ef: bool = False

    @property
    def biased(self) -> bool:
        return self.rounding == "nearest"

    def fields(self, n):
        return [("codes", torch.uint8, n), ("scales", torch.uint8, -(-n // self.block))]

    def encode(self, kernels, x, residual, codes, scales):
        stochastic = self.rounding == "stochastic"
        kernels.float_encode(
            x, residual, kernels.loss_scale, codes, scales, None, "power", "e8m0", self.block, stochastic, kernels.draw)

    def decode_sum(self, kernels, out, weight, codes, scales):
        kernels.float_decode_sum(out, weight, codes, scales, None, "power", "e8m0", self.block)

    def finite(self, fields):
        return (fields["scales"] != 0xFF).all()
