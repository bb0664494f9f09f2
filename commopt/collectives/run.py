"""Runs a collective's phases: each where it holds nobody up.

On the CPU the first phase runs in the caller, usually the autograd thread, and ends with the message on its way. Each
later phase has a thread of its own, which waits for one exchange after the other in the order in which they were begun: a
bucket's second phase never stands between the next bucket and the network.
On a device everything is ordered by a stream beside the one that computes, and the host waits for nothing.
"""

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.futures import Future

from .link import Phases

Done = Callable[[Exception | None], None]  # called once, when an exchange has ended, with what went wrong


class Runner:
    """The threads and the stream of one handle. Phases: how many may follow the first in any collective."""

    PHASES = 5

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queues: list[queue.SimpleQueue] = []
        self._threads: list[threading.Thread] = []
        self.clock: dict[str, float] = {}
        self.reset_clock()
        if self.stream is None:
            self._queues = [queue.SimpleQueue() for _ in range(self.PHASES)]
            for i in range(self.PHASES):
                thread = threading.Thread(target=_serve, args=(self._queues, i, self.clock), name=f"commopt-{i}", daemon=True)
                thread.start()
                self._threads.append(thread)
        atexit.register(_stop, weakref.ref(self))

    def exchange(self, phases: Phases, x: Tensor, done: Done) -> Future:
        """Begins the exchange that `phases` describe. The future holds x when x is averaged, or when it failed."""
        if self.stream is not None:
            return self._on_stream(phases, x, done)
        future: Future = Future()
        _advance(self._queues, 0, self.clock, phases, None, x, future, done)
        return future

    def _on_stream(self, phases: Phases, x: Tensor, done: Done) -> Future:
        future: Future = Future(devices=[x.device])
        self.stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.stream):
            failed, failure = None, None
            try:
                while True:
                    failed = phases.send(failed).wait()
            except StopIteration:
                pass
            except Exception as error:
                failure = error
            try:
                done(failure)
            finally:
                future.set_result(x)
        return future

    def reset_clock(self) -> None:
        """Seconds spent in phases that end with rows on their way, in waiting for rows, and in the phases after the last."""
        self.clock.update(encode=0.0, comm=0.0, decode=0.0)

    def stop(self) -> None:
        """Ends the threads. One that is still running when the interpreter goes down would abort the process; one that
        waits for a peer that will never answer is left to the end of the process."""
        for q in self._queues:
            q.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=1.0)
        self._threads.clear()


def _advance(queues: list, stage: int, clock: dict, phases: Phases, failed: Exception | None, x: Tensor, future: Future, done: Done) -> None:
    """Runs the phase that is due, then hands the exchange to the thread that waits for what it has begun."""
    failure, begin = None, time.perf_counter()
    try:
        pending, now = phases.send(failed), time.perf_counter()
        clock["encode"] += now - begin
        return queues[stage].put((pending, now, phases, x, future, done))
    except StopIteration:
        clock["decode"] += time.perf_counter() - begin
    except Exception as error:
        failure = error
    try:
        done(failure)
    finally:
        future.set_result(x)


def _serve(queues: list, stage: int, clock: dict) -> None:
    while (job := queues[stage].get()) is not None:
        pending, begun, phases, x, future, done = job
        failed = pending.wait()
        clock["comm"] += time.perf_counter() - begun
        _advance(queues, stage + 1, clock, phases, failed, x, future, done)
        del job, pending, phases, x, future, done  # nothing of a finished exchange lives until the next


def _stop(runner: weakref.ref) -> None:
    if (held := runner()) is not None:
        held.stop()
