import torch

from .base import Compressor

_ROTATE = """
    rotate=hadamard: acc is multiplied by fixed random signs D and each stretch of 128 by the orthonormal Walsh-Hadamard
        matrix H, and what is decoded by D H, so that an outlier does not crush its block (Suresh et al., "Distributed mean
        estimation with limited communication", ICML 2017; THC, NSDI 2024; SDP4Bit, NeurIPS 2024). A last stretch shorter
        than 128 stays as it is. The bounds hold for the rotated values, whose error has the same norm to 2^-20 |x|; the
        residual is acc - decoded as ever. A zero no longer arrives as zero, an infinity or a NaN spoils its whole stretch,
        and so may a magnitude above 3e37. It takes 4 bytes of scratch per value.
    """


def rotatable(cls: type[Compressor]) -> type[Compressor]:
    """Class decorator: what the key `rotate: Literal["none", "hadamard"]` of a method means."""
    encode, decode_sum, resum, keeps_zero = cls.encode, cls.decode_sum, cls.resum, cls.keeps_zero

    def encode_rotated(self, kernels, x, residual, *fields):
        if self.rotate == "none":
            return encode(self, kernels, x, residual, *fields)
        rotated = kernels.scratch("rotated", torch.float32, x.numel())
        kernels.hadamard_encode(x, residual, kernels.loss_scale, rotated)
        encode(self, kernels, rotated, None, *fields)
        if residual is not None:
            decode_sum(self, kernels, rotated, 1.0, *(field[None] for field in fields))
            kernels.hadamard_keep(x, residual, kernels.loss_scale, rotated)

    def decode_rotated(self, kernels, out, weight, *fields):
        if self.rotate == "none":
            return decode_sum(self, kernels, out, weight, *fields)
        rotated = kernels.scratch("rotated", torch.float32, out.numel())
        decode_sum(self, kernels, rotated, 1.0, *fields)  # the rotation of the sum is the sum of the rotations
        kernels.hadamard_decode(out, weight, rotated)

    def resum_rotated(self, kernels, total, residual, rows, fields):
        one_by_one = Compressor.resum if self.rotate != "none" else resum  # the residual is that of the values before the rotation
        one_by_one(self, kernels, total, residual, rows, fields)

    cls.encode, cls.decode_sum, cls.resum = encode_rotated, decode_rotated, resum_rotated
    cls.keeps_zero = property(lambda self: keeps_zero and self.rotate == "none")
    cls.__doc__ = cls.__doc__.rstrip() + "\n" + _ROTATE
    return cls
