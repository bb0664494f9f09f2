"""How messages travel. A collective makes its messages and buffers for a plan; its exchanges are generators over phases: they
encode, yield what has to arrive, and go on when it has. `run` makes (plan, x) -> Future[x] of them, x averaged in place."""

from ..plan import Plan
from .gather import gather
from .hierarchical import hierarchical
from .integer_sum import integer_sum
from .phases import Prepared
from .rounds import rounds
from .sparse_two_shot import sparse_two_shot
from .split_sum import split_sum
from .sum import sum
from .two_shot import two_shot

COLLECTIVES = {
    "sum": sum, "split_sum": split_sum, "gather": gather, "two_shot": two_shot, "sparse_two_shot": sparse_two_shot, "rounds": rounds,
    "integer_sum": integer_sum, "hierarchical": lambda plan: hierarchical(plan, prepare),
}


def prepare(plan: Plan) -> Prepared:
    """The plan's collective, ready for its exchanges. It says what the plan sends()."""
    return COLLECTIVES[plan.collective](plan)
