"""The order in which the phases of exchanges are launched: found on rank 0 from what all ranks have measured, the same on all.

What is measured of a step, all times in seconds:

    ready    of an exchange: from the first hand-in of the step until its own
    backward from the first hand-in until the end of the backward
    took     of a launch: how long it had the link for itself; of those under way at a time it is not known which one waited
             for which, so that as far as sizes go all are taken to have had the same latency and the same rate
    after    of an exchange: from its last arrival until the mean is there
    used     of an exchange: what is computed between the end of the backward and the first use of its mean, waiting left out;
             of one that is there before it is asked for, what the others make one expect
    rest     what is computed between the end of the backward and the next step's first hand-in

From these `simulate` tells how long a step takes in any order. The link carries one launch after the other; a launch begins
when the one before it has ended, its exchange is ready and the phase before it has arrived.
"""

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

import torch.distributed as dist

from .launcher import Launch, Launcher, Log

_DUE = (3, 8, 24)  # steps of the same buckets after which they are planned; then after every
_EVERY = 64
_BETTER = 0.98  # of the step's time: what a new order must reach to be worth a change
_TRIES = 400  # simulations


@dataclass
class Profile:
    ready: dict[int, float]
    backward: float
    took: dict[Launch, float]
    after: dict[int, float]
    used: dict[int, float]
    rest: float

    @classmethod
    def of(cls, log: Log, backward: float, uses: list[tuple[list[int], float, float]], end: float) -> "Profile":
        """backward: when it was over. uses: (exchanges, when they were asked for, for how long that waited). end: when the next step's
        first exchange was handed in. All by the clock of the log."""
        begin, waited, used = min(log.handed_in.values()), 0.0, {}
        for numbers, at, wait in uses:
            for number in numbers:
                used.setdefault(number, max(0.0, at - backward - waited))
            waited += wait
        took: dict[Launch, float] = {}
        free = 0.0
        for launch, ended in log.ended.items():
            took[launch] = ended - max(free, log.launched[launch])
            free = ended
        last = {number: ended for (number, _), ended in log.ended.items()}
        return cls({number: at - begin for number, at in log.handed_in.items()}, backward - begin, _fitted(took, log.sizes),
                   {number: done - last[number] for number, done in log.done.items() if number in last}, used, end - backward - waited)

    @classmethod
    def median(cls, profiles: list["Profile"]) -> "Profile":
        """Of each number, where it was measured."""

        def middle(tables: list[dict]) -> dict:
            values = defaultdict(list)
            for table in tables:
                for key, value in table.items():
                    values[key].append(value)
            return {key: statistics.median(some) for key, some in values.items()}

        ready, took, after, used = (middle([getattr(p, name) for p in profiles]) for name in ("ready", "took", "after", "used"))
        backward, rest = (statistics.median(getattr(p, name) for p in profiles) for name in ("backward", "rest"))
        return cls(ready, backward, took, after, used | _expected(ready, used, rest), rest)


def _fitted(took: dict[Launch, float], sizes: dict[int, float]) -> dict[Launch, float]:
    """Seconds of each launch by latency + size / rate, which fit what they took; neither is negative."""
    x, y = [sizes[number] for number, _ in took], list(took.values())
    slope, latency = statistics.linear_regression(x, y) if len(set(x)) > 1 else (0.0, sum(y) / max(1, len(y)))
    if slope < 0.0:
        slope, latency = 0.0, sum(y) / len(y)
    elif latency < 0.0:
        slope, latency = sum(y) / sum(x), 0.0
    return {launch: latency + slope * size for launch, size in zip(took, x)}


def _expected(ready: dict[int, float], used: dict[int, float], rest: float) -> dict[int, float]:
    """When those exchanges are used for which that was not measured: what is ready late is used early, as far as the others
    show that."""
    known = [number for number in used if number in ready]
    missing = [number for number in ready if number not in used]
    if len({ready[number] for number in known}) < 2:
        return {}
    slope, first = statistics.linear_regression([ready[number] for number in known], [used[number] for number in known])
    return {number: min(max(first + slope * ready[number], 0.0), rest) for number in missing} if slope < 0 else {}


def simulate(profile: Profile, order: list[Launch]) -> float:
    """Seconds from one step's first hand-in to the next one's."""
    now, there = 0.0, dict(profile.ready)
    for launch in order:
        now = max(now, there[launch[0]]) + profile.took[launch]
        there[launch[0]] = now
    now = profile.backward
    computed = 0.0
    for number, at in sorted(profile.used.items(), key=lambda use: use[1]):
        now, computed = max(now + at - computed, there[number] + profile.after.get(number, 0.0)), at
    return max(now + profile.rest - computed, max(there.values()))


