import torch

from .base import Compressor, register


@register("none")
class NoCompression(Compressor):
    """The gradient itself, summed by an ordinary all-reduce in its own dtype; equals plain DDP bit for bit.

    4 bytes per float32 value. In a message beside compressed parameters (a bias, a norm) the values travel as float32
    and are added in rank order.
    """

    collective = "sum"
    biased = False
    uses = {"none": "fast links, and for what must be exact: equals plain DDP bit for bit"}

    def fields(self, n):
        return [("values", torch.float32, n)]

    def encode(self, kernels, x, residual, values):
        kernels.dense_encode(x, residual, kernels.loss_scale, values)

    def decode_sum(self, kernels, out, weight, values):
        kernels.dense_decode_sum(out, weight, values)
