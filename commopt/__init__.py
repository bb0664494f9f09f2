"""Compressed gradient exchange for data-parallel PyTorch training."""

__version__ = "0.1.0"

from .compressors import Compressor, compressors, parse, register, wire_bytes
from .hooks import State, attach, average, hook, jsonl
from .installation import info
from .schedulers import schedules

__all__ = ["Compressor", "State", "attach", "average", "compressors", "hook", "info", "jsonl", "parse", "register", "schedules", "wire_bytes"]
