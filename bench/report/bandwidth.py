"""Of `bench bandwidth`: time and bandwidths of an exchange by its size, or what communication adds to a step."""

from collections import Counter
from typing import Any

from .bars import Bar, bars
from .colours import Colours, Look, varied
from .legend import legend, mark
from .lines import Point, Series, lines
from .markup import Child, tag
from .table import table
from .units import binary, fixed, milliseconds

RATES = (("effbw_gbps", "Effective bandwidth"), ("busbw_gbps", "Bus bandwidth"), ("algbw_gbps", "Algorithm bandwidth"))
KNOWN = {  # key of a row -> title of its column, and decimals; None for text
    "spec": ("spec", None), "collective": ("collective", None), "dtype": ("dtype", None), "redop": ("redop", None), "size_bytes": ("size", binary),
    "count": ("count", 0), "time_us": ("time, µs", 1), "min_us": ("least, µs", 1), "floor_us": ("floor, µs", 1), "algbw_gbps": ("algbw, GB/s", 3), "busbw_gbps": ("busbw, GB/s", 3),
    "effbw_gbps": ("effbw, GB/s", 3), "encode_us": ("encode, µs", 1), "comm_us": ("comm, µs", 1), "decode_us": ("decode, µs", 1), "wrong": ("wrong", 0),
    "wire_bytes": ("sent, bytes", 0), "counted_bytes": ("counted, bytes", 0),
}


def body(result: dict[str, Any], colours: Colours) -> Child:
    return by_size(result["rows"], colours) if "size_bytes" in result["rows"][0] else by_step(result["rows"], colours)


def by_size(rows: list[dict], colours: Colours) -> Child:
    """A line for each spec, dtype and collective over the sizes; bars where there is one size."""
    told_by = ["spec"] + [key for key in ("collective", "dtype", "redop") if any(
        row.get(key) != other.get(key) for row in rows for other in rows if (row["spec"], row["size_bytes"]) == (other["spec"], other["size_bytes"]))]
    groups: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["size_bytes"]):
        groups.setdefault(" ".join(str(row.get(key)) for key in told_by), []).append(row)
    looks, seen = {}, Counter()
    for name, of in groups.items():
        looks[name] = varied(colours.of(of[0]["spec"]), seen[of[0]["spec"]])
        seen[of[0]["spec"]] += 1
    rates = [(key, title) for key, title in RATES if any(row.get(key) is not None for row in rows)]
    if len({row["size_bytes"] for row in rows}) == 1:
        charts = [_bars_of(groups, looks, key, title) for key, title in (("time_us", "Time of an exchange"), *rates)]
        return [tag("div", charts, class_="figures"), numbers(rows)]
    charts = [_lines_of(groups, looks, "time_us", "Time of an exchange", "ms", "floor_us"), *(_lines_of(groups, looks, key, title, "GB/s") for key, title in rates)]
    return [legend(looks.items()), tag("div", charts, class_="figures"), numbers(rows)]


def _lines_of(groups: dict[str, list[dict]], looks: dict[str, Look], key: str, title: str, unit: str, floor: str | None = None) -> Child:
    value = lambda row, key: row[key] / 1e3 if unit == "ms" else row[key]
    series = []
    for name, rows in groups.items():
        series.append(Series(name, looks[name], [Point(row["size_bytes"], value(row, key), about=f"{name}: {value(row, key):,.3f} {unit} at {binary(row['size_bytes'])}")
                                                 for row in rows if row.get(key) is not None]))
        if floor and (below := [Point(row["size_bytes"], value(row, floor)) for row in rows if row.get(floor)]):
            series.append(Series(f"floor of {name}", looks[name], below, dashed=True))
    marks = [mark("dashed", "floor: bytes over rate")] if any(s.dashed for s in series) else None
    return lines(series, title=title, x="size of the gradient", y=unit, x_base=2, x_label=binary, marks=marks)


def _bars_of(groups: dict[str, list[dict]], looks: dict[str, Look], key: str, title: str) -> Child:
    rows = [(name, row) for name, of in groups.items() for row in of if row.get(key) is not None]
    if key == "time_us":
        some = [Bar(name, looks[name], row[key] / 1e3, milliseconds(row[key] / 1e3), None if row.get("floor_us") is None else row["floor_us"] / 1e3) for name, row in rows]
        marks = [mark("floor", "bytes over rate")] if any(bar.floor is not None for bar in some) else None
        return bars(some, title=f"{title} of {binary(rows[0][1]['size_bytes'])}", x="ms", marks=marks)
    return bars([Bar(name, looks[name], row[key], fixed(row[key], 3) + " GB/s") for name, row in rows], title=title, x="GB/s")


def numbers(rows: list[dict]) -> Child:
    keys = [key for key in KNOWN if any(row.get(key) is not None for row in rows)]

    def cell(key: str, value: Any) -> str:
        form = KNOWN[key][1]
        return "–" if value is None else str(value) if form is None else form(value) if callable(form) else fixed(value, form)

    return table([(KNOWN[key][0], KNOWN[key][1] is not None) for key in keys], [[cell(key, row.get(key)) for key in keys] for row in rows])


def by_step(rows: list[dict], colours: Colours) -> Child:
    return [tag("div", added(rows, colours), sent(rows, colours), class_="figures"), steps_numbers(rows)]


def added(rows: list[dict], colours: Colours) -> Child:
    some = [Bar(row["spec"], colours.of(row["spec"]), row["added_ms"], milliseconds(row["added_ms"]), row["floor_ms"]) for row in rows]
    marks = [mark("floor", "bytes over rate")] if any(bar.floor is not None for bar in some) else None
    return bars(some, title="What communication adds to a step, median", x="ms", marks=marks)


def sent(rows: list[dict], colours: Colours) -> Child:
    return bars([Bar(row["spec"], colours.of(row["spec"]), row["sent"] / 1e6, f"{row['sent'] / 1e6:,.3f} MB") for row in rows], title="What a rank sends in a step", x="MB")


def steps_numbers(rows: list[dict]) -> Child:
    columns = [("spec", False)] + [(title, True) for title in (
        "step, ms", "added, ms", "of plain", "floor, ms", "sent, MB", "counted, MB", "encode, ms", "comm, ms", "decode, ms", "exposed, ms", "error")]
    return table(columns, [[
        row["spec"], fixed(row["step_ms"], 1), fixed(row["added_ms"], 1), fixed(row["of_plain"], 3), fixed(row["floor_ms"], 1), fixed(row["sent"] / 1e6, 3),
        fixed(row["counted"] and row["counted"] / 1e6, 3), *(fixed(row["stats"].get(f"{key}_ms"), 1) for key in ("encode", "comm", "decode", "exposed")),
        f"{row['error']:.1e}"] for row in rows])
