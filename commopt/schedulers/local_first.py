"""This rank's own gradient at once, with what the others' differed from it one step ago.

    x_t = g_t + (m(g_t-1) - g_t-1)

m(g_t) travels from a copy of g_t until the hook of the same bucket comes again. The sum of a rank's x is that of all means
plus its last g - m(g): with SGD, replicas are apart by lr times one correction, with momentum by up to 1 / (1 - momentum) of them. It is zero in the mean over ranks, so the mean of the
replicas is where all means have led. Every 64 steps, after the optimizer's step, and in handle.flush(), state_dict() and
detach(), which all ranks then call together, replicas become that mean: parameters and the optimizer's floating-point
state are averaged exactly, and the correction that is under way is dropped. Afterwards all ranks hold the same bits.

Where a flush comes between backward and optimizer.step(), p.grad becomes m(g_t).
"""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .divergence import Divergence, norm
from .late import Buckets, Handle, refuse
from .steps_seen import refuse as refuse_step, unwatch, watch

_SYNCHRONOUS = 2  # steps, in which DDP finds its buckets
_EVERY = 64  # steps after which replicas are brought together
MEAN, OWN = 0, 1


class LocalFirst:
    opens = True  # every exchange of a bucket is another step's
    saving = False  # one rank alone may save its model or optimizer

    def __init__(self, module: nn.Module, parameters: list[Tensor], handle: Handle):
        self._parameters, self._handle = parameters, handle
        self._buckets, self._guard = Buckets(handle), Divergence()
        self._steps = 0
        self._began = False  # whether a backward has, whose end is awaited
        self._apart = False  # whether replicas may differ
        self._due = False  # whether the optimizers' next steps bring them together
        self._unstepped = False  # whether no optimizer has stepped with p.grad
        self._squares = 0.0  # of the norms of the means that came in this backward
        self._optimizers: list[Optimizer] = []  # that have stepped since replicas were one, in the order in which they did
        self._error: RuntimeError | None = None
        watch(self)

    def draw(self, step: int) -> int:
        return step

    @torch.no_grad()
    def takes(self, x: Tensor, parameters: list[Tensor], last: bool, joined: bool) -> bool:
        """DDP has a gradient of this step. Whether x now is what to step with; else it is averaged as usual."""
        refuse(x, joined)
        self._began = True
        if self._steps < _SYNCHRONOUS:
            return False
        if self._due:
            self._optimizers.clear()
        self._apart, self._due = True, False
        bucket = self._buckets.of(x, parameters)
        self._buckets.land(parameters)
        mean, own = bucket.flats
        self._squares += norm([mean]) ** 2
        mean.sub_(own)
        own.copy_(x)
        x.add_(mean)
        mean.copy_(own)
        self._buckets.begin(bucket, MEAN, last)
        return True

    def backward_is_over(self) -> None:
        if not self._began:  # with reentrant checkpoints one has several ends
            return
        self._began = False
        squares, self._squares = self._squares, 0.0
        self._steps += 1
        self._unstepped = True
        self._due = self._apart and self._steps % _EVERY == 0
        if self._error is None:
            try:
                self._guard.see_norm(math.sqrt(squares) if squares < math.inf else squares)
            except RuntimeError as error:
                self._error = error
        if self._error is not None:
            raise self._error

    def is_asked(self, optimizer: Optimizer, closure: bool, first: bool) -> bool:
        if not self._of(optimizer):
            return False
        refuse_step(optimizer, closure, first and self._handle.scaled(optimizer))
        return True

    def before_step(self, optimizer: Optimizer) -> None:
        self._unstepped = False
        if self._apart and optimizer not in self._optimizers:
            self._optimizers.append(optimizer)

    def after_step(self, optimizer: Optimizer) -> None:
        if self._due:
            self.land()
            self._handle.ended()
            self._bring_together(optimizer)

    def _of(self, optimizer: Optimizer) -> list[Tensor]:
        """The model's parameters that it steps."""
        mine = set(map(id, self._parameters))
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in mine]

    @torch.no_grad()
    def _bring_together(self, optimizer: Optimizer) -> None:
        parameters = self._of(optimizer)
        state = [value for p in parameters if p in optimizer.state for value in optimizer.state[p].values()
                 if isinstance(value, Tensor) and value.is_floating_point() and (value.dim() or value.shape == p.shape)]  # not counters, which are alike
        self._handle.average([p.detach() for p in parameters] + state)
        means, own = self._buckets.views(MEAN), self._buckets.views(OWN)
        for p in parameters:
            if p in own:
                own[p].copy_(means[p])

    def land(self) -> None:
        self._buckets.land()

    @torch.no_grad()
    def flush(self) -> None:
        """Replicas become one. All ranks call it."""
        self.land()
        self._handle.ended()
        if not self._apart:
            return
        if self._unstepped:
            for p, mean in self._buckets.views(MEAN).items():
                if p.grad is not None:
                    p.grad.copy_(mean)
        for optimizer in self._optimizers:
            self._bring_together(optimizer)
        self._optimizers.clear()
        self._apart = False

    def stop(self) -> None:
        self.flush()
        unwatch(self)
