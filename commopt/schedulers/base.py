"""What every schedule is: a frozen dataclass that says when messages travel and who waits for them."""

from typing import Any, ClassVar

from ..spec import Table, keys

_table = Table("schedule")
register, parse_schedule = _table.register, _table.parse


class Schedule:
    """Which exchanges are under way at a time, and what waits until one has ended.

    `waits` names what does: the "hook" itself; "backward", that is DDP when all gradients are there; "step", the optimizer,
    for one bucket after the other; "use", whatever first uses a gradient or a parameter that is not there yet; or the "next step".
    `planned` is whether exchanges begin in an order that the ranks have planned and agreed on; else they do as they are due.
    `splits_sums` is whether a sum is a reduce-scatter and an all-gather, which begin each in its own time.
    """

    name: ClassVar[str]
    waits: ClassVar[str]
    planned: ClassVar[bool] = False
    splits_sums: ClassVar[bool] = False


def schedules() -> dict[str, dict[str, tuple[type, Any]]]:
    """Name -> {key: (type, default)} of every registered schedule."""
    return {name: keys(cls) for name, cls in sorted(_table.classes.items())}
