"""Exchanges that backward does not wait for: gradients that are awaited, and optimizer steps that wait with them.

When backward is over, the gradients of exchanges that are under way are made awaited (see `awaited`). Whoever looks at one,
to clip it or to check it for infinities, waits for its bucket there, and nothing is deferred any more for that bucket. Those
that nobody has looked at when the optimizer is asked for its step are hidden from it: it steps with what is there, and for
each of the other buckets once it has come, with the settings that it had when it was asked. Until then the bucket's
parameters are awaited, in the next forward or wherever they are used.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.optim import Optimizer

from .awaited import AwaitedGradient, arrived, await_, can_wait
from .optimizer_step import Later, is_per_parameter
from .steps_seen import unwatch, watch


class Arrival:
    """Exchanges that are under way: the parameters, their averaged gradients when the futures are done, and the steps that
    optimizers will take with them."""

    def __init__(self, numbers: list[int], parameters: list[Tensor], gradients: list[Tensor], futures: list[Future]):
        self.numbers, self.parameters, self.gradients, self.futures = numbers, parameters, gradients, futures
        self.steps: dict[Optimizer, Later] = {}
        self.over = False

    @property
    def done(self) -> bool:
        return all(future.done() for future in self.futures)

    def take(self, optimizer: Optimizer, number: int, group: dict[str, Any], p: Tensor) -> None:
        """The parameter's step, in that group of the optimizer, is to be taken with this."""
        self.steps.setdefault(optimizer, Later(optimizer, p.device.type)).add(number, group, p)