def search(profile: Profile) -> list[Launch]:
    """An order that makes the step short: the best of some simple ones, improved by moving single launches."""
    launches, urgent = list(profile.took), _urgency(profile)
    orders = [_greedy(profile, key) for key in (
        lambda launch: urgent[launch[0]],  # what is used first
        lambda launch: (launch[1] > 0, urgent[launch[0]] if launch[1] else profile.ready[launch[0]]),  # first phases, then what is used first
        lambda launch: (profile.ready[launch[0]], launch[1]),  # as they come
    )]
    best = min(orders, key=lambda order: simulate(profile, order))
    time, tries = simulate(profile, best), 0
    improved = True
    while improved and tries < _TRIES:
        improved = False
        for launch in launches:
            for place in _places(best, launch):
                tries += 1
                order = [other for other in best if other != launch]
                order.insert(place, launch)
                if (took := simulate(profile, order)) < time - 1e-6:
                    best, time, improved = order, took, True
                if tries >= _TRIES:
                    return best
    return best


def _urgency(profile: Profile) -> dict[int, float]:
    """When an exchange is used; what was never seen in use comes last."""
    return {number: profile.used.get(number, profile.rest) for number in profile.ready}


def _greedy(profile: Profile, key) -> list[Launch]:
    """Whenever the link is free, the launch with the least key of those that can begin."""
    left, there, order, now = set(profile.took), dict(profile.ready), [], 0.0
    while left:
        due = [launch for launch in left if (launch[0], launch[1] - 1) not in left]
        now = max(now, min(there[number] for number, _ in due))
        launch = min((launch for launch in due if there[launch[0]] <= now), key=lambda launch: (key(launch), launch))
        now += profile.took[launch]
        there[launch[0]] = now
        order.append(launch)
        left.remove(launch)
    return order


def _places(order: list[Launch], launch: Launch) -> range:
    """Where it could stand when taken out: behind the phase before it and before the one after it."""
    others = [other for other in order if other != launch]
    first = max((i + 1 for i, (number, phase) in enumerate(others) if number == launch[0] and phase < launch[1]), default=0)
    last = min((i for i, (number, phase) in enumerate(others) if number == launch[0] and phase > launch[1]), default=len(others))
    return range(first, last + 1)


class Planner:
    """The order of one handle's launches, and when it is planned anew."""

    def __init__(self):
        self.order: list[Launch] = []
        self.predicted: float | None = None  # seconds of a step in this order
        self._uses: list[tuple[list[int], float, float]] | None = []  # since the last backward; None: they tell nothing
        self._backward = 0.0  # when it was over
        self.reset()

    def reset(self) -> None:
        """The buckets are others, or what they send is. All ranks call it in the same step."""
        self.order, self.predicted, self._steps, self._profiles = [], None, 0, []

    def backward_is_over(self) -> None:
        self._backward = time.perf_counter()

    def used(self, exchanges: list[int], began: float) -> None:
        """Computation has waited for them since then."""
        if self._uses is not None:
            self._uses.append((exchanges, began, time.perf_counter() - began))

    def flushed(self) -> None:
        """All has been waited for at once, which tells nothing about when a forward uses what."""
        self._uses = None

    def begin_step(self, launchers: list[Launcher], now: float, group: dist.ProcessGroup) -> None:
        """Gives them, one for each device, the order of the step that has begun. In some steps, the same on all ranks, a
        collective call. now: when its first bucket was handed in."""
        uses, self._uses = self._uses, []
        for launcher in launchers:  # of one device: DDP has no more
            log = launcher.round.log
            if log.done:
                self._observe(None if uses is None else Profile.of(log, self._backward, uses, now), group)
            launcher.begin(self.order)

    def _observe(self, profile: Profile | None, group: dist.ProcessGroup) -> None:
        """A step is over, of which nothing was measured if a flush ended it."""
        self._steps += 1
        self._profiles = [*self._profiles[-4:], profile] if profile else self._profiles
        if self._steps not in _DUE and self._steps % _EVERY:
            return
        rank, first = dist.get_rank(group), dist.get_global_rank(group, 0)
        everyone = [None] * dist.get_world_size(group) if rank == 0 else None
        dist.gather_object(self._profiles, everyone, first, group)
        planned = [self._plan([profile for profiles in everyone for profile in profiles]) if rank == 0 else None]
        dist.broadcast_object_list(planned, first, group)
        self.order, self.predicted = planned[0]
        self._profiles = []

    def _plan(self, profiles: list[Profile]) -> tuple[list[Launch], float | None]:
        if not profiles:
            return self.order, self.predicted
        profile = Profile.median(profiles)
        best = search(profile)
        known = set(self.order) == set(profile.took) and set(profile.ready) == {number for number, _ in self.order}
        if known and simulate(profile, self.order) * _BETTER <= simulate(profile, best):
            best = self.order
        return best, simulate(profile, best)
