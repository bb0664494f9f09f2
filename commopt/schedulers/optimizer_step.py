"""The step of a torch optimizer, taken for some of its parameters, with the settings that it had when it was asked for."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# What these do to a parameter depends on that parameter, its gradient and its state alone.
_PER_PARAMETER = [getattr(torch.optim, name) for name in (
    "SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "Rprop", "ASGD", "Adafactor", "Muon") if hasattr(torch.optim, name)]

Groups = list[dict[str, Any]]


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
    """The settings of a parameter group as they are now: schedulers change them in place."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items() if key != "params"}


def step(optimizer: Optimizer, groups: Groups, gradients: dict[Tensor, Tensor]) -> None:
    """The optimizer's own step on these groups and gradients. Its hooks are not called again, and nothing else of it or of
    the parameters' grad changes."""
    with torch.inference_mode(False), torch.no_grad():
        held, kept = optimizer.param_groups, [(p, p.grad) for group in groups for p in group["params"]]
        try:
            optimizer.param_groups = groups
            for p, _ in kept:
                p.grad = gradients[p]
            _step_of(type(optimizer))(optimizer)
        finally:
            optimizer.param_groups = held
            for p, grad in kept:
                p.grad = grad
