from torch import Tensor

from ..plan import Plan
from .link import Link
from .phases import Phases, Prepared


def gather(plan: Plan) -> Prepared:
    """Every rank sends its message to every other and adds all of them in rank order.

    (W - 1) messages per rank, one round. The choice for messages that cannot be added without growing, and for any between
    two ranks.
    """
    message = plan.message(0, plan.n, "gather")
    rows, sizes = plan.rows(message.nbytes), [message.nbytes] * plan.world
    own, everyones = message.fields(rows[plan.rank]), message.fields(rows)

    def begin(link: Link, x: Tensor, residual: Tensor | None) -> Phases:
        def encode(_: int) -> None:
            message.encode(x, residual, own, plan.draw, plan.loss_scale)

        failed = yield link.gather(rows, sizes, encode, plan.exchange)
        if failed:
            raise failed
        message.decode_sum(x, plan.weight, everyones)
        plan.finite = message.finite(everyones)

    plan.sends((plan.world - 1) * message.nbytes)
    return Prepared(plan, begin, phases=1)
