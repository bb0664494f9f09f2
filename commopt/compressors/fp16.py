import torch

from .base import Compressor, register


@register("fp16")
class FP16(Compressor):
    """float16 values with one power of two per block of 1024, which brings the block's largest magnitude into
    [2^14, 2^15): a plain float16 cast overflows above 65504 and loses gradients below 6e-8. Added in float32.

        decoded = s fp16(x / s),   |decoded - x| <= max(2^-11 |x|, 2^-39 max |block|)

    2 + 4/1024 bytes per value.
    """

    collective = "two_shot"
    uses = {"fp16": "three more bits than bf16; neither overflows nor underflows"}
    witness = "scales"
    block = 1024

    ef: bool = False

    def fields(self, n):
        return [("values", torch.float16, n), ("scales", torch.float32, -(-n // self.block))]

    def encode(self, kernels, x, residual, values, scales):
        kernels.half_encode(x, residual, kernels.loss_scale, values, scales, self.block)

    def decode_sum(self, kernels, out, weight, values, scales):
        kernels.half_decode_sum(out, weight, values, scales, self.block)
