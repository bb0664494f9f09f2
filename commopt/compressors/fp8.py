from typing import Literal

import torch

from .base import Compressor, check_block, register


@register("fp8")
class FP8(Compressor):
    """8-bit floats in blocks that share one float32 scale, which brings the block's largest magnitude to that of the format
    (Micikevicius et al., "FP8 formats for deep learning", 2022): e4m3 has 3 bits of mantissa and ends at M = 448, e5m2 has
    2 bits and ends at M = 57344.

        s = max |block| / M,   decoded = s fp8(x / s)

    rounding=nearest: to nearest, ties to even; |decoded - x| <= max(2^-4 |x|, 2^-10 s) for e4m3, max(2^-3 |x|, 2^-17 s)
        for e5m2. Deterministic, hence biased.
    rounding=stochastic: up with the probability of the fraction; unbiased, the error less than twice that.
    1 + 4/block bytes per value. A block with an infinity or a NaN travels as a NaN scale, so that all ranks see it.
    """

    collective = "two_shot"
    uses = {"fp8": "as many bytes as int8, better where magnitudes differ within a block"}
    witness = "scales"

    format: Literal["e4m3", "e5m2"] = "e4m3"
    block: int = 256
    rounding: Literal["nearest", "stochastic"] = "nearest"
    ef: bool = False

    def __post_init__(self):
        check_block(self.block)

    @property
    def biased(self) -> bool:
        return self.rounding == "nearest"

    def fields(self, n):
        return [("codes", torch.uint8, n), ("scales", torch.float32, -(-n // self.block))]

    def encode(self, kernels, x, residual, codes, scales):
        stochastic = self.rounding == "stochastic"
        kernels.float_encode(
            x, residual, kernels.loss_scale, codes, scales, None, self.format, "float32", self.block, stochastic, kernels.draw)

    def decode_sum(self, kernels, out, weight, codes, scales):
        kernels.float_decode_sum(out, weight, codes, scales, None, self.format, "float32", self.block)
