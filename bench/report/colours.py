"""One look for each name on a page: the same spec has the same colour, dash and marker in every chart.

Eight colours whose smallest distance in OKLab is 0.12 for normal sight, and as large for simulated protanopia, deuteranopia
and tritanopia (Machado, Oliveira and Fernandes 2009, severity 1), each at a contrast of 3:1 or more with the background.
Dashes and markers tell those apart that share a colour because there are more than eight, and all of them on paper.
What everything is compared with, plain DDP and no communication, is grey.
"""

from typing import NamedTuple

LIGHT = ("#4c38cc", "#c67c4c", "#16a1ac", "#a41e7c", "#766015", "#a664fa", "#5c1b04", "#0d1856")
DARK = ("#7789d2", "#e19c40", "#64fbc3", "#ea3b86", "#faf31e", "#8b35ed", "#a74e18", "#bdbbfa")
GREY = ("#6f7682", "#a2a9b5")  # on the light background, on the dark one
COMPARED_WITH = ("plain", "no_sync")

MARKERS = (
    "M-3.5,0a3.5,3.5 0 1,0 7,0a3.5,3.5 0 1,0 -7,0z", "M-3.1,-3.1h6.2v6.2h-6.2z", "M0,-4.4L4.2,3.2H-4.2z", "M0,-4.5L4.5,0L0,4.5L-4.5,0z",
    "M0,4.4L4.2,-3.2H-4.2z", "M-1.4,-4.2h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z", "M-4.4,-2.2h8.8v4.4h-8.8z",
)  # circle, square, triangle, diamond, triangle downwards, cross, bar: seven, so that colour and marker go together only every 56th time
DASHES = 4  # kinds of line in style.py


class Look(NamedTuple):
    """classes: of CSS, for the colour and the dash. marker: a path around (0, 0)."""

    classes: str
    marker: str


def varied(look: Look, number: int) -> Look:
    """The look of the number-th of several that belong to one name: its colour, but for the first another dash and marker."""
    colour, dash = look.classes.split()
    return Look(f"{colour} d{(int(dash[1:]) + number) % DASHES}", MARKERS[(MARKERS.index(look.marker) + number) % len(MARKERS)])


class Colours:
    """Hands out looks in the order in which names are first asked for."""

    def __init__(self):
        self._looks: dict[str, Look] = {}
        self._given = 0

    def of(self, name: str) -> Look:
        if name not in self._looks:
            if name in COMPARED_WITH:
                self._looks[name] = Look(f"grey d{COMPARED_WITH.index(name)}", MARKERS[0])
            else:
                i, self._given = self._given, self._given + 1
                self._looks[name] = Look(f"c{i % len(LIGHT)} d{i // len(LIGHT) % DASHES}", MARKERS[(i + 1) % len(MARKERS)])
        return self._looks[name]
