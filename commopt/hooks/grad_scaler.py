"""Finds the GradScaler of the training loop, which nothing in DDP knows of, and follows its scale."""

import gc
import logging

import torch
from torch import Tensor

log = logging.getLogger("commopt")


class LossScale:
    """The factor the gradients are multiplied with, read without waiting for the device."""

    def __init__(self):
        self._scaler: torch.amp.GradScaler | None = None
        self._version = -1

    def find(self) -> None:
        """Looks for a GradScaler in use; costs tens of milliseconds, so it is done only when plans are made."""
        found = _in_use()
        if len(found) > 1:  # one may belong to a model that nobody holds any more
            del found
            gc.collect()
            found = _in_use()
        if len(found) > 1 and self._scaler not in found:
            log.warning("commopt: %d GradScalers are in use; residuals follow the first one's scale", len(found))
        if self._scaler not in found:
            self._scaler = found[0] if found else None

    @property
    def value(self) -> Tensor | None:
        """float32 [1] on the scaler's device, or None without a scaler."""
        return None if self._scaler is None else self._scaler._scale.view(1)

    @property
    def backoff(self) -> float:
        """What the scaler multiplies its scale with when it skips a step."""
        return self._scaler.get_backoff_factor()

    def updated(self) -> bool:
        """Whether the scaler has decided about a step since this was last asked."""
        if self._scaler is None or self._scaler._scale._version == self._version:
            return False
        self._version = self._scaler._scale._version
        return True


def scaled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a GradScaler steps this optimizer. As slow as `find`."""
    return any(id(optimizer) in scaler._per_optimizer_states for scaler in _in_use())


def _in_use() -> list[torch.amp.GradScaler]:
    return [o for o in gc.get_objects() if issubclass(type(o), torch.amp.GradScaler) and o.is_enabled() and o._scale is not None]
