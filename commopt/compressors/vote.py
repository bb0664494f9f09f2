import torch

from .base import register
from .sign import Signs


@register("vote")
class Vote(Signs):
    """One bit per value, and the sign that most ranks say (Bernstein et al., "signSGD with majority vote is communication
    efficient and fault tolerant", ICLR 2019); 1/8 + 4/block bytes per value.

        s_r = mean |block of rank r|,   decoded mean = v mean_r s_r,   v = sign of sum_r sign(x_r), of a tie sign of sum_r s_r sign(x_r)

    The owner of a shard sends on what it has counted, which is signs and scales again: the second half of a two_shot loses
    nothing. However large a value is, it is one vote; a large scale makes the step larger and decides ties, no more.

    Biased, and without error feedback, which needs a contraction: what arrives must be nearer to the mean than nothing is. A
    majority need not be. Of 10, -1 and -1 the mean is 8/3 and the vote -4. What it loses grows where it is kept.

    A block in which one rank has an infinity or a NaN travels as a NaN scale, so that all ranks see it.
    """

    uses = {"vote": "as sign, where no rank's outliers may turn the direction"}
    loses = "the minority"

    block: int = 1024

    def resum(self, kernels, total, residual, rows, fields):
        kernels.sign_vote(total.numel(), *rows, *fields, self.block)

    def decode_sum(self, kernels, out, weight, signs, scales):
        if signs.shape[0] > 1:
            voted = [kernels.scratch(f"voted {name}", dtype, count) for name, dtype, count in self.fields(out.numel())]
            self.resum(kernels, out, None, [signs, scales], voted)
            signs, scales = (field[None] for field in voted)
        super().decode_sum(kernels, out, weight, signs, scales)
