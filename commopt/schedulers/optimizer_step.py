"""The step of a torch optimizer, taken for some of its parameters, with the settings that it had when it was asked for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

# What these do to a parameter depends on that parameter, its gradient and its state alone.
_PER_PARAMETER = [getattr(torch.optim, name) for name in (
    "SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "Rprop", "ASGD", "Adafactor", "Muon") if hasattr(torch.optim, name)]


def _step_of(kind: type[Optimizer]):
    """The method beneath what torch wraps around it, which calls the hooks of a step."""
    step = kind.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step


def is_per_parameter(optimizer: Optimizer) -> bool:
    """Whether its step may be taken for one parameter after the other: one of torch's own that can, or a subclass that
    leaves its step alone."""
    kind = type(optimizer)
    steps = any(_step_of(kind) is _step_of(known) and kind._init_group is known._init_group for known in _PER_PARAMETER)
    return steps and not optimizer.defaults.get("differentiable")


def settings(group: dict[str, Any]) -> dict[str, Any]:
    """Those of a parameter group as they are now: schedulers change them in place."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"}


class Later:
    """The step that an optimizer was asked for, of some parameters: to be taken with the settings and the autocast that were
    in force then, which may be others where the gradients come."""

    def __init__(self, optimizer: Optimizer, device: str):
        self._optimizer = optimizer
        self._groups: dict[int, dict[str, Any]] = {}  # by their number in the optimizer
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def add(self, number: int, group: dict[str, Any], p: Tensor) -> None:
        if number not in self._groups:
            self._groups[number] = settings(group) | {"params": []}
        self._groups[number]["params"].append(p)

    def take(self, gradients: dict[Tensor, Tensor]) -> None:
        """The optimizer's own step. Its hooks are not called again, and nothing else of it or of the parameters' grad changes."""
        optimizer, groups = self._optimizer, list(self._groups.values())
        held, kept = optimizer.param_groups, [(p, p.grad) for group in groups for p in group["params"]]
        with self._as_when_asked():
            try:
                optimizer.param_groups = groups
                for p, _ in kept:
                    p.grad = gradients[p]
                _step_of(type(optimizer))(optimizer)
            finally:
                optimizer.param_groups = held
                for p, grad in kept:
                    p.grad = grad

    @contextlib.contextmanager
    def _as_when_asked(self) -> Iterator[None]:
        """Within a forward there may be modes that are not meant for the step: a selective checkpoint notes all that is computed."""
        device, dtype, enabled = self._autocast
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, dtype, enabled), _disable_current_modes():
            yield
