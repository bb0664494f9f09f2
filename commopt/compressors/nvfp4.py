import torch

from .base import Compressor, register


@register("nvfp4")
class NVFP4(Compressor):
    """4-bit floats, 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign, in blocks of 16 that share an e4m3 scale, under one float32
    for all (NVIDIA, "Pretraining large language models with NVFP4", 2025).

        t = max |x| / (448 * 6),   s = e4m3(max |block| / 6 / t),   decoded = s t e2m1(x / (s t))

    Both rounded to nearest, ties to even. Biased. With B = max |block| at least max |x| / 28672, so that s is not denormal,
    |decoded - x| <= max(2^-2 |x|, B / 22); below that |decoded - x| <= B. 1/2 + 1/16 bytes per value, and 4 bytes.
    A gradient with an infinity or a NaN travels as one in t, the field whole, and all of it decodes to NaN.
    """

    collective = "two_shot"
    uses = {"nvfp4": "as mxfp4, with finer scales"}
    witness = "whole"
    block = 16

    ef: bool = True

    def fields(self, n):
        return [("codes", torch.uint8, -(-n // 2)), ("scales", torch.uint8, -(-n // self.block)), ("whole", torch.float32, 1)]

    def encode(self, kernels, x, residual, codes, scales, whole):
        kernels.absmax(x, residual, kernels.loss_scale, whole, 448.0 * 6.0)
        kernels.float_encode(
            x, residual, kernels.loss_scale, codes, scales, whole, "e2m1", "e4m3", self.block, False, kernels.draw)

    def decode_sum(self, kernels, out, weight, codes, scales, whole):
        kernels.float_decode_sum(out, weight, codes, scales, whole, "e2m1", "e4m3", self.block)
