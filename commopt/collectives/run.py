"""Runs a collective's phases: each where it holds nobody up.

On the CPU the first phase runs in the caller, usually the autograd thread, and ends with the message on its way. Each
later phase has a thread of its own, which waits for one exchange after the other in the order in which they were begun: a
bucket's second phase never stands between the next bucket and the network.
On a device everything is ordered by a stream beside the one that computes, and the host waits for nothing.
"""

import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.futures import Future

from .phases import Phases

Done = Callable[[Exception | None], None]  # called once, when an exchange has ended, with what went wrong; does not raise


def future_of(x: Tensor) -> Future:
    """To be completed with x. On a device it is completed where x is written, and whoever waits for it waits there."""
    return Future(devices=[x.device] if x.device.type == "cuda" else None)


class Runner:
    """The threads and the stream of one handle."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.clock: dict[str, float] = {}
        self.reset_clock()
        self._stages = Stages(self.clock)
        atexit.register(_stop, weakref.ref(self))

    def first(self, work: Callable[[], None]) -> None:
        """Does what comes before an exchange, such as a first message that will travel with others, where exchanges run."""
        with self._beside():
            work()

    def exchange(self, phases: Phases, done: Done) -> None:
        """Begins the exchange that `phases` describe."""
        if self.stream is None:
            return self._stages.advance(0, phases, None, done)
        with self._beside():
            failed, failure = None, None
            try:
                while True:
                    failed = phases.send(failed).wait()
            except StopIteration:
                pass
            except Exception as error:
                failure = error
            done(failure)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of exchanges, after what is under way on the current one."""
        if self.stream is None:
            yield
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            with torch.cuda.stream(self.stream):
                yield

    def reset_clock(self) -> None:
        """Seconds spent in phases that end with rows on their way, in waiting for rows, and in the phases after the last."""
        self.clock.update(encode=0.0, comm=0.0, decode=0.0)

    def stop(self) -> None:
        self._stages.stop()


class Stages:
    """A thread for each phase that follows a first one, started when an exchange first has such a phase. Threads hold this
    and not the runner, so that a handle that nobody holds any more goes."""

    def __init__(self, clock: dict[str, float]):
        self.clock = clock
        self._queues: list[queue.SimpleQueue] = []
        self._threads: list[threading.Thread] = []

    def advance(self, stage: int, phases: Phases, failed: Exception | None, done: Done) -> None:
        """Runs the phase that is due, then hands the exchange to the thread that waits for what it has begun."""
        failure, begin = None, time.perf_counter()
        try:
            pending, now = phases.send(failed), time.perf_counter()
            self.clock["encode"] += now - begin
            return self._queue(stage).put((pending, now, phases, done))
        except StopIteration:
            self.clock["decode"] += time.perf_counter() - begin
        except Exception as error:
            failure = error
        done(failure)

    def _queue(self, stage: int) -> queue.SimpleQueue:
        if stage == len(self._queues):  # only the stage before it, one thread, comes here first
            self._queues.append(queue.SimpleQueue())
            self._threads.append(threading.Thread(target=self._serve, args=(stage,), name=f"commopt-{stage}", daemon=True))
            self._threads[-1].start()
        return self._queues[stage]

    def _serve(self, stage: int) -> None:
        jobs = self._queues[stage]
        while (job := jobs.get()) is not None:
            pending, begun, phases, done = job
            failed = pending.wait()
            self.clock["comm"] += time.perf_counter() - begun
            self.advance(stage + 1, phases, failed, done)
            del job, pending, phases, done  # nothing of a finished exchange lives until the next

    def stop(self) -> None:
        """Ends the threads. One that is still running when the interpreter goes down would abort the process; one that
        waits for a peer that will never answer is left to the end of the process."""
        for jobs in self._queues:
            jobs.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=1.0)
        self._threads.clear()


def _stop(runner: weakref.ref) -> None:
    if (held := runner()) is not None:
        held.stop()
