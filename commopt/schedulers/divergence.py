"""Refuses a training that diverges."""

import math

import torch
from torch import Tensor

GROWTH = 1000.0
_LEVEL = 64  # steps over which the running level forgets


class Divergence:
    """Sees the norm of each step's averaged gradient, which all ranks have alike, and raises the same RuntimeError on all of them
    when it is not finite, or more than GROWTH times its running level and larger than in the first step.

    The level is the geometric mean, which forgets over 64 steps. A norm that diverges grows by a factor r every step, and is
    r^64 times its level when that has adapted, beyond 1000 from r = 1.12 on; before it overflows it has grown by 10^38. A training
    that is well has spikes of ten to a hundred times its level. Norms that have fallen by many orders of magnitude, because a
    model fits its data, may jump by as many: but not to what they were at first.
    """

    def __init__(self):
        self._log_level: float | None = None
        self._first = 0.0

    def see(self, gradients: list[Tensor]) -> None:
        self.see_norm(norm(gradients))

    def see_norm(self, size: float) -> None:
        if not math.isfinite(size):
            raise _refusal(f"the norm of the averaged gradient is {size}")
        if size == 0.0:
            return
        if self._log_level is None:
            self._log_level, self._first = math.log(size), size
        level = math.exp(self._log_level)
        if size > GROWTH * level and size > self._first:
            raise _refusal(f"the norm of the averaged gradient is {size:.3g}, and was about {level:.3g}")
        self._log_level += (math.log(size) - self._log_level) / _LEVEL


def norm(gradients: list[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    return float(torch.linalg.vector_norm(torch.stack([n.double() for n in norms]))) if norms else 0.0


def _refusal(what: str) -> RuntimeError:
    return RuntimeError(f"commopt: {what}: training diverges with delayed gradients. Take a smaller learning rate, or "
                        'schedule="decoupled", which hides communication without delay')
