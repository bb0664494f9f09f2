"""Of `bench kernels`: how fast the kernels are as a fraction of axpy, by what is done and who does it."""

from typing import Any

from .bars import Bar, bars
from .colours import Colours
from .legend import mark
from .markup import Child, tag
from .table import table
from .units import fixed

WHO = ("backend", "isa", "dtype", "threads", "n")


def body(result: dict[str, Any], colours: Colours) -> Child:
    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault((row["what"].split()[0], *(row[key] for key in WHO)), []).append(row)
    charts = []
    for (action, *who), rows in groups.items():
        some = [Bar(row["spec"] + row["what"].removeprefix(action).replace(" ", ", mean of " if action == "decode" else ", of "), colours.of(row["spec"]),
                    row["of_axpy"], fixed(row["of_axpy"], 2)) for row in rows]
        charts.append(bars(some, title=f"{action.capitalize()}: {described(*who)}", x="speed, as a fraction of axpy's (r += g)", level=1.0, marks=[mark("level", "axpy")]))
    return [tag("div", charts, class_="figures"), numbers(result["rows"])]


def described(backend: str, isa: str | None, dtype: str, threads: int | None, n: int) -> str:
    who = [backend + (f" ({isa})" if isa else ""), f"{n:,} of {dtype}"]
    return ", ".join(who + ([f"{threads} thread{'s' * (threads > 1)}"] if threads else []))


def numbers(rows: list[dict]) -> Child:
    texts = ("spec", "what", "backend", "isa", "dtype")
    figures = [("ns_per_value", "ns/value", 3), ("gb_per_s", "GB/s", 1), ("of_axpy", "of axpy", 2), ("median", "median", 2), ("of_zero", "of zero_", 2),
               ("vs_torch", "x torch", 1), ("vs_compile", "x compile", 2), ("worst", "worst", 2)]
    columns = [(text, False) for text in texts] + [("threads", True), ("n", True)] + [(title, True) for _, title, _ in figures]
    return table(columns, [[*(row[key] or "–" for key in texts), fixed(row["threads"], 0), fixed(row["n"], 0),
                            *(fixed(row[key], digits) for key, _, digits in figures)] for row in rows])
