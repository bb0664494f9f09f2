"""PowerSGD by its authors: https://github.com/epfml/powersgd, whose README puts it between backward and the optimizer's step.

    powersgdR  R columns, one of the two factors in a step, in turns: R m or R n values of an m x n matrix

In its place here is a hook: the README leaves the residual in the gradient, to which the next backward adds, and here it
is a tensor beside it. All else is what its Config has by default, compressing from the first step on as in the README.
It averages all parameters at once, so there is one bucket, and nothing of it overlaps with backward.
PyPI's `powersgd` 0.0.2 holds no code.
"""

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..candidates import averaged_by, ring

LEAST_RATE = 2  # Config's min_compression_rate: what is not compressed more than that is sent as it is


def missing() -> str | None:
    return None if importlib.util.find_spec("powersgd") else "not installed (pip install git+https://github.com/epfml/powersgd.git)"


def wrap(name: str, model: nn.Module, bucket_mb: float) -> DistributedDataParallel:
    import powersgd

    ddp = DistributedDataParallel(model, bucket_cap_mb=1 << 20)
    parameters = list(ddp.parameters())
    aggregator = powersgd.PowerSGD(parameters, config=powersgd.Config(rank=_rank(name), start_compressing_after_num_steps=0))
    residuals = [torch.zeros_like(p) for p in parameters]

    def average(given: list[Tensor], gradients: list[Tensor]) -> None:
        of = {id(p): gradient for p, gradient in zip(given, gradients)}  # DDP changes their order
        for p, residual in zip(parameters, residuals):
            residual.add_(of[id(p)])
        for p, mean in zip(parameters, aggregator.aggregate(residuals)):  # and leaves in them what was not sent
            of[id(p)].copy_(mean)

    return averaged_by(average, ddp)


def rough(name: str) -> bool:
    return True


def bytes_per_step(name: str, ddp: DistributedDataParallel) -> float:
    """Mean of two steps."""
    return ring(4 * sum(_values(p.shape, _rank(name)) for p in ddp.parameters()))


def _rank(name: str) -> int:
    return int(name.removeprefix("powersgd"))


def _values(shape, rank: int) -> float:
    """What it reduces of a parameter: half of both factors. It decides by the dimensions as they are, and views what has more than two
    as a matrix."""
    total = shape.numel()
    if not total / (0.5 * min(rank, *shape) * sum(shape)) > LEAST_RATE:
        return total
    rows, columns = shape[0], total // shape[0]
    return 0.5 * min(rank, rows, columns) * (rows + columns)
