import torch

from .base import Compressor, register


@register("nvfp4")
class NVFP4(Compressor):
    """4-bit floats, 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign, in blocks of 16 that share an e4m3 scale, under one float32
    for all (NVIDIA, "Pretraining large language models with NVFP4", 2025).

        t = max |x| / (448 * 6),   s = e4m3(max |block| / 6 / t),   decoded = s t e2m1(x / (s t))

    Both rounded to nearest, ties to even. Biased. With B = max |block| at least max |x| / 28672, so that s is not denormal,
    |decoded - x| <= max(2^-2 |x|, B / 22); below that |decoded - x| <= B. 1/2 + 1/16 bytes per value, and 4 bytes.
    A gradient with an infinity or a NaN travels as one in the field absmax, and all of it decodes to NaN.
    """

    collective = "two_shot"
    witness = "absmax"
    block = 16

    ef: bool = True

    def fields(self, n):
        return [("codes", torch.uint8, -(-n // 2)), ("scales", torch.uint8, -(-n // self.block)), ("absmax", torch.float32, 1)]

    def encode(self, kernels, x, residual, codes, scales, absmax):
        kernels.absmax(x, residual, kernels.loss_scale, absmax)
        kernels.float_encode(
            x, residual, kernels.loss_scale, codes, scales, absmax, "e2m1", "e4m3", self.block, False, kernels.draw)

    def decode_sum(self, kernels, out, weight, codes, scales, absmax):
        kernels.float_decode_sum(out, weight, codes, scales, absmax, "e2m1", "e4m3", self.block)
