"""A chart with its title, and what all charts have in common. Each is drawn WIDTH pixels wide and scaled to its place: that is small
enough for a phone, and two stand side by side on a desk."""

from .markup import Child, Markup, tag
from .scale import Axis

WIDTH = 420.0


def figure(title: str, height: float, drawing: Child, marks: Child = None) -> Markup:
    """marks: what `legend.mark` says of the chart."""
    chart = tag("svg", drawing, viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", tag("h4", title), tag("p", marks)), chart)


def across(x: Axis, top: float, bottom: float, label: str) -> Markup:
    """The horizontal axis: grid lines from top to bottom, ticks' labels and the label below them."""
    lines = [tag("line", x1=x(value), x2=x(value), y1=top, y2=bottom, class_="grid") for value, _ in x.ticks]
    texts = [tag("text", text, x=x(value), y=bottom + 17, class_="tick", text_anchor="middle") for value, text in x.ticks]
    return tag("g", lines, texts, tag("text", label, x=(x.start + x.stop) / 2, y=bottom + 35, class_="label", text_anchor="middle"), class_="x-axis")


def upwards(y: Axis, left: float, right: float, label: str) -> Markup:
    """The vertical axis: grid lines from left to right, ticks' labels beside them, and the label over them, where it is read
    without turning one's head."""
    lines = [tag("line", x1=left, x2=right, y1=y(value), y2=y(value), class_="grid") for value, _ in y.ticks]
    texts = [tag("text", text, x=left - 6, y=y(value) + 4, class_="tick", text_anchor="end") for value, text in y.ticks]
    return tag("g", lines, texts, tag("text", label, x=2, y=14, class_="label"), class_="y-axis")


def clear(texts: list[str], size: float) -> float:
    """Pixels that the longest of some labels is wide, at most."""
    return max((len(text) for text in texts), default=0) * size
