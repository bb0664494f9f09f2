from typing import Literal

import torch

from .base import Compressor, register


class _Microscaling(Compressor):
    """Blocks of 32 that share a power of two, X, in one byte c = log2 X + 127 (OCP Microscaling Formats (MX) Specification,
    version 1.0, 2023; the conversion is that of its section 6.3, bit for bit).

        X = 2^(floor(log2 max |block|) - E),   decoded = X element(x / X)

    E is the exponent of the element's largest value. Elements are rounded to nearest, ties to even; what is larger than the
    largest becomes it. Biased. A block with an infinity or a NaN travels as c = 0xff, so that all ranks see it.
    """

    collective = "two_shot"
    block = 32

    @property
    def element(self) -> str:
        raise NotImplementedError

    def fields(self, n):
        return [("codes", torch.uint8, -(-n // 2) if self.element == "e2m1" else n), ("scales", torch.uint8, -(-n // self.block))]

    def encode(self, kernels, x, residual, codes, scales):
        kernels.float_encode(
            x, residual, kernels.loss_scale, codes, scales, None, self.element, "e8m0", self.block, False, kernels.draw)

    def decode_sum(self, kernels, out, weight, codes, scales):
        kernels.float_decode_sum(out, weight, codes, scales, None, self.element, "e8m0", self.block)

    def finite(self, fields):
        return (fields["scales"] != 0xFF).all()


@register("mxfp8")
class MXFP8(_Microscaling):
    __doc__ = """8-bit floats, e4m3 (3 bits of mantissa, up to 448, E = 8) or e5m2 (2 bits, up to 57344, E = 15); 1 + 1/32 bytes
    per value. |decoded - x| <= max(2^-3 |x|, 2^-18 max |block|) for e4m3, and 2^-32 in the place of 2^-18 for e5m2.

    """ + _Microscaling.__doc__

    uses = {"mxfp8": "the open 8-bit block format"}

    format: Literal["e4m3", "e5m2"] = "e4m3"
    ef: bool = False

    @property
    def element(self):
        return self.format


@register("mxfp4")
class MXFP4(_Microscaling):
    __doc__ = """4-bit floats, 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign, two to a byte (E = 2); 1/2 + 1/32 bytes per value.
    |decoded - x| <= max(2^-2 |x|, 2^-4 max |block|).

    """ + _Microscaling.__doc__

    element = "e2m1"
    uses = {"mxfp4": "slow links; the open 4-bit block format"}

    ef: bool = True
