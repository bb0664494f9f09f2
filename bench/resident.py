"""Memory of this process, as the kernel counts it."""

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

_PROC = Path("/proc/self")


def growth() -> Callable[[], int | None]:
    """Bytes by which the resident memory has grown from now to its largest since, for whoever calls what this returns; None
    where this is not Linux. What was freed goes back to the system first: nobody is to live in it uncounted."""
    if sys.platform != "linux":
        return lambda: None
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    (_PROC / "clear_refs").write_text("5")  # the largest so far becomes what it is now, see proc(5)
    before = _status("VmRSS")
    return lambda: _status("VmHWM") - before


def _status(name: str) -> int:
    return 1024 * int(re.search(rf"^{name}:\s*(\d+) kB", (_PROC / "status").read_text(), re.MULTILINE)[1])
