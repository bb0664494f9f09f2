"""Runs a collective's phases: each where it holds nobody up.

On the CPU each phase has a thread of its own, which takes one exchange after the other in the order in which they were begun,
waits for what the phase before has begun, and ends with messages on their way: backward never waits for an encoder, and a
bucket's second phase never stands between the next bucket and the network. Kernels and network run without the GIL.
On a device everything is ordered by a stream beside the one that computes, and the host waits for nothing. There an exchange
goes on to its next phase when the next one has begun, so that one is encoded while another travels:

    stream     encode 1   encode 2   decode 1   encode 3   decode 2   decode 3
    network               1........  2........             3........

"""

import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.futures import Future

from .phases import Pending, Phases

Done = Callable[[Exception | None], None]  # called once, when an exchange has ended, with what went wrong; does not raise


class Exchange(NamedTuple):
    """number: that of its plan. count: of its phases. size: bytes that a rank sends in one of them, on average. tell: told what a
    phase has failed with before the next one sends rows that show it."""

    number: int
    count: int
    phases: Phases
    done: Done
    size: float = 0.0
    tell: Callable[[Exception], None] = lambda failed: None


def future_of(x: Tensor) -> Future:
    """To be completed with x. On a device it is completed where x is written, and whoever waits for it waits there."""
    return Future(devices=[x.device] if x.device.type == "cuda" else None)


class Clock:
    """Seconds spent in phases that end with rows on their way, of rows under way, and in the phases after the last. A profiler
    sees each, of the rows what a thread waits for, as `commopt::encode`, `commopt::comm` and `commopt::decode`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        self.seconds.update(encode=0.0, comm=0.0, decode=0.0)

    def advance(self, exchange: Exchange, phase: int, failed: Exception | None) -> Pending | None:
        """Runs the phase that is due. What it has begun, or None behind the last. Raises what the phase does."""
        name, begin = "encode" if phase < exchange.count else "decode", time.perf_counter()
        try:
            if failed is not None:
                exchange.tell(failed)
            with _seen(name):
                return exchange.phases.send(failed)
        except StopIteration:
            return None
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def wait(self, pending: Pending) -> Exception | None:
        """Returns when all has arrived, what failed."""
        with _seen("comm"):
            failed = pending.wait()
        self.seconds["comm"] += time.perf_counter() - pending.begun
        return failed


def _seen(name: str) -> contextlib.AbstractContextManager:
    """What torch.profiler, and what works as it does, sees as `commopt::name`. record_function takes its 10 us where nobody looks, too."""
    return profiler.record_function(f"commopt::{name}") if getattr(profiler, "_is_profiler_enabled", True) else contextlib.nullcontext()


class Stream:
    """Where exchanges run on a device: a stream beside the one that computes."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __bool__(self) -> bool:
        return self._stream is not None

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """On that stream, after what is under way on the current one. On a CPU, right here."""
        if self._stream is None:
            yield
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                yield


class Runner:
    """Runs exchanges as they come, each phase when it is due. Threads or a stream of one handle."""

    def __init__(self, device: torch.device):
        self.stream, self.clock = Stream(device), Clock()
        self._stages = Stages(self.clock)
        self._under_way: list[Flight] = []  # on a device
        stop_at_exit(self)

    def exchange(self, exchange: Exchange) -> None:
        """Begins it."""
        if not self.stream:
            return self._stages.begin(exchange)
        with self.stream.beside():
            self._under_way.append(Flight(exchange))
            self._go_on()

    def _go_on(self) -> None:
        """Each that is under way goes on by a phase, the last one first: it is encoded before those ahead of it are waited for."""
        self._under_way = [flight for flight in reversed(self._under_way) if flight.go_on(self.clock)][::-1]

    def close(self) -> None:
        """Nothing more follows in this step. On a CPU nothing has waited for that."""
        if self._under_way:
            with self.stream.beside():
                while self._under_way:
                    self._go_on()

    def finish(self) -> None:
        """Returns when all first phases have begun: what the caller begins with the same group comes after them."""
        self.close()
        self._stages.finish()

    def stop(self) -> None:
        self._stages.stop()


class Flight:
    """An exchange on a device, and what its last phase has begun."""

    def __init__(self, exchange: Exchange):
        self._exchange, self._pending, self._phase = exchange, Pending(), 0

    def go_on(self, clock: Clock) -> bool:
        """Runs its next phase on the current stream, after what the last one has begun. Whether others follow."""
        failure = None
        try:
            self._pending = clock.advance(self._exchange, self._phase, clock.wait(self._pending) if self._phase else None)
            if self._pending is not None:
                self._phase += 1
                return True
        except Exception as error:
            failure = error
        self._exchange.done(failure)
        return False


class Stages:
    """A thread for each phase, and one for what follows the last, started when an exchange first comes there. Threads hold
    this and not the runner, so that a handle that nobody holds any more goes."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self._queues: list[queue.Queue] = []
        self._threads: list[threading.Thread] = []

    def begin(self, exchange: Exchange) -> None:
        self._queue(0).put((Pending(), exchange))

    def finish(self) -> None:
        """Returns when none waits for its first phase."""
        if self._queues:
            self._queues[0].join()

    def _advance(self, stage: int, exchange: Exchange, failed: Exception | None) -> None:
        """Runs the phase that is due, then hands the exchange to the thread that waits for what it has begun."""
        failure = None
        try:
            pending = self.clock.advance(exchange, stage, failed)
            if pending is not None:
                return self._queue(stage + 1).put((pending, exchange))
        except Exception as error:
            failure = error
        exchange.done(failure)

    def _queue(self, stage: int) -> queue.Queue:
        if stage == len(self._queues):  # only the stage before it, one thread, comes here first
            self._queues.append(queue.Queue())
            self._threads.append(threading.Thread(target=self._serve, args=(stage,), name=f"commopt-{stage}", daemon=True))
            self._threads[-1].start()
        return self._queues[stage]

    def _serve(self, stage: int) -> None:
        jobs = self._queues[stage]
        while (job := jobs.get()) is not None:
            pending, exchange = job
            self._advance(stage, exchange, self.clock.wait(pending) if stage else None)
            jobs.task_done()
            del job, pending, exchange  # nothing of a finished exchange lives until the next

    def stop(self) -> None:
        """Ends the threads. One that is still running when the interpreter goes down would abort the process; one that
        waits for a peer that will never answer is left to the end of the process."""
        for jobs in self._queues:
            jobs.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5.0)
        self._threads.clear()


def stop_at_exit(threads: Any) -> None:
    """Has threads.stop() called before the interpreter goes down, if they still live."""
    held = weakref.ref(threads)
    atexit.register(lambda: held() and held().stop())
