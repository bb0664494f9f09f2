"""A chart of lines, or of single points where a series has one: y against x, the band that the seeds span around each."""

import math
from collections.abc import Callable
from typing import NamedTuple

from .colours import Look
from .figure import WIDTH, across, clear, figure, upwards
from .markup import Child, Markup, tag
from .scale import DIGIT, Axis, axis, number

HEIGHT, TOP, BOTTOM = 280.0, 26.0, 238.0
MARKERS = 240  # of a chart, about; a line has at most 30


class Point(NamedTuple):
    """low, high: what y lies between. about: what is shown when the point is looked at more closely."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    about: str = ""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.x) and math.isfinite(self.y)


class Series(NamedTuple):
    name: str
    look: Look
    points: list[Point]
    dashed: bool = False  # what is compared with, such as a floor: thin, without markers
    ringed: bool = False


def lines(
    series: list[Series], *, title: str, x: str, y: str, x_base: int = 10, x_label: Callable[[float], str] | None = None, band: tuple[float, float] | None = None,
    level: float | None = None, from_zero: bool = False, marks: Child = None,
) -> Markup:
    """x, y: labels of the axes. band: shaded across, between two values of y; level: a line across. from_zero: y begins at 0
    where it is linear. x_label: writes the ticks of x, which are powers of x_base where its axis is logarithmic."""
    points = [p for s in series for p in s.points if p.finite]
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    heights += [*(band or ()), *([] if level is None else [level])]
    up = axis(heights, BOTTOM, TOP + 6)
    if from_zero and not up.log:
        up = axis([0.0, *heights], BOTTOM, TOP + 6)
    left = 10 + clear([text for _, text in up.ticks], DIGIT)
    along = axis([p.x for p in points], left, WIDTH - 22, label=x_label, base=x_base)
    drawing: list[Child] = [across(along, TOP + 6, BOTTOM, x), upwards(up, left, WIDTH - 22, y)]
    if band is not None and all(map(math.isfinite, band)):
        high, low = up(band[1]), up(band[0])
        drawing.append(tag("rect", x=left, y=high, width=WIDTH - 22 - left, height=max(low - high, 1.0), class_="band"))
    if level is not None:
        drawing.append(tag("line", x1=left, x2=WIDTH - 22, y1=up(level), y2=up(level), class_="level"))
    drawing += [_seeds(s, along, up) for s in series if not s.dashed]
    most = min(30, max(6, MARKERS // len(series)))
    drawing += [_line(s, along, up, most) for s in series]
    return figure(title, HEIGHT, drawing, marks)


def _seeds(series: Series, along: Axis, up: Axis) -> Markup | None:
    """What the seeds span: an area around a line, a bar through a point."""
    points = [p for p in series.points if p.finite and p.low is not None and p.high is not None]
    if not points:
        return None
    if len(points) == 1:
        [p] = points
        return tag("line", x1=along(p.x), x2=along(p.x), y1=up(p.low), y2=up(p.high), class_=f"span {series.look.classes}")
    edge = [(p.x, p.high) for p in points] + [(p.x, p.low) for p in reversed(points)]
    return tag("path", d="M" + "L".join(f"{along(a):.2f},{up(b):.2f}" for a, b in edge) + "z", class_=f"seeds {series.look.classes}")


def _line(series: Series, along: Axis, up: Axis, most: int) -> Markup:
    """A line that is interrupted where there is no number; markers on so many of its points at most, always on the last one."""
    path, pen = "", "M"
    for p in series.points:
        if p.finite:
            path += f"{pen}{along(p.x):.2f},{up(p.y):.2f}"
        pen = "L" if p.finite else "M"
    name = tag("title", series.name)
    if series.dashed:
        return tag("g", name, tag("path", d=path, class_="dashed"), class_=f"series {series.look.classes}")
    finite = [p for p in series.points if p.finite]
    every = max(1, math.ceil(len(finite) / most))
    markers = [tag("path", tag("title", p.about or f"{series.name}: {number(p.x)}, {number(p.y)}"), d=series.look.marker,
                   transform=f"translate({along(p.x):.2f},{up(p.y):.2f})", class_="marker") for p in finite[::-1][::every]]
    rings = [tag("circle", cx=along(p.x), cy=up(p.y), r=8.0, class_="ring") for p in finite] if series.ringed else None
    return tag("g", name, tag("path", d=path, class_="line") if len(finite) > 1 else None, rings, markers, class_=f"series {series.look.classes}")
