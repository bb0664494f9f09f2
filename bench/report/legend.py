"""What the lines and marks of charts mean."""

from collections.abc import Iterable

from .colours import Look
from .markup import Markup, tag


def legend(names: Iterable[tuple[str, Look]]) -> Markup:
    """Of several charts: a line with its marker for each name."""
    return tag("ul", [tag("li", _swatch(look), tag("code", name)) for name, look in names], class_="legend")


def mark(kind: str, text: str) -> Markup:
    """Of one chart: what a mark of this class stands for."""
    shape = {
        "band": lambda: tag("rect", x=1, y=1, width=18, height=12, class_="band"),
        "level": lambda: tag("line", x1=1, x2=19, y1=7, y2=7, class_="level"),
        "floor": lambda: tag("line", x1=10, x2=10, y1=1, y2=13, class_="floor"),
        "predicted": lambda: tag("path", d="M10,3L14,7L10,11L6,7z", class_="predicted"),
        "whisker": lambda: tag("path", d="M2,7H18M10,4V10M18,4V10", class_="whisker"),
        "ring": lambda: tag("circle", cx=10, cy=7, r=5.5, class_="ring"),
        "dashed": lambda: tag("line", x1=1, x2=19, y1=7, y2=7, class_="dashed"),
        "seeds": lambda: [tag("rect", x=1, y=2, width=18, height=10, class_="seeds"), tag("line", x1=1, x2=19, y1=7, y2=7, class_="middle")],
    }[kind]()
    return tag("span", tag("svg", shape, width=20, height=14, viewBox="0 0 20 14", aria_hidden="true"), text, class_="mark")


def _swatch(look: Look) -> Markup:
    line = tag("line", x1=1, x2=33, y1=7, y2=7, class_="line")
    return tag("svg", line, tag("path", d=look.marker, transform="translate(17,7)", class_="marker"), width=34, height=14,
               viewBox="0 0 34 14", class_=look.classes, aria_hidden="true")
