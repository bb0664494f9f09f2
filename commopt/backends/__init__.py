"""Modules of kernels with the same ops: reference (torch, the definition), cpu, cuda, triton."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference

OPS = tuple(name for name, op in vars(reference).items() if callable(op))
NAMES = ("reference", "cpu", "cuda", "triton")


def built(name: str) -> bool:
    """Whether a backend is part of this installation. Whether there is a device for it is another question."""
    if name == "reference":
        return True
    if name == "triton":
        return importlib.util.find_spec("triton") is not None
    if importlib.util.find_spec("commopt._C") is None:
        return False
    return name == "cpu" or hasattr(importlib.import_module("commopt._C"), "cuda")


def owners(device_type: str) -> dict[str, str]:
    """Op -> name of the backend that serves it on this kind of device."""
    forced = os.environ.get("COMMOPT_BACKEND")
    if forced is not None and forced not in NAMES:
        raise ValueError(f"COMMOPT_BACKEND={forced!r} is unknown; known are {', '.join(NAMES)}")
    if forced is not None and not built(forced):
        raise ValueError(f"COMMOPT_BACKEND={forced!r} is not part of this installation; see `python -m commopt info`")
    if forced is not None:
        order = [forced]
    elif device_type == "cpu":
        order = ["cpu"]
    elif device_type == "cuda" and torch.version.hip is None:
        order = ["cuda", "triton"]
    else:
        order = ["triton"]
    order = [name for name in order if built(name)] + ["reference"]
    modules = {name: importlib.import_module(f".{name}", __name__) for name in order}
    return {op: next(name for name in order if hasattr(modules[name], op)) for op in OPS}


class Kernels:
    """The ops for one piece of one plan, resolved once, and what they keep from call to call.

    loss_scale: float32 [1] on the device. draw: (seed, step, stream) of the random numbers of the next encode.
    shared_draw: the same, with a stream that all ranks and both phases of a two_shot have in common.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.loss_scale = torch.ones(1, dtype=torch.float32, device=device)
        self.draw = self.shared_draw = (0, 0, 0)
        self.notes: dict[str, Any] = {}  # what a method keeps on the host from call to call
        self._scratch: dict[str, Tensor] = {}
        for op, owner in owners(device.type).items():
            setattr(self, op, getattr(importlib.import_module(f".{owner}", __name__), op))

    def scratch(self, name: str, dtype: torch.dtype, count: int, begin: Callable[[Tensor], object] | None = None) -> Tensor:
        """A tensor [count] that is the same at every call with this name. At first it is zero, or what begin(tensor) writes."""
        held = self._scratch.get(name)
        if held is None or held.numel() != count:
            held = self._scratch[name] = torch.zeros(count, dtype=dtype, device=self.device)
            if begin is not None:
                begin(held)
        return held


def select(device: torch.device | str) -> Kernels:
    return Kernels(torch.device(device))
