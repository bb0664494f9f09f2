"""Times several candidates in turns, so that what disturbs a machine for a while disturbs all of them."""

import time
from collections.abc import Callable

import torch

_HEAD_START = 2_000_000  # cycles, a millisecond
_SLOW = 20  # times the first candidate: what takes longer than that runs in every fifth turn only


def in_turns(
    candidates: dict[str, Callable[[int], object]], turns: int, device: str, threads: int, before: Callable[[str], object]
) -> dict[str, dict[int, float]]:
    """Name -> turn -> seconds of each candidate, called as candidate(turn). before(name) runs ahead of each call, not timed."""
    seconds = _seconds(device, threads)
    times: dict[str, dict[int, float]] = {name: {} for name in candidates}
    first = next(iter(candidates))
    for turn in range(turns):
        for name, body in candidates.items():
            if turn % 5 and times[name][0] > _SLOW * times[first][0]:
                continue
            before(name)
            times[name][turn] = seconds(lambda: body(turn))
    return times


def _seconds(device: str, threads: int) -> Callable[[Callable[[], object]], float]:
    """How long a call takes: the GPU's own time; the CPU time of one thread, which other processes disturb little; or wall time."""
    clock = time.process_time if threads == 1 else time.perf_counter

    def on_cpu(body: Callable[[], object]) -> float:
        start = clock()
        body()
        return clock() - start

    def on_gpu(body: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)  # until the host has said all that there is to do
        start.record()
        body()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return on_gpu if device == "cuda" else on_cpu
