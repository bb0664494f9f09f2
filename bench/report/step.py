"""Of `bench step`: what a step takes, what of it is waiting, and when its parts are at work."""

from typing import Any

from .bars import Bar, bars
from .colours import Colours
from .lanes import lanes
from .legend import mark
from .markup import Child, tag
from .table import table
from .units import fixed, milliseconds

NO_SYNC = "no_sync"


def body(result: dict[str, Any], colours: Colours) -> Child:
    rows = result["rows"]
    longest = max(row["period_ms"] for row in rows)
    events = {name(row): [(e["lane"], e["start_ms"], e["stop_ms"]) for e in row["events"]] for row in rows}
    return [
        tag("p", verdict(rows), class_="verdict"),
        tag("div", times(rows, colours), exposed(rows, colours), class_="figures"),
        tag("h3", "One step of each, on rank 0"),
        tag("div", [lanes(name(row), colours.of(row["spec"]), events[name(row)], row["period_ms"], longest) for row in rows if row["events"]], class_="figures"),
        numbers(rows),
    ]


def name(row: dict) -> str:
    return f"{row['spec']} {row['schedule'] or ''}".strip()


def verdict(rows: list[dict]) -> str:
    """The fastest of those that are compared with plain DDP and with a step without communication."""
    p50 = {name(row): row["p50_ms"] for row in rows}
    best = min((row for row in rows if row["spec"] not in (NO_SYNC, "plain")), key=lambda row: row["p50_ms"], default=None)
    said = [f"{text} {milliseconds(p50[key])}" for key, text in (("plain", "Plain DDP takes"), (NO_SYNC, "without communication a step takes")) if key in p50]
    said += [f"the fastest of the others is {name(best)}, {milliseconds(best['p50_ms'])}"] if best else []
    return "; ".join(said) + "."


def times(rows: list[dict], colours: Colours) -> Child:
    alone = next((row["p50_ms"] for row in rows if row["spec"] == NO_SYNC), None)
    some = [Bar(name(row), colours.of(row["spec"]), row["p50_ms"], milliseconds(row["p50_ms"]), row.get("floor_ms"), row.get("predicted_ms"),
                (row["p75_ms"], row["p90_ms"])) for row in rows]
    marks = [mark("whisker", "up to 75 % and 90 % of the steps")]
    marks += [mark("level", "no communication")] if alone is not None else []
    marks += [mark("floor", "bytes over rate")] if any(bar.floor is not None for bar in some) else []
    marks += [mark("predicted", "predicted by the schedule")] if any(bar.predicted is not None for bar in some) else []
    return bars(some, title="A step, median", x="ms", level=alone, marks=marks)


def exposed(rows: list[dict], colours: Colours) -> Child:
    some = [Bar(name(row), colours.of(row["spec"]), row["exposed_ms"], milliseconds(row["exposed_ms"])) for row in rows if row["exposed_ms"] is not None]
    return bars(some, title="What computation waits for communication", x="ms of a step") if some else None


def numbers(rows: list[dict]) -> Child:
    mb = lambda value: None if value is None else value / 1e6
    columns = [("step", False)] + [(title, True) for title in (
        "p50, ms", "p75, ms", "p90, ms", "of plain", "added, ms", "exposed, ms", "sent, MB", "floor, ms", "predicted, ms", "of p50", "memory, MB")]
    return table(columns, [[
        name(row), *(fixed(row[f"p{p}_ms"], 1) for p in (50, 75, 90)), fixed(row["of_plain"], 3), fixed(row["added_ms"], 1), fixed(row["exposed_ms"], 1),
        fixed(mb(row["sent"]), 3), fixed(row["floor_ms"], 1), fixed(row["predicted_ms"], 1), fixed(row["of_p50"], 3), fixed(mb(row["grown"]), 1)] for row in rows])
