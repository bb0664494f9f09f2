from typing import Literal

import torch

from .base import Compressor, check_block, register
from .rotation import rotatable


class Signs(Compressor):
    collective = "two_shot"
    witness = "scales"
    keeps_zero = False

    def __post_init__(self):
        check_block(self.block)

    def fields(self, n):
        return [("signs", torch.uint8, -(-n // 8)), ("scales", torch.float32, -(-n // self.block))]

    def encode(self, kernels, x, residual, signs, scales):
        kernels.sign_encode(x, residual, kernels.loss_scale, signs, scales, self.block)

    def decode_sum(self, kernels, out, weight, signs, scales):
        kernels.sign_decode_sum(out, weight, signs, scales, self.block)


@register("sign")
@rotatable
class Sign(Signs):
    """One bit per value and the mean magnitude of its block (Seide et al., "1-bit stochastic gradient descent", Interspeech
    2014; Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019); 1/8 + 4/block bytes per value.

        s = mean |block|,   decoded = s or -s, the sign of x; that of a zero is positive
        |decoded - x|^2 = |x|^2 - block s^2 over a block: biased, and a contraction, which error feedback needs

    Of the energy of normal values it keeps 2 / pi, of heavy-tailed ones less.

    s is added up in 128 partial sums, element i to sum i % 128, and a tree of pairs: every backend adds in this order.
    A block with an infinity or a NaN travels as a NaN scale, so that all ranks see it; where the sum of finite magnitudes
    overflows, the largest float32 stands for it.
    """

    uses = {"sign": "the slowest links, any number of ranks"}

    block: int = 1024
    rotate: Literal["none", "hadamard"] = "none"
    ef: bool = True
