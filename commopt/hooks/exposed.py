"""How long computation has waited for communication."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class Exposed:
    """On a CPU the time that the waiting thread was blocked for. On a device the time that the stream which computes stood
    still, between an event before the wait and one behind it; events are read when they have passed, and nobody waits."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Entered for as long as somebody waits."""
        began = self.begin(device)
        yield
        self.end(device, began)

    def begin(self, device: torch.device):
        """What `end` wants to know of the beginning of a wait."""
        return time.perf_counter() if device.type == "cpu" else _now(device)

    def end(self, device: torch.device, began) -> None:
        if device.type == "cpu":
            self._seconds += time.perf_counter() - began
        else:
            self._events.append((began, _now(device)))
            self._read()

    @property
    def seconds(self) -> float:
        """Since reset(), as far as it is known."""
        self._read()
        return self._seconds

    def _read(self) -> None:
        while self._events and self._events[0][1].query():
            began, ended = self._events.popleft()
            self._seconds += began.elapsed_time(ended) / 1e3


def _now(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
