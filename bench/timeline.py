"""When the parts of a training step are at work: ranges of all threads of a process, and a chart of them in text.

    forward, backward, optimizer    what the training loop does; waiting for communication is part of them
    encode, comm, decode            commopt's own ranges; comm is also what a collective of gloo takes

An event is (lane, start, stop) in ms. Events of a lane overlap where several buckets are under way: a chart shows when at
least one is.
"""

import math
import os
from collections.abc import Callable

import torch

Event = tuple[str, float, float]

LANES = ("forward", "backward", "optimizer", "encode", "comm", "decode")
COLUMNS = 100  # of the longest chart of a table
ASCII, BLOCKS = " .+#", " ░▒█"  # a cell that is idle, busy for up to a third of its time, for up to two thirds, and for more
_BETWEEN = 8  # columns from one number of the axis to the next, at least


def record(run: Callable[[], object], passes: int) -> tuple[list[Event], float]:
    """Calls run, which makes several steps of so many backward passes. The events of a step and its length, see `period`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else kineto tells stderr when it begins and when it ends
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=everywhere) as profiler:
        run()
    ranges = [(_lane(e.name), e.time_range.start / 1e3, e.time_range.end / 1e3) for e in profiler.events()]
    return period([r for r in ranges if r[0] in LANES], passes)


def period(events: list[Event], passes: int) -> tuple[list[Event], float]:
    """What of the events lies between the starts of the first backwards of the last two steps, counted from the first of these,
    and the time between them."""
    begin, end = sorted(start for lane, start, _ in events if lane == "backward")[-2 * passes :: passes]
    cut = [(lane, max(start, begin) - begin, min(stop, end) - begin) for lane, start, stop in events if start < end and stop > begin]
    return sorted(cut, key=lambda e: (LANES.index(e[0]), e[1:])), end - begin


def _lane(name: str) -> str:
    return "comm" if name.startswith("gloo:") else name.removeprefix("commopt::")


def chart(events: list[Event], length: float, column: float, marks: str) -> list[str]:
    """Lines: an axis in ms, and for each lane that has events when it is busy and for how many ms. length: of the whole, in
    ms. column: what a column stands for, in ms."""
    columns = max(1, math.ceil(length / column - 1e-9))
    lines = [f"{'ms':<11}{_axis(length, column)}"]
    for lane in LANES:
        if busy := union([(start, stop) for name, start, stop in events if name == lane]):
            cells = "".join(marks[math.ceil(3 * _overlap(busy, i * column, (i + 1) * column) / column - 1e-6)] for i in range(columns))
            lines.append(f"{lane:<10}|{cells}|{sum(stop - start for start, stop in busy):8.1f}")
    return lines


def _axis(length: float, column: float) -> str:
    """Numbers in round steps, each beginning in the column that its time falls in."""
    power = 10.0 ** math.floor(math.log10(_BETWEEN * column))
    step = next(s for s in (power, 2 * power, 5 * power, 10 * power) if s >= _BETWEEN * column)
    text = ""
    for i in range(math.floor(length / step) + 1):
        text = f"{text:<{int(i * step / column + 1e-6)}}{i * step:g}"
    return text


def union(ranges: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times in ranges that do not overlap, in order."""
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _overlap(ranges: list[tuple[float, float]], start: float, stop: float) -> float:
    return sum(max(0.0, min(stop, b) - max(start, a)) for a, b in ranges)
