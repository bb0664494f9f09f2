"""Of `bench accuracy`: loss against seconds and against bytes, a line for each spec with the band of its seeds."""

import math
import statistics
from typing import Any

from .colours import Colours
from .legend import legend, mark
from .lines import Point, Series, lines
from .markup import Child, Markup, tag
from .scale import number
from .table import table
from .units import fixed, unit_of

LOSS = "held-out loss, nats per byte"


def body(result: dict[str, Any], colours: Colours) -> Child:
    runs = result["runs"]
    return [tag("p", verdict(runs), class_="verdict"), legend([(spec, colours.of(spec)) for spec in runs]), charts(runs, colours), numbers(runs)]


def verdict(runs: dict[str, list[dict]]) -> str:
    """Of those that end nearest to the first or below it, which one sends least."""
    first, *others = runs
    low, high = ends(runs[first])
    within = [spec for spec in others if low <= mean_end(runs[spec]) <= high]
    text = f"{first} ends at {mean_end(runs[first]):.4f} nats per byte"
    if len(runs[first]) > 1:
        text += f", its {len(runs[first])} seeds between {low:.4f} and {high:.4f}"
        text += f"; within that: {', '.join(within) if within else 'no other'}" if others else ""
    return text + "."


def charts(runs: dict[str, list[dict]], colours: Colours) -> Markup:
    first, *_ = runs
    band, marks = ends(runs[first]), []
    if any(len(of) > 1 for of in runs.values()):
        marks.append(mark("seeds", "span of the seeds around their mean"))
    parity = [mark("band", f"where the seeds of {first} end" if len(runs[first]) > 1 else f"where {first} ends")]
    curves = {spec: mean_curve(of) for spec, of in runs.items()}
    unit, name = unit_of([point["bytes"] for curve in curves.values() for point in curve])
    each, per_step = unit_of([mean_of(of, "bytes_per_step") for of in runs.values()])

    def against(key: str, divisor: float, unit: str) -> list[Series]:
        return [Series(spec, colours.of(spec), [
            Point(p[key] / divisor, p["loss"], p["low"], p["high"], f"{spec}, step {p['step']}: {p['loss']:.4f} nats at {number(p[key] / divisor)} {unit}")
            for p in curve]) for spec, curve in curves.items()]

    final = [Series(spec, colours.of(spec), [Point(mean_of(of, "bytes_per_step") / each, mean_end(of), *ends(of),
                    f"{spec}: {mean_end(of):.4f} nats, {number(mean_of(of, 'bytes_per_step') / each)} {per_step} a step")]) for spec, of in runs.items()]
    return tag("div", [
        lines(against("seconds", 1.0, "s"), title="Loss against time", x="seconds of training", y=LOSS, band=band, marks=parity + marks),
        lines(against("bytes", unit, name), title="Loss against bytes", x=f"sent by a rank, {name}", y=LOSS, band=band, marks=parity + marks),
        lines(final, title="Where they end", x=f"sent by a rank in a step, {per_step}", y=LOSS, band=band, marks=parity + marks),
    ], class_="figures")


def numbers(runs: dict[str, list[dict]]) -> Markup:
    first, *_ = runs
    base, rows = mean_end(runs[first]), []
    for spec, of in runs.items():
        low, high = ends(of)
        rows.append([spec, fixed(mean_end(of), 4), fixed(mean_end(of) - base, 4, sign=True), fixed(high - low, 4), fixed(mean_of(of, "bytes_per_step") / 1e6, 3),
                     fixed(1e3 * mean_of(of, "seconds_per_step"), 1), fixed(mean_of(of, "seconds"), 1)])
    return table([("spec", False), ("loss, nats per byte", True), (f"above {first}", True), ("spread of seeds", True), ("sent per step, MB", True),
                  ("step, ms", True), ("training, s", True)], rows)


def mean_curve(runs: list[dict]) -> list[dict[str, float]]:
    """Of the seeds at each step: means, and the lowest and highest loss; NaN where a seed's loss is not finite."""
    at: dict[int, list[dict]] = {}
    for run in runs:
        for point in run["curve"]:
            at.setdefault(point["step"], []).append(point)
    return [{"step": step, **{key: statistics.mean(p[key] for p in points) for key in ("loss", "seconds", "bytes")},
             "low": min(p["loss"] for p in points), "high": max(p["loss"] for p in points)} for step, points in sorted(at.items())]


def ends(runs: list[dict]) -> tuple[float, float]:
    """The lowest and the highest of the seeds' final losses that are finite."""
    losses = [loss for run in runs if math.isfinite(loss := run["curve"][-1]["loss"])] or [math.nan]
    return min(losses), max(losses)


def mean_end(runs: list[dict]) -> float:
    return statistics.mean(run["curve"][-1]["loss"] for run in runs)


def mean_of(runs: list[dict], key: str) -> float:
    return statistics.mean(run[key] for run in runs)
