"""What a collective is made of: it writes messages, yields what has to arrive, and goes on when it has."""

from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor


class Pending:
    """What has begun, arrivals and departures, and what already failed."""

    def __init__(self, works=(), failed: Exception | None = None):
        self._works, self._failed = works, failed

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

    begin(link, x, residual): the phases of an exchange, which averages x in place. sent: bytes that this rank hands to the
    network in one. hops: how many of its messages wait for one another. merges: whether it does no more with the link than
    to scatter and gather, so that its messages can travel in those of another exchange.
    """

    def __init__(self, begin: Callable[[Any, Tensor, Tensor | None], Phases], sent: int, hops: int, merges: bool = True):
        self.begin, self.sent, self.hops, self.merges = begin, sent, hops, merges


class _Both(Pending):
    def __init__(self, begun: list[Pending]):
        self._begun = begun

    def wait(self) -> Exception | None:
        failures = [pending.wait() for pending in self._begun]
        return next((failed for failed in failures if failed), None)


def together(running: list[Phases]) -> Phases:
    """Several exchanges, each phase of all of them before the next of any."""
    failed = failure = None
    while running:
        begun, goes_on = [], []
        for phases in running:
            try:
                begun.append(phases.send(failed))
                goes_on.append(phases)
            except StopIteration:
                pass
            except Exception as error:  # the others' rows are awaited elsewhere
                failure = failure or error
        running = goes_on
        if running:
            failed = yield _Both(begun)
    if failure:
        raise failure
