"""Of `bench collectives`: what an exchange takes by each collective, beside its floor and its prediction."""

from typing import Any

from .bars import Bar, bars
from .colours import Colours
from .legend import mark
from .markup import Child, tag
from .table import table
from .units import fixed, milliseconds


def body(result: dict[str, Any], colours: Colours) -> Child:
    rows = result["rows"]
    some = [Bar(f"{row['spec']} {row['collective']}", colours.of(row["spec"]), row["measured_ms"], milliseconds(row["measured_ms"]), row["floor_ms"], row["predicted_ms"])
            for row in rows]
    marks = [mark("predicted", "predicted from the link and the work")]
    marks += [mark("floor", "bytes over rate")] if any(bar.floor is not None for bar in some) else []
    sent = [Bar(bar.name, bar.look, row["sent"] / 1e6, f"{row['sent'] / 1e6:,.3f} MB") for bar, row in zip(some, rows)]
    return [tag("div", bars(some, title="An exchange, median of the slowest rank", x="ms", marks=marks),
                bars(sent, title="What a rank sends in it", x="MB"), class_="figures"), numbers(rows)]


def numbers(rows: list[dict]) -> Child:
    columns = [("spec", False), ("collective", False)] + [(title, True) for title in (
        "sent, MB", "counted, MB", "rounds", "passes", "floor, ms", "predicted, ms", "measured, ms", "predicted / measured", "of none")]
    return table(columns, [[
        row["spec"], row["collective"], fixed(row["sent"] / 1e6, 3), fixed(row["counted"] and row["counted"] / 1e6, 3), fixed(row["rounds"], 0), fixed(row["passes"], 1),
        fixed(row["floor_ms"], 1), fixed(row["predicted_ms"], 1), fixed(row["measured_ms"], 1), fixed(row["predicted_ms"] / row["measured_ms"], 2),
        fixed(row["of_plain"], 3)] for row in rows])
