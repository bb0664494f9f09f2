"""Where a trainer calls us."""

from .ddp import attach, hook
from .state import State

__all__ = ["State", "attach", "hook"]
