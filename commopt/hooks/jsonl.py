"""A log of a training run, for `handle.log_to` and `python -m commopt report`."""

import json
import logging
import math
import shlex
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__

log = logging.getLogger("commopt")


def jsonl(path: str | Path) -> Callable[[dict[str, Any], int], None]:
    """A sink for `handle.log_to` that appends to a file of JSON lines; rank 0 writes it.

    handle.log_to(commopt.jsonl("run.jsonl"), every=50)

    A run's first line is {"log": {"commopt": ..., "torch": ..., "ranks": ..., "command": ..., "date": ...}}, each other one
    {"step": ..., **handle.stats()}. NaN and infinities, which JSON does not have, are null. A file that cannot be opened is an
    OSError here; one that cannot be written to later stops nothing, it is a warning.
    """
    if not dist.is_initialized():
        raise RuntimeError("commopt.jsonl asks which rank writes: call torch.distributed.init_process_group first")
    if dist.get_rank() != 0:
        return lambda stats, step: None
    file = Path(path).absolute()
    command = shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])
    _append(file, {"log": {"commopt": __version__, "torch": torch.__version__, "ranks": dist.get_world_size(), "command": command,
                           "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}})

    def sink(stats: dict[str, Any], step: int) -> None:
        try:
            _append(file, {"step": step, **stats})
        except OSError as error:  # raised, it would end the training
            log.warning("commopt: step %d is missing from %s: %s", step, file, error)

    return sink


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(_finite(line), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
