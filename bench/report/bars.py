"""Bars from zero, each beneath its name, so that names may be long; marks of what a bar should be compared with."""

import math
from typing import NamedTuple

from .colours import Look
from .figure import WIDTH, across, clear, figure
from .markup import Child, Markup, tag
from .scale import DIGIT, Axis, axis

ROW, LINE, THICK = 34.0, 14.0, 11.0
NAME = 7.3  # pixels of a character of a name, which has a fixed width
LEFT = 8.0


class Bar(NamedTuple):
    """text: the value, as it stands behind the bar. floor, predicted: marks on it. whisker: numbers that a line connects, from
    the value on."""

    name: str
    look: Look
    value: float
    text: str
    floor: float | None = None
    predicted: float | None = None
    whisker: tuple[float, ...] = ()


def bars(rows: list[Bar], *, title: str, x: str, level: float | None = None, marks: Child = None) -> Markup:
    """x: label of the axis. level: a line down through all bars."""
    numbers = [v for r in rows for v in (r.value, r.floor, r.predicted, *r.whisker) if v is not None and math.isfinite(v)]
    right = WIDTH - 12 - clear([r.text for r in rows], DIGIT)
    along = axis([*numbers, *([] if level is None else [level])], LEFT, right, zero=True)
    drawing, y = [], 6.0
    for row in rows:
        names = wrapped(row.name, int((WIDTH - LEFT - 4) / NAME))
        drawing.append(_bar(row, names, along, y))
        y += ROW + LINE * (len(names) - 1)
    under = tag("line", x1=along(0.0), x2=along(0.0), y1=4.0, y2=y, class_="zero")
    over = None if level is None else tag("line", x1=along(level), x2=along(level), y1=4.0, y2=y, class_="level")
    return figure(title, y + 44, [across(along, 4.0, y, x), under, over, drawing], marks)


def _bar(row: Bar, names: list[str], along: Axis, y: float) -> Markup:
    top = y + LINE * len(names) - 1
    middle, zero = top + THICK / 2, along(0.0)
    end = along(row.value) if math.isfinite(row.value) else zero
    reach = max([end, zero, *(along(v) for v in (row.floor, row.predicted, *row.whisker) if v is not None)])
    parts: list[Child] = [tag("text", name, x=LEFT + 4, y=y + 9 + LINE * i, class_="name") for i, name in enumerate(names)]
    parts.append(tag("rect", tag("title", f"{row.name}: {row.text}"), x=min(zero, end), y=top, width=abs(end - zero), height=THICK, class_="bar"))
    if row.whisker:
        stops = "".join(f"M{along(v):.2f},{middle - 4:.2f}V{middle + 4:.2f}" for v in row.whisker)
        parts.append(tag("path", d=f"M{end:.2f},{middle:.2f}H{along(row.whisker[-1]):.2f}{stops}", class_="whisker"))
    if row.floor is not None:
        parts.append(tag("line", x1=along(row.floor), x2=along(row.floor), y1=top - 2, y2=top + THICK + 2, class_="floor"))
    if row.predicted is not None:
        parts.append(tag("path", d="M0,-4.5L4.5,0L0,4.5L-4.5,0z", transform=f"translate({along(row.predicted):.2f},{middle:.2f})", class_="predicted"))
    parts.append(tag("text", row.text, x=reach + 9, y=middle + 4, class_="value"))
    return tag("g", parts, class_=f"row {row.look.classes}")


def wrapped(name: str, most: int) -> list[str]:
    """In pieces of at most so many characters, after a comma or a blank where there is one."""
    pieces = []
    while len(name) > most:
        cut = 1 + max(name.rfind(",", 0, most), name.rfind(" ", 0, most))
        pieces.append(name[: cut or most].rstrip())
        name = name[cut or most :]
    return [*pieces, name]
