"""From numbers to pixels, with round ticks: an axis is linear, or logarithmic where the numbers span much."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SPAN = 50.0  # highest / lowest from which an axis is logarithmic
DIGIT = 7.7  # pixels of a character of a tick's label, at most: on a phone, of 12 pixels in a wide font
_GAP = 14.0  # pixels between two labels
_CLOSEST = 24.0  # pixels from one tick to the next on a vertical axis


@dataclass(frozen=True)
class Axis:
    """low lies at the pixel `start`, high at `stop`. ticks: (value, label), in order."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.stop - self.start) * (value - low) / (high - low)


def axis(values: Iterable[float], start: float, stop: float, *, zero: bool = False, label: Callable[[float], str] | None = None, base: int = 10) -> Axis:
    """An axis on which all values fit. zero: it is linear and begins at 0, for bars. label: writes a tick; the default writes a
    number. base: 2 has powers of two as its ticks, where it is logarithmic."""
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    elif low > 0 and high / low >= SPAN:
        return _logarithmic(low, high, start, stop, label, base)
    return _linear(low, high, start, stop, label)


def _linear(low: float, high: float, start: float, stop: float, label: Callable[[float], str] | None) -> Axis:
    """Extended to ticks on both sides. As many ticks as their labels leave room for, at most 8."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value only
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
    for most in range(7, 0, -1):
        step = round_step((high - low) / most)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple((i * step, label(i * step) if label else number(i * step, step)) for i in range(first, last + 1))
        if _fit([(start + (stop - start) * i / (last - first), text) for i, (_, text) in enumerate(ticks)], start < stop):
            break
    return Axis(first * step, last * step, start, stop, False, ticks)


def _logarithmic(low: float, high: float, start: float, stop: float, label: Callable[[float], str] | None, base: int) -> Axis:
    """Extended a little on both sides, so that nothing lies on the frame. The most ticks of a kind that fit."""
    margin = (high / low) ** 0.03
    whole = Axis(low / margin, high * margin, start, stop, True, ())
    first, last = math.floor(math.log(whole.low, base)), math.ceil(math.log(whole.high, base))
    kinds = [[m * 10.0**p for p in range(first, last + 1) for m in several] for several in ((1, 2, 5), (1, 3))] if base == 10 else []
    kinds += [[float(base) ** p for p in range(first, last + 1) if p % every == 0] for every in range(1, 12)]
    ticks: tuple[tuple[float, str], ...] = ()
    for values in kinds:
        ticks = tuple((v, label(v) if label else number(v)) for v in values if whole.low <= v <= whole.high)
        if _fit([(whole(v), text) for v, text in ticks], start < stop):
            break
    return Axis(whole.low, whole.high, start, stop, True, ticks)


def _fit(labels: list[tuple[float, str]], across: bool) -> bool:
    """Whether labels at these pixels stand clear of each other; side by side where the axis goes across."""
    room = [abs(b - a) - (DIGIT * (len(s) + len(t)) / 2 + _GAP if across else _CLOSEST) for (a, s), (b, t) in zip(labels, labels[1:])]
    return len(labels) <= 8 and min(room, default=0.0) >= 0


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... that is not below, up and down all powers of ten."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(s for s in (power, 2 * power, 5 * power, 10 * power) if s >= least * (1 - 1e-9))


def number(value: float, step: float | None = None) -> str:
    """As one would write it; step: with the decimals that tell neighbours on an axis apart."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        mantissa, _, power = f"{value:.3g}".partition("e")
        if power:
            return f"{mantissa}e{int(power)}"
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}".replace("e0", "")
    decimals = max(0, -math.floor(math.log10(step if step else abs(value)) + 1e-9))
    text = f"{value:,.{decimals + (0 if step else 2)}f}"
    return text if step or "." not in text else text.rstrip("0").rstrip(".")
