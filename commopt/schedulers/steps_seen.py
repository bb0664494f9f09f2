"""Tells of the steps of all optimizers, right before and right after them."""

import functools
import weakref
from typing import Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Watcher(Protocol):
    def is_asked(self, optimizer: Optimizer, closure: bool, first: bool) -> bool:
        """Called before all hooks of a step, with a closure or not, the first that is seen of it or not. Whether it wants to know
        more of it."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Called behind all other hooks that come before the step: they may change gradients."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called first of all hooks that come after it."""

    def flush(self) -> None:
        """Called before the optimizer's state is saved or loaded, where `saving`."""

    saving: bool


# One hook for all, which stays: torch may be going through its hooks when a watcher is collected as garbage.
_watchers: weakref.WeakKeyDictionary[Watcher, weakref.WeakKeyDictionary[Optimizer, tuple]] = weakref.WeakKeyDictionary()


def watch(watcher: Watcher) -> None:
    _watchers[watcher] = weakref.WeakKeyDictionary()
    _watch_all()


def unwatch(watcher: Watcher) -> None:
    for hooks in _watchers.pop(watcher, {}).values():
        for hook in hooks:
            hook.remove()


@functools.cache
def _watch_all() -> None:
    register_optimizer_step_pre_hook(_before_any_step)


def _before_any_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for watcher, known in list(_watchers.items()):
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not watcher.is_asked(optimizer, closure is not None, optimizer not in known):
            continue
        if optimizer not in known:
            known[optimizer] = _hooks(weakref.ref(watcher), optimizer)
        before, after, *_ = known[optimizer]
        optimizer._optimizer_step_pre_hooks.move_to_end(before.id)
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)


def _hooks(held: weakref.ref, optimizer: Optimizer) -> tuple:
    def call(name: str, *args) -> None:
        if (watcher := held()) is not None and (name != "flush" or watcher.saving):
            getattr(watcher, name)(*args)

    return (
        optimizer.register_step_pre_hook(lambda o, a, k: call("before_step", o)),
        optimizer.register_step_post_hook(lambda o, a, k: call("after_step", o)),
        optimizer.register_state_dict_pre_hook(lambda o: call("flush")),
        optimizer.register_load_state_dict_pre_hook(lambda o, state: call("flush")),
    )


def refuse(optimizer: Optimizer, closure: bool, scaled: bool) -> None:
    """RuntimeError for a step that delayed gradients do not go with."""
    if closure:
        raise RuntimeError('schedule="delayed" does not go with optimizer.step(closure): call backward and then optimizer.step(), or use schedule="decoupled"')
    if scaled:
        raise RuntimeError('schedule="delayed" does not go with a GradScaler, which may drop a step whose gradients are under way: '
                           'use bfloat16 autocast, which needs no scaler, or schedule="decoupled"')