class Deferral:
    """The awaited gradients and parameters of one model, which hold it for as long as they are.

    until: "step", where every bucket's optimizer step is taken within optimizer.step(), or "use", where it may wait for the
    next forward. unused: whether parameters may get no gradient on any rank; DDP leaves their grad as it was, and so does this.
    ended(): called when exchanges have ended; raises what one failed with. waiting(numbers): entered for as long as somebody
    waits for those exchanges.
    """

    saving = True  # the optimizer's state waits for what it is asked for

    def __init__(
        self, module: nn.Module, until: str, unused: bool, ended: Callable[[], None], waiting: Callable[[list[int]], AbstractContextManager]
    ):
        self.until, self._unused, self._ended, self._waiting = until, unused, ended, waiting
        self.compiled = False  # whether there is compiled code, which does not notice awaited tensors
        self.deferred_steps = self.early_steps = 0
        self._lock = threading.RLock()
        self._coming: list[tuple[Arrival, list]] = []  # of the backward that is under way, with what grad was before DDP writes it
        self._pending: list[Arrival] = []  # of one that is over, in the order in which they were begun
        self._lent: list[tuple[Tensor, Tensor]] = []  # parameters and gradients, which lie in DDP's buckets
        self._hidden: list[tuple[Arrival, Tensor, Tensor]] = []  # while an optimizer steps: the parameters that must wait, with gradients
        self._looked_early = False
        self._asked = False  # whether the step that is asked for is to leave something for later
        self._modules = weakref.WeakSet(module.modules())
        self._module_hook: Any = None

    # --- a backward ---

    def expect(self, numbers: list[int], parameters: list[Tensor], gradients: list[Tensor], futures: list[Future]) -> None:
        """Exchanges have begun, whose gradients will be awaited when this backward is over."""
        before = [_version(p.grad) for p in parameters] if self._unused else [None] * len(parameters)
        self._coming.append((Arrival(numbers, parameters, gradients, futures), before))

    def forget(self) -> None:
        """The backward that was under way has failed."""
        self._coming = []

    def backward_is_over(self) -> None:
        """Makes the gradients awaited."""
        with self._lock:
            for arrival, before in self._coming:
                used = [p.grad is not None and (was is None or _version(p.grad) != was) for p, was in zip(arrival.parameters, before)]
                for values in (arrival.parameters, arrival.gradients):
                    values[:] = [value for value, there in zip(values, used) if there]
                for p, g in zip(arrival.parameters, arrival.gradients):
                    arrived(g)
                    p.grad = g
                    await_(g, functools.partial(_look, weakref.ref(self), weakref.ref(arrival), arrival.futures, weakref.ref(g)))
                self._pending.append(arrival)
                self._lent += zip(arrival.parameters, arrival.gradients)
            self._coming, self._looked_early = [], False
            _watch_compiling()
            if self.compiled:  # since the backward began
                self.flush()

    def flush(self) -> None:
        """Returns when all gradients and parameters are there."""
        with self._lock:
            self._show_hidden()
            while self._pending:
                self._arrive(self._pending[0])

    def _look(self, arrival: Arrival) -> None:
        """Somebody looks at a gradient."""
        if not arrival.steps and not self._looked_early:
            self._looked_early = True
            self.early_steps += 1
        self._arrive(arrival)

    def _arrive(self, arrival: Arrival, used: bool = True) -> None:
        """used: whether somebody needs it now; else it is simply there."""
        with self._lock:
            if arrival.over:
                return
            with self._waiting(arrival.numbers) if used else contextlib.nullcontext():
                for future in arrival.futures:
                    future.wait()
            self._is_over(arrival)
            try:
                self._ended()
            except Exception:  # the others would raise the same, one by one
                for other in list(self._pending):
                    self._is_over(other)
                raise
            gradients = dict(zip(arrival.parameters, arrival.gradients))
            for later in arrival.steps.values():
                later.take(gradients)

    def _is_over(self, arrival: Arrival) -> None:
        arrival.over = True
        self._pending.remove(arrival)
        for tensor in (*arrival.parameters, *arrival.gradients):
            arrived(tensor)
        if not self._pending:
            self._watch_modules(False)

    # --- a step of an optimizer ---

    def is_asked(self, optimizer: Optimizer, closure: bool, first: bool) -> bool:
        """Whether something of the step is left for later; see `steps_seen`."""
        self._asked = False
        if not self._pending:
            return False
        with self._lock:
            self._show_hidden()
            for arrival in [a for a in self._pending if a.done or a.steps.get(optimizer)]:
                # What is there takes part in the step, and what waits for an earlier step takes that first.
                self._arrive(arrival, used=not arrival.done)
        # Where it is not, the gradients make the step wait.
        self._asked = bool(self._pending) and not closure and is_per_parameter(optimizer)
        return self._asked

    def before_step(self, optimizer: Optimizer) -> None:
        """Hides the gradients that have not come."""
        if not self._asked:
            return
        with self._lock:
            for arrival in self._pending:
                where = dict(zip(arrival.parameters, arrival.gradients))
                for number, group in enumerate(optimizer.param_groups):
                    for p in group["params"]:
                        g = where.get(p)
                        if g is not None and p.grad is g and type(g) is AwaitedGradient and can_wait(p):
                            arrival.take(optimizer, number, group, p)
                            self._hidden.append((arrival, p, g))
            for _, p, _ in self._hidden:
                p.grad = None

    def after_step(self, optimizer: Optimizer) -> None:
        if not self._hidden:
            return
        with self._lock:
            self.deferred_steps += 1
            for arrival, p, _ in self._hidden:
                await_(p, lambda arrival=arrival: self._arrive(arrival))
            self._show_hidden()
            if self.until == "step":
                for arrival in [a for a in self._pending if optimizer in a.steps]:
                    self._arrive(arrival)
            elif self._pending:
                self._watch_modules(True)

    def _show_hidden(self) -> None:
        hidden, self._hidden = self._hidden, []
        for _, p, g in hidden:
            p.grad = g

    # --- what does not notice awaited tensors ---

    def _return_lent(self) -> None:
        """Another backward begins to accumulate. Gradients that were not set to None are not to lie where it reduces them."""
        self.flush()
        lent, self._lent = self._lent, []
        for p, g in lent:
            if p.grad is g:
                p.grad = g.clone()

    def _watch_modules(self, on: bool) -> None:
        """A module's own parameters are there before its forward, for C++ that it calls. Code that computes without
        gradients may take another path for the sake of a tensor's class, and TorchScript sees none: for them all are there."""
        if not on and self._module_hook is not None:
            self._module_hook.remove()
            self._module_hook = None
        elif on and self._module_hook is None:
            held = weakref.ref(self)

            def before_forward(module: nn.Module, args: tuple) -> None:
                if held() is None:
                    hook.remove()
                else:
                    held()._before_forward(module)

            hook = self._module_hook = nn.modules.module.register_module_forward_pre_hook(before_forward)

    def _before_forward(self, module: nn.Module) -> None:
        if module not in self._modules:
            return
        if not torch.is_grad_enabled() or isinstance(module, torch.jit.ScriptModule):
            self.flush()
        for p in module._parameters.values():
            arrive = getattr(p, "_arrive", None)
            if arrive is not None:
                arrive()

    def guard(self, module: nn.Module) -> list:
        """Begins to watch the module's parameters. What it returns is to be kept: autograd makes one anew when nobody holds it.
        Not in here: it holds the parameters in C++, and a parameter that is awaited and held from here would never go."""
        held = weakref.ref(self)

        def before_accumulating(gradients: tuple) -> None:
            deferral = held()
            if deferral is not None and deferral._lent:
                deferral._return_lent()

        nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in module.parameters() if p.requires_grad]
        self._guards = [node.register_prehook(before_accumulating) for node in nodes]
        _deferrals.add(self)
        watch(self)
        _watch_compiling()
        return nodes

    def stop(self) -> None:
        """Leaves the model as it was."""
        self.flush()
        _deferrals.discard(self)
        unwatch(self)
        for hook in self._guards:
            hook.remove()

    def _before_compiling(self) -> None:
        self.compiled = True
        self.flush()


_deferrals: weakref.WeakSet[Deferral] = weakref.WeakSet()  # that are told of compiled code


def _watch_compiling() -> None:
    """Has torch.compile tell before it traces. torch._dynamo.reset() has that forgotten."""
    from torch._dynamo.callback import callback_handler  # seconds to import; an optimizer has done so already

    if _before_any_compiling not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_before_any_compiling)


def _before_any_compiling(*_: Any) -> None:
    for deferral in list(_deferrals):
        deferral._before_compiling()


def _look(held: weakref.ref, arrival: weakref.ref, futures: list[Future], gradient: weakref.ref) -> None:
    """Somebody looks at a gradient. A parameter holds its grad in C++: if that held the parameter, both would never go."""
    if held() is not None and arrival() is not None:
        held()._look(arrival())
    else:  # the handle has gone, and no step waits
        for future in futures:
            future.wait()
        arrived(gradient())


def _version(grad: Tensor | None) -> tuple[int, int] | None:
    return None if grad is None else (id(grad), grad._version)
