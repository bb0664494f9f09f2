"""What a handle has done since it was asked to count: steps, bytes, and steps with an infinity or a NaN."""

from typing import Any

import torch
from torch import Tensor

from ..plan import Plan


class Counts:
    def __init__(self):
        self._seen = -1  # the last step whose means were looked at
        self._finite: Any = None  # whether all of them were finite
        self.reset()

    def reset(self) -> None:
        self.steps, self.bytes_raw, self.bytes_wire = 0, 0, 0
        self._nonfinite: Any = 0

    def exchange(self, x: Tensor, plan: Plan) -> None:
        """One exchange of x has begun."""
        self.bytes_raw += x.numel() * x.element_size()
        self.bytes_wire += plan.sent

    def see(self, plans: list[Plan], step: int) -> None:
        """Looks at the means that have come. A step counts once, however many ends its backward had. On a device the count
        stays there: nobody waits for it. Called, as nonfinite is, where exchanges run."""
        finite: list[Tensor] = []
        for plan in plans:
            seen, plan.finite = plan.finite, []
            finite += seen
        if not finite:
            return
        now = torch.stack([f.to(finite[0].device) for f in finite]).all()
        was = torch.ones_like(now) if self._seen != step else self._finite
        self._seen, self._finite = step, was & now
        self._nonfinite = self._nonfinite + (was & ~now).to(torch.int64)

    def nonfinite(self) -> int:
        return int(self._nonfinite)
