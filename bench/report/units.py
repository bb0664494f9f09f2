"""Numbers with units, as a reader wants to see them."""

import math

from .scale import number

BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def unit_of(values: list[float]) -> tuple[float, str]:
    """(divisor, name) that makes the middle one of some numbers of bytes easy to read."""
    positive = sorted(v for v in values if math.isfinite(v) and v > 0) or [1.0]
    return next(unit for unit in BYTES if positive[len(positive) // 2] >= unit[0] or unit[0] == 1)


def binary(size: float) -> str:
    """1048576 -> "1 MiB"."""
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{number(size / (1 << power))} {name}"
    return f"{number(size)} B"


def milliseconds(value: float) -> str:
    """Three digits, and at most three decimals."""
    return fixed(value, 3 - len(str(int(abs(value)))) if abs(value) >= 1 else 3) + " ms"


def fixed(value: float | None, decimals: int, sign: bool = False) -> str:
    """A cell of a table; a dash where there is nothing."""
    if value is None:
        return "–"
    return f"{value:{'+' if sign else ''},.{max(0, decimals)}f}"
