import dataclasses

import torch

from .base import Compressor, register


@register("randomk")
class RandomK(Compressor):
    """One element, drawn at random, of each of k = ratio n strata of neighbours, whose sizes m differ by one at most
    (Stich et al., "Sparsified SGD with memory", NeurIPS 2018; Wangni et al., "Gradient sparsification for
    communication-efficient distributed optimization", NeurIPS 2018).

        ef=true:   decoded_i = x_i if drawn, else 0;     E |x - decoded|^2 = (1 - k/n) |x|^2 for equal m: a contraction
        ef=false:  decoded_i = m x_i if drawn, else 0;   E decoded = x: unbiased, E |x - decoded|^2 = (m - 1) |x|^2

    All ranks draw the same elements, by Philox keyed by (seed, step, bucket), so that indices cost nothing and sums are
    sent on without a loss. 4 ratio bytes per value. A stratum with an infinity or a NaN travels as a NaN.
    """

    collective = "two_shot"
    uses = {"randomk:ratio=0.01": "many ranks, where topk would gather too much"}

    ratio: float = 0.01
    ef: bool = True

    def __post_init__(self):
        if not 1e-6 <= self.ratio <= 1:
            raise ValueError(f"ratio must be from 1e-6 to 1, got {self.ratio}")

    @property
    def biased(self) -> bool:
        return self.ef

    def resent(self):
        return dataclasses.replace(self, ef=True)  # a sum has been scaled already

    def fields(self, n):
        return [("values", torch.float32, min(n, max(1, round(self.ratio * n))))]

    def encode(self, kernels, x, residual, values):
        kernels.randomk_encode(x, residual, kernels.loss_scale, values, not self.ef, kernels.shared_draw)

    def decode_sum(self, kernels, out, weight, values):
        kernels.randomk_decode_sum(out, weight, values, kernels.shared_draw)
