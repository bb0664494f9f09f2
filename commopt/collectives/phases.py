"""What a collective is made of: it writes messages, yields what has to arrive, and goes on when it has."""

import time
from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

from ..plan import Plan


class Pending:
    """What has begun, arrivals and departures, and what already failed."""

    def __init__(self, works=(), failed: Exception | None = None):
        self._works, self._failed, self.begun = works, failed, time.perf_counter()

    def wait(self) -> Exception | None:
        """What went wrong, or None. Never raises: a rank that stopped here would leave others waiting for its next row."""
        failed = self._failed
        for work in self._works:
            try:
                work.wait()
            except Exception as error:
                failed = failed or ConnectionError(str(error))
        return failed


Phases = Generator[Pending, Exception | None, None]  # yields what has to arrive, gets what failed


class Prepared:
    """A collective with its messages and buffers for one plan. Not for two exchanges at a time.

    begin(link, x, residual): the phases of an exchange, which averages x in place. phases: how many there are, unless one
    fails. merges: whether it does no more with the link than to scatter and gather, so that its messages can travel in those
    of another exchange.
    """

    def __init__(self, plan: Plan, begin: Callable[[Any, Tensor, Tensor | None], Phases], phases: int, merges: bool = True):
        self.plan, self.begin, self.phases, self.merges = plan, begin, phases, merges


class All(Pending):
    """What several exchanges have begun."""

    def __init__(self, begun: list[Pending]):
        self._all, self.begun = begun, time.perf_counter()

    def wait(self) -> Exception | None:
        failures = [pending.wait() for pending in self._all]
        return next((failed for failed in failures if failed), None)


def advance(running: list[Phases], failed: Exception | None) -> tuple[list[Pending | None], Exception | None]:
    """The next phase of each: what it has begun, or None for one that has ended, and what the first of those raised. One
    that raises does not stop the others, whose rows are awaited elsewhere."""
    begun: list[Pending | None] = []
    failure = None
    for phases in running:
        try:
            begun.append(phases.send(failed))
        except StopIteration:
            begun.append(None)
        except Exception as error:
            begun.append(None)
            failure = failure or error
    return begun, failure


def together(running: list[Phases]) -> Phases:
    """Several exchanges, each phase of all of them before the next of any."""
    failed = failure = None
    while running:
        begun, wrong = advance(running, failed)
        failure = failure or wrong
        running = [phases for phases, pending in zip(running, begun) if pending]
        if running:
            failed = yield All([pending for pending in begun if pending])
    if failure:
        raise failure
