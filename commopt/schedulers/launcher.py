"""Begins the phases of exchanges in one agreed order.

A launch is one phase of one exchange: (number, phase). A round is what one backward hands in. Its order lists launches; each
waits for those before it, and for the phase before it in its own exchange. An exchange that the order does not know goes
after all that it knows: its first phase at once, later phases when the round is closed, in the order in which they were
handed in. What the order knows and was not handed in is left out when the round is closed. So all ranks launch in the same
order, whatever each of them computes when, as long as they hand in the same exchanges and close in the same places.
"""

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from ..collectives.phases import Pending
from ..collectives.run import Clock, Exchange, Stream, stop_at_exit

Launch = tuple[int, int]  # the number of an exchange, and which of its phases
CREDIT = 2  # launches under way: one travels, the next is ready to


@dataclass
class Job:
    """An exchange, and how far it is."""

    exchange: Exchange
    launched: int = 0  # phases
    under_way: bool = False  # whether the last of those has not ended
    failed: Exception | None = None
    over: bool = False


@dataclass
class Log:
    """When things happened in a round, by the clock of time.perf_counter."""

    handed_in: dict[int, float] = field(default_factory=dict)  # by the number of an exchange
    sizes: dict[int, float] = field(default_factory=dict)  # bytes of each of its launches
    launched: dict[Launch, float] = field(default_factory=dict)  # in the order of launching
    ended: dict[Launch, float] = field(default_factory=dict)
    done: dict[int, float] = field(default_factory=dict)


class Round:
    """The launches of one backward, in order. Not for two threads at a time."""

    def __init__(self, order: list[Launch]):
        self._order = deque(order)
        self.jobs: dict[int, Job] = {}
        self.closed = False
        self.log = Log()

    def hand_in(self, exchange: Exchange) -> None:
        self.jobs[exchange.number] = Job(exchange)
        self.log.handed_in[exchange.number] = time.perf_counter()
        self.log.sizes[exchange.number] = exchange.size

    def close(self) -> None:
        self._order = deque(launch for launch in self._order if launch[0] in self.jobs)
        self.closed = True

    @property
    def over(self) -> bool:
        """Whether all that was handed in has ended."""
        return all(job.over for job in self.jobs.values())

    def next(self) -> Job | None:
        """The exchange whose next phase is due; None if that was not handed in yet, or all was launched."""
        while self._order:
            number, phase = self._order[0]
            job = self.jobs.get(number)
            if job is None:
                return None
            self._order.popleft()
            if job.launched == phase and not job.over:  # an exchange that failed has ended early
                return job
        left = [job for job in self.jobs.values() if not job.over and job.launched < job.exchange.count]
        due = min(left, key=lambda job: job.launched, default=None)
        return due if due is not None and (due.launched == 0 or self.closed) else None


class Launcher:
    """Runs exchanges as a Runner does, but begins their phases in the order of the round.

    On the CPU one thread launches, another waits for what is under way and decodes; the hook does neither. On a device the
    host launches as soon as it may, on one stream, which keeps the order.
    """

    def __init__(self, device: torch.device):
        self.stream, self.clock = Stream(device), Clock()
        self._work = _Work(self.clock)
        stop_at_exit(self._work)  # which lives until its threads have ended

    @property
    def round(self) -> Round:
        return self._work.round

    def begin(self, order: list[Launch]) -> None:
        """A new round, when the last one is over."""
        self.finish()
        with self._work.changed:
            self._work.round = Round(order)

    def exchange(self, exchange: Exchange) -> None:
        """Hands it in."""
        if self.round.closed:
            self.finish()  # what was handed in before has been launched to the end, on all ranks
        with self._work.changed:
            self.round.closed = False
            self.round.hand_in(exchange)
            self._work.changed.notify_all()
        self._launch()

    def close(self) -> None:
        """Nothing more will be handed in."""
        with self._work.changed:
            self.round.close()
            self._work.changed.notify_all()
        self._launch()

    def finish(self) -> None:
        """Closes the round and returns when it is over."""
        self.close()
        with self._work.changed:
            self._work.changed.wait_for(lambda: self.round.over or self._work.stopped)

    def _launch(self) -> None:
        if not self.stream:
            return self._work.start()
        with self.stream.beside():
            while (job := self.round.next()) is not None:
                self._work.launch(job)
                while job.under_way:
                    self._work.land(*self._work.under_way.get())

    def stop(self) -> None:
        self._work.stop(seconds=1.0)


class _Work:
    """The threads of a launcher. They hold this and not the launcher, so that a handle that nobody holds any more goes."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.round = Round([])
        self.changed = threading.Condition()
        self.under_way: queue.SimpleQueue = queue.SimpleQueue()
        self._flying = 0
        self._threads: list[threading.Thread] = []
        self.stopped = False

    def start(self) -> None:
        if not self._threads:
            self._threads = [threading.Thread(target=target, name=name, daemon=True)
                             for target, name in ((self._launch_all, "commopt-launch"), (self._land_all, "commopt-land"))]
            for thread in self._threads:
                thread.start()

    def _launch_all(self) -> None:
        while True:
            with self.changed:
                while (job := self.round.next()) is None:
                    if self.stopped:
                        return self.under_way.put(None)
                    self.changed.wait()
                self.changed.wait_for(lambda: self._flying < CREDIT and not job.under_way)
            self.launch(job)
            del job  # nothing of a finished exchange lives until the next

    def launch(self, job: Job) -> None:
        """Begins the next phase of an exchange, and hands what it has begun to who waits for it."""
        if job.over:
            return
        number, phase = job.exchange.number, job.launched
        job.launched, job.under_way = phase + 1, True
        self.round.log.launched[number, phase] = time.perf_counter()
        try:
            pending = self.clock.advance(job.exchange, phase, job.failed)
        except Exception as error:
            return self._end(job, error)
        if pending is None:  # what it waited for has failed
            return self._end(job, None)
        with self.changed:
            self._flying += 1
        self.under_way.put((job, phase, pending))

    def _land_all(self) -> None:
        while (item := self.under_way.get()) is not None:
            self.land(*item)
            del item

    def land(self, job: Job, phase: int, pending: Pending) -> None:
        """Waits for what has begun, and decodes what has come with the last phase."""
        job.failed = self.clock.wait(pending)
        self.round.log.ended[job.exchange.number, phase] = time.perf_counter()
        with self.changed:
            self._flying -= 1
            job.under_way = False
            self.changed.notify_all()
        if phase + 1 < job.exchange.count:
            return
        failure = None
        try:
            more = self.clock.advance(job.exchange, phase + 1, job.failed)
            assert more is None, f"exchange {job.exchange.number} has more than {job.exchange.count} phases"
        except Exception as error:
            failure = error
        self._end(job, failure)

    def _end(self, job: Job, failure: Exception | None) -> None:
        job.exchange.done(failure)
        self.round.log.done[job.exchange.number] = time.perf_counter()
        job.exchange = job.exchange._replace(phases=None, done=None, tell=None)  # by which these threads would hold the handle
        with self.changed:
            job.over, job.under_way = True, False
            self.changed.notify_all()

    def stop(self, seconds: float = 10.0) -> None:
        """Ends the threads when what was handed in is over, which other ranks may wait for. Returns then, or after so many
        seconds: a thread that waits for a peer that will never answer is left to the end of the process."""
        with self.changed:
            self.round.close()
            self.stopped = True
            self.changed.notify_all()
        until = time.monotonic() + seconds
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=max(0.0, until - time.monotonic()))
        self._threads.clear()
