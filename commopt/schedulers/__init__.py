"""When messages travel, and what waits for them. One schedule per file; importing this package registers them all."""

from .base import Schedule, parse_schedule, register, schedules
from .plain import Plain
from .pipelined import Pipelined
from .with_optimizer import WithOptimizer
from .priority import Priority
from .decoupled import Decoupled
from .delayed import Delayed

__all__ = ["Schedule", "parse_schedule", "register", "schedules"]
