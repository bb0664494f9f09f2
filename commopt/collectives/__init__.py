"""How messages travel. A collective is a generator over phases: it encodes, yields what has to arrive, and goes on when
it has. `run` turns it into an exchange: (plan, x) -> Future[x], x averaged in place."""

from .gather import gather
from .rounds import rounds
from .sum import sum
from .two_shot import two_shot

COLLECTIVES = {"sum": sum, "gather": gather, "two_shot": two_shot, "rounds": rounds}
