"""Of `bench hook`: what the hook costs the host and the GPU, and what a backward loses."""

from typing import Any

from .bars import Bar, bars
from .colours import Colours
from .markup import Child, tag
from .table import table
from .units import fixed, milliseconds

NO_SYNC = "no_sync"


def body(result: dict[str, Any], colours: Colours) -> Child:
    rows = result["rows"]
    alone = next((row["backward_ms"] for row in rows if row["spec"] == NO_SYNC), None)
    charts = [bars([Bar(row["spec"], colours.of(row["spec"]), row["backward_ms"], milliseconds(row["backward_ms"])) for row in rows],
                   title="A backward, median", x="ms", level=alone)]
    for key, title in (("host_us", "The host in the hook, for a bucket"), ("device_us", "The GPU, for a bucket")):
        some = [Bar(row["spec"], colours.of(row["spec"]), row[key], f"{row[key]:,.0f} µs") for row in rows if row[key] is not None]
        charts += [bars(some, title=title, x="µs")] if some else []
    return [tag("p", verdict(rows), class_="verdict"), tag("div", charts, class_="figures"), numbers(rows)]


def verdict(rows: list[dict]) -> str:
    ours = [row for row in rows if row["spec"] != NO_SYNC]
    least, most = (extreme(ours, key=lambda row: row["slower"]) for extreme in (min, max))
    waiting = [row["spec"] for row in ours if row["waits"]]
    said = f"A backward takes {least['slower']:.2f} ({least['spec']}) to {most['slower']:.2f} ({most['spec']}) times as long as without a hook"
    return said + (f"; the host waits for the GPU with {', '.join(waiting)}." if waiting else ".")


def numbers(rows: list[dict]) -> Child:
    columns = [("spec", False)] + [(title, True) for title in ("host, µs", "launches", "device, µs", "backward, ms", "slower")] + [("waits", False)]
    return table(columns, [[row["spec"], fixed(row["host_us"], 1), fixed(row["launches"], 1), fixed(row["device_us"], 1), fixed(row["backward_ms"], 2), fixed(row["slower"], 3),
                            "–" if row["waits"] is None else "yes" if row["waits"] else "no"] for row in rows])
