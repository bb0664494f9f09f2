"""Real text that every machine has: the source of the Python standard library, in a fixed order."""

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def standard_library(megabytes: float = 8.0) -> tuple[Tensor, Tensor]:
    """(training, validation) bytes, uint8; every twentieth file is for validation. Tests and generated tables are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "site-packages", "encodings", "pydoc_data", "lib2to3", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if skipped.isdisjoint(p.relative_to(root).parts))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, path in enumerate(files):
        parts[i % 20 == 10].append(path.read_bytes())
    limit = int(megabytes * 1e6)
    joined = (b"\n".join(p)[:limit] for p in parts)
    train, validation = (torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()) for text in joined)
    return train, validation


def batch(text: Tensor, size: int, context: int, generator: torch.Generator) -> Tensor:
    """int64 [size, context + 1] stretches of the text from random places."""
    at = torch.randint(0, len(text) - context - 1, (size,), generator=generator)
    return text[at[:, None] + torch.arange(context + 1)].to(torch.int64)
