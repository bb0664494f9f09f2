"""Of `bench accuracy`: loss against seconds and against bytes for each task, a line for each spec with the band of its seeds."""

import math
from typing import Any

from .. import accuracy, tasks
from .circumstances import circumstances
from .colours import Colours
from .legend import legend, mark
from .lines import Point, Series, lines
from .markup import Child, Markup, tag
from .scale import number
from .table import table
from .units import fixed, unit_of


def body(result: dict[str, Any], colours: Colours) -> Child:
    return [_task(one, colours) for one in result["results"]]


def _task(result: dict[str, Any], colours: Colours) -> Child:
    rows, unit, seeds = accuracy.judged(result), unit_of_loss(result), result["what"]["seeds"]
    return [
        tag("h3", result["what"]["task"]), circumstances(result), tag("p", verdict(rows, unit, seeds), class_="verdict"),
        legend([(row["spec"], colours.of(row["spec"])) for row in rows]), charts(rows, unit, seeds, colours), numbers(rows, unit),
    ]


def unit_of_loss(result: dict[str, Any]) -> str:
    return tasks.TASKS[result["what"]["task"]].unit


def verdict(rows: list[dict], unit: str, seeds: int) -> str:
    """Of those that end in the band of the first or below it, which one sends least."""
    first, *others = rows
    text = f"{first['spec']} ends at {first['loss']:.4f} {unit}" + (f", its {seeds} seeds between {first['least']:.4f} and {first['greatest']:.4f}" if seeds > 1 else "")
    within = [row for row in others if row["in_band"]]
    if not within:
        return text + ("; all others end higher." if others else ".")
    least = min(within, key=lambda row: row["sent"])
    return text + f"; not higher: {', '.join(row['spec'] for row in within)}" + (
        f", of which {least['spec']} sends least" if len(within) > 1 else "") + f", {number(least['sent'] / 1e6)} MB a step."


def charts(rows: list[dict], unit: str, seeds: int, colours: Colours) -> Markup:
    """Of one task, of which `bench.accuracy.judged` made the rows."""
    first, y = rows[0], f"held-out loss, {unit}"
    marks = [mark("band", f"where the seeds of {first['spec']} end" if seeds > 1 else f"where {first['spec']} ends")]
    marks += [mark("seeds", "span of the seeds around their mean")] if seeds > 1 else []
    band, target, towards = (first["least"], first["greatest"]), None, []
    if math.isfinite(first["target"]):
        target, towards = first["target"], [mark("level", f"target {first['target']:.4f}")]
    divisor, name = unit_of([point["bytes"] for row in rows for point in row["curve"]])
    each, per_step = unit_of([row["sent"] for row in rows])

    def against(key: str, divisor: float, name: str) -> list[Series]:
        return [Series(row["spec"], colours.of(row["spec"]), [Point(
            p[key] / divisor, p["loss"], p["least"], p["greatest"],
            f"{row['spec']}, step {p['step']}: {p['loss']:.4f} {unit} at {number(p[key] / divisor)} {name}") for p in row["curve"]]) for row in rows]

    final = [Series(row["spec"], colours.of(row["spec"]), [Point(row["sent"] / each, row["loss"], row["least"], row["greatest"],
                    f"{row['spec']}: {row['loss']:.4f} {unit}, {number(row['sent'] / each)} {per_step} a step")]) for row in rows]
    return tag("div", [
        lines(against("seconds", 1.0, "s"), title="Loss against time", x="seconds of training", y=y, band=band, level=target, marks=marks + towards),
        lines(against("bytes", divisor, name), title="Loss against bytes", x=f"sent by a rank, {name}", y=y, band=band, level=target, marks=marks + towards),
        lines(final, title="Where they end", x=f"sent by a rank in a step, {per_step}", y=y, band=band, marks=marks),
    ], class_="figures")


def numbers(rows: list[dict], unit: str) -> Markup:
    columns = [("spec", False), ("lr", True), (f"loss, {unit}", True), (f"above {rows[0]['spec']}", True), (f"in {rows[0]['spec']}'s band", False)] + [(title, True) for title in (
        "spread of seeds", "MB a step", "MB to target", "s to target", "step, ms")]
    return table(columns, [[
        row["spec"], f"{row['lr']:g}", fixed(row["loss"], 4), fixed(row["above"], 4, sign=True), "yes" if row["in_band"] else "no", fixed(row["spread"], 4),
        fixed(row["sent"] / 1e6, 3), fixed(row["bytes_to_target"] and row["bytes_to_target"] / 1e6, 1), fixed(row["seconds_to_target"], 1),
        fixed(1e3 * row["seconds_per_step"], 1)] for row in rows])
