"""Where a trainer calls us."""

from .average import average
from .ddp import attach, hook
from .jsonl import jsonl
from .state import State

__all__ = ["State", "attach", "average", "hook", "jsonl"]
