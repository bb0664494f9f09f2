import torch

from .base import Compressor, register


@register("bf16")
class BF16(Compressor):
    """bfloat16 values, each rounded to nearest even; added in float32, so the error does not grow with the world size
    as that of an all-reduce in bfloat16 does (by its square root).

        decoded = bf16(x),   |decoded - x| <= 2^-8 |x|

    2 bytes per value. Range of float32: neither overflow nor underflow.
    """

    collective = "two_shot"
    uses = {"bf16": "links at 10 Gbit/s and above"}

    ef: bool = False

    def fields(self, n):
        return [("values", torch.bfloat16, n)]

    def encode(self, kernels, x, residual, values):
        kernels.dense_encode(x, residual, kernels.loss_scale, values)

    def decode_sum(self, kernels, out, weight, values):
        kernels.dense_decode_sum(out, weight, values)
