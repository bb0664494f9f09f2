from torch import Tensor

from ..plan import Plan
from .link import Link, Phases


def gather(plan: Plan, link: Link, x: Tensor, residual: Tensor | None) -> Phases:
    """Every rank sends its message to every other and adds all of them in rank order.

    (W - 1) messages per rank, one round. The choice for messages that are small or cannot be added without growing.
    """

    def encode(_: int) -> None:
        plan.message.encode(x, residual, plan.rows[plan.rank], plan.draw, plan.loss_scale)

    failed = yield link.gather(plan.rows, [plan.message.nbytes] * plan.world, encode, plan.number)
    if failed:
        raise failed
    plan.message.decode_sum(x, plan.weight, plan.rows)
    plan.finite = plan.message.finite(plan.rows)
