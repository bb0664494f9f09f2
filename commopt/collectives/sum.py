from torch import Tensor

from ..compressors import all_finite
from ..plan import Plan
from .link import Link
from .phases import Phases, Prepared


def sum(plan: Plan) -> Prepared:
    """An ordinary all-reduce of the gradient, divided first as DDP does it: equal to plain DDP bit for bit."""

    def begin(link: Link, x: Tensor, residual: Tensor | None) -> Phases:
        x.mul_(plan.weight)
        failed = yield link.all_reduce(x)
        if failed:
            raise failed
        if not x.is_sparse and not x.is_complex() and x.numel():
            plan.finite = [all_finite(x)]

    plan.sends(plan.reduced)
    return Prepared(plan, begin, phases=1, merges=False)
