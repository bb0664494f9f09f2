"""When the parts of a training step are at work: a lane each, all steps of a page section at one scale."""

from .. import timeline
from .bars import LINE, NAME, wrapped
from .colours import Look
from .figure import WIDTH, across
from .markup import Markup, tag
from .scale import axis
from .units import fixed

LANE, THICK = 16.0, 11.0
LEFT, RIGHT = 72.0, WIDTH - 62.0
COMPUTING = ("forward", "backward", "optimizer")  # in grey: the colour of a spec is that of what it adds


def lanes(name: str, look: Look, events: list[timeline.Event], length: float, longest: float) -> Markup:
    """One step of length ms, drawn as a part of the longest. Behind a lane are the ms that it is busy."""
    names = wrapped(name, int((WIDTH - 16) / NAME))
    top = 10 + LINE * len(names)
    x, rows = axis([longest], LEFT, RIGHT, zero=True), [lane for lane in timeline.LANES if any(e[0] == lane for e in events)]
    bottom = top + LANE * len(rows)
    drawing = [across(x, top, bottom, "ms, from one step's backward to the next's"),
               [tag("text", text, x=8, y=4 + LINE * (i + 1), class_="name") for i, text in enumerate(names)]]
    for i, lane in enumerate(rows):
        y, ranges = top + LANE * i + (LANE - THICK) / 2, [(start, stop) for kind, start, stop in events if kind == lane]
        drawing.append(tag("rect", x=x(0.0), y=y, width=x(length) - x(0.0), height=THICK, class_="idle"))
        drawing += [tag("rect", tag("title", f"{lane}: {start:.3f} to {stop:.3f} ms"), x=x(start), y=y, width=max(x(stop) - x(start), 0.4),
                        height=THICK, class_="event " + ("computing" if lane in COMPUTING else "communicating")) for start, stop in ranges]
        busy = sum(stop - start for start, stop in timeline.union(ranges))
        drawing.append(tag("text", lane, x=LEFT - 8, y=y + THICK - 1.5, class_="tick", text_anchor="end"))
        drawing.append(tag("text", fixed(busy, 1) + " ms", x=WIDTH - 4, y=y + THICK - 1.5, class_="value", text_anchor="end"))
    drawing.append(tag("line", x1=x(length), x2=x(length), y1=top, y2=bottom, class_="zero"))
    drawing.append(tag("line", x1=x(0.0), x2=x(0.0), y1=top, y2=bottom, class_="zero"))
    about = f"{name}: {fixed(length, 1)} ms from one step's backward to the next's"
    return tag("figure", tag("svg", drawing, viewBox=f"0 0 {WIDTH:g} {bottom + 44:g}", role="img", aria_label=about, class_=f"lanes {look.classes}"))
