"""Two halves of a step's gradient, each of which travels while the other is computed.

The trainer's optimizer.step() takes a step with the first half alone, an estimate. When the second half has come, in the middle of
the next step, parameters and optimizer state are put back to what they were, and the optimizer takes its real step with
both, with the settings that it had when the trainer asked for it. See `delayed` for the formulas.

When who waits for what:

    pass h is over        its gradient is taken from p.grad; b of the step before has come, the real step is taken; a begins
    hook of pass k        this bucket's a has come (a plan serves one exchange at a time); its b begins
    backward k is over    p.grad = (k / h) m(a), on all ranks the same, for whoever looks at it
    optimizer.step()      the estimate

Each step begins exactly two exchanges of each bucket, also when it ends before its h-th pass: its a is then zero, and p.grad
is m(b) at once, as if synchronous. So k may change from step to step, even on some ranks only: after the next real step
all have the same parameters.

What has multiplied p.grad by a number before the step, such as clip_grad_norm_, is taken to do the same to the
real gradient, with the same number for each parameter; RuntimeError for any other change of p.grad.

Whoever looks at parameters between optimizer.step() and the middle of the next step sees the estimate, but for: the model's
forward without gradients, its state_dict(), the optimizer's, and all methods of the handle that look at parameters or
state. These take the real step first, and nothing is lost by that. What reads parameters in other ways (an average of
weights, a child's state_dict()) calls handle.flush() first, and so does what writes them: in place that is an error, by
`p.data` it is not noticed.
"""

import weakref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .divergence import Divergence, norm
from .late import Buckets, Handle, refuse
from .optimizer_step import Later, settings
from .passes import Passes
from .snapshot import Snapshot
from .steps_seen import refuse as refuse_step, unwatch, watch

_SYNCHRONOUS = 2  # steps that are, in which DDP finds its buckets and we k
FIRST, SECOND = 0, 1


class Halves:
    saving = True

    def __init__(self, module: nn.Module, parameters: list[Tensor], handle: Handle):
        self._parameters, self._handle = parameters, handle
        self._buckets, self._guard = Buckets(handle), Divergence()
        self._passes = Passes(parameters, self._step_begins, self._pass_is_over)
        self._steps = 0
        self._k: int | None = None  # once it is known
        self._synced = False  # whether the pass that is under way is a step's last
        self._first_sent = False  # whether this step's first half is under way, or has come
        self._short = False  # whether this step has none
        self._estimates: list[Estimate] = []
        self._real: dict[Tensor, Tensor] | None = None  # the whole gradient for them, where it could not wait in the buckets
        self._shown: dict[Tensor, tuple[Tensor, int]] = {}  # what is in p.grad for the optimizer, and its version
        self._ratio = 1.0
        self._error: RuntimeError | None = None
        watch(self)
        self._hooks = _see_evaluation(module, self)

    # --- a backward ---

    def takes(self, x: Tensor, parameters: list[Tensor], last: bool, joined: bool) -> bool:
        """DDP has a gradient of this step. Whether it travels late; else it is averaged as usual."""
        refuse(x, joined)
        self._synced = True
        if self._k is None or self._k < 2:
            self._buckets.of(x, parameters)
            return False
        if not self._first_sent:
            self._short = True
            self._send_no_first()
        bucket = self._buckets.of(x, parameters)
        self._buckets.land(parameters)
        bucket.flats[SECOND].copy_(x)
        self._buckets.begin(bucket, SECOND, last)
        return True

    @property
    def opens(self) -> bool:
        """Whether the next exchange begins a step, and not its second half."""
        return not self._first_sent

    def draw(self, step: int) -> int:
        """The number that the step's random numbers are drawn by: another for each half."""
        return 2 * step + self._first_sent

    def _step_begins(self) -> None:
        if self._error is not None:
            raise self._error
        if self._steps and self._k and any(p.grad is not None and bool(p.grad.any()) for p in self._parameters):
            raise RuntimeError('schedule="delayed" needs gradients that begin at zero: call optimizer.zero_grad() between optimizer.step() and the next backward')
        self._shown = {}

    @torch.no_grad()
    def _pass_is_over(self) -> None:
        if self._synced or not self._k or self._first_sent or self._passes.count < self._k // 2:
            return
        gradients = {p: p.grad for p in self._parameters}
        for p in self._parameters:
            p.grad = None
        self._take_real_step()
        self._buckets.land()
        self._handle.ended()
        for bucket in self._buckets:
            for p, view in bucket.views[FIRST].items():
                view.zero_() if gradients[p] is None else view.copy_(gradients[p])
        self._send_first()

    def _send_first(self) -> None:
        *others, last = self._buckets
        for bucket in others:
            self._buckets.begin(bucket, FIRST, False)
        self._buckets.begin(last, FIRST, True)
        self._first_sent = True

    def _send_no_first(self) -> None:
        self._buckets.land()
        if self._estimates:
            self._real = {p: g.clone() for p, g in self._sum().items()}
        for bucket in self._buckets:
            bucket.flats[FIRST].zero_()
        self._send_first()

    @torch.no_grad()
    def backward_is_over(self) -> None:
        """The last backward of a step is, and DDP has written p.grad."""
        passes, short = self._passes.count, self._short
        self._passes.check()
        self._passes.reset()
        self._steps += 1
        self._synced = self._first_sent = self._short = False
        if self._k is None:
            if self._steps == _SYNCHRONOUS:
                self._handle.agree({"backward passes per step": passes})
                self._k = passes
            return
        if self._k < 2:
            self._error = RuntimeError(
                'schedule="delayed" with correction=half needs two or more backward passes per optimizer step, all but the last under ddp.no_sync(): '
                'this training has one. schedule="delayed:correction=local" needs no more')
            raise self._error
        there, first = [p for p in self._parameters if p.grad is not None], self._buckets.views(FIRST)
        self._ratio = passes / (self._k // 2)
        if short:
            self._take_real_step()
            self._show_whole(there)
            return
        self._finite([first[p] for p in there])
        torch._foreach_copy_([p.grad for p in there], torch._foreach_mul([first[p] for p in there], self._ratio))
        self._shown = {p: (p.grad, p.grad._version) for p in there}

    # --- the optimizers' steps ---

    def is_asked(self, optimizer: Optimizer, closure: bool, first: bool) -> bool:
        mine = set(map(id, self._parameters))
        if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            return False
        refuse_step(optimizer, closure, first and self._handle.scaled(optimizer))
        if any(estimate.optimizer is optimizer for estimate in self._estimates):
            raise RuntimeError('schedule="delayed": the optimizer steps twice for one synchronised backward; call handle.flush() between')
        return True

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        stepped = [(number, group, p) for number, group in enumerate(optimizer.param_groups) for p in group["params"]
                   if p in self._shown and p.grad is not None]
        if stepped:
            self._estimates.append(Estimate(optimizer, stepped, {p: self._factor(p) for _, _, p in stepped}))
            for _, _, p in stepped:
                del self._shown[p]

    def _factor(self, p: Tensor) -> Tensor | None:
        """By what p.grad was multiplied since it was shown."""
        shown, version = self._shown[p]
        if p.grad is shown and shown._version == version:
            return None
        was, now = self._buckets.views(FIRST)[p] * self._ratio, p.grad
        if torch.equal(was, now):
            return None
        factor = (was.double() * now).sum() / was.double().square().sum()
        off, unit = torch.linalg.vector_norm(now - was * factor), 8 * torch.finfo(now.dtype).eps
        if not off <= unit * torch.linalg.vector_norm(now):
            raise RuntimeError('schedule="delayed" with correction=half takes no change of p.grad between backward and optimizer.step() but by a factor for each '
                               'parameter, as clip_grad_norm_ makes it; for others, such as clip_grad_value_, use schedule="decoupled"')
        return factor

    def after_step(self, optimizer: Optimizer) -> None:
        for estimate in self._estimates:
            if estimate.optimizer is optimizer:
                estimate.taken()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take_real_step(self) -> None:
        """Nothing but the step that an estimate stands for is left to do when this returns."""
        if not self._estimates:
            return
        self._buckets.land()
        self._handle.ended()
        estimates, self._estimates = self._estimates, []
        real, self._real = self._real if self._real is not None else self._sum(), None
        for estimate in estimates:
            estimate.put_back()
        self._see([real[p] for estimate in estimates for p in estimate.factors])
        for estimate in estimates:
            estimate.take(real)

    def _sum(self) -> dict[Tensor, Tensor]:
        """The whole gradient, where its first half was."""
        for bucket in self._buckets:
            bucket.flats[FIRST].add_(bucket.flats[SECOND])
        return self._buckets.views(FIRST)

    def _show_whole(self, parameters: list[Tensor]) -> None:
        """p.grad becomes the whole gradient, and the step with it a real one."""
        self._buckets.land()
        self._handle.ended()
        whole = self._sum()
        self._see([whole[p] for p in parameters])
        for p in parameters:
            p.grad.copy_(whole[p])

    def _see(self, gradients: list[Tensor]) -> None:
        try:
            self._guard.see(gradients)
        except RuntimeError as error:
            self._error = error
            raise

    def _finite(self, gradients: list[Tensor]) -> None:
        size = norm(gradients)
        if not size < float("inf"):
            self._see(gradients)

    # --- what the handle calls ---

    def land(self) -> None:
        self._buckets.land()

    @torch.inference_mode(False)
    @torch.no_grad()
    def flush(self) -> None:
        """Nothing is under way, and what optimizers were asked for is done. Each rank may call it for itself."""
        self._take_real_step()
        self._buckets.land()
        self._handle.ended()
        if self._shown:
            shown = {p: self._factor(p) for p in self._shown if p.grad is not None}
            self._show_whole(list(shown))
            for p, factor in shown.items():
                if factor is not None:
                    p.grad.mul_(factor)
            self._shown = {}

    @torch.no_grad()
    def stop(self) -> None:
        """Leaves the model to a handle that averages at once."""
        self.flush()
        if self._first_sent:
            for p, g in self._buckets.views(FIRST).items():  # alike on all ranks, and so is its mean
                p.grad = g.clone() if p.grad is None else p.grad + g
        unwatch(self)
        self._passes.stop()
        for hook in self._hooks:
            hook.remove()

    def before_forward(self) -> None:
        if self._estimates and not torch.is_grad_enabled():
            self._take_real_step()


class Estimate:
    """A step that an optimizer takes with the first half, to be taken again with both. factors: by what the gradients are multiplied."""

    def __init__(self, optimizer: Optimizer, stepped: list[tuple[int, dict, Tensor]], factors: dict[Tensor, Tensor | None]):
        self.optimizer, self.factors = optimizer, factors
        self._later = Later(optimizer, next(iter(factors)).device.type)
        for number, group, p in stepped:
            self._later.add(number, group, p)
        self._groups = [settings(group) for group in optimizer.param_groups]
        self._snapshot = Snapshot(optimizer, list(factors))
        self._versions: list[int] | None = None

    def taken(self) -> None:
        self._versions = [p._version for p in self.factors]
        if not all(_same(before, now) for before, now in zip(self._groups, map(settings, self.optimizer.param_groups))):
            raise RuntimeError(f'schedule="delayed" with correction=half does not go with {type(self.optimizer).__name__}, which changes settings in its own step')

    def put_back(self) -> None:
        if self._versions is not None and self._versions != [p._version for p in self.factors]:
            raise RuntimeError('schedule="delayed": parameters were written after optimizer.step(), where they are an estimate that does not last: '
                               "call handle.flush() before you write them")
        self._snapshot.put_back()

    def take(self, real: dict[Tensor, Tensor]) -> None:
        self._later.take({p: real[p] if factor is None else real[p] * factor.to(real[p].dtype) for p, factor in self.factors.items()})


def _same(before: dict, now: dict) -> bool:
    return before.keys() == now.keys() and all(
        torch.equal(value, now[key]) if isinstance(value, Tensor) and isinstance(now[key], Tensor) else value == now[key] for key, value in before.items())


def _see_evaluation(module: nn.Module, halves: Halves) -> list:
    """Hooks of what looks at the model's parameters and is to see real ones."""
    return [
        module.register_forward_pre_hook(_Look(halves, "before_forward")),
        module.register_state_dict_pre_hook(_Look(halves, "flush")),
        module.register_load_state_dict_pre_hook(_Look(halves, "flush")),
    ]


class _Look:
    """A hook that goes with copies of the module and does nothing there."""

    def __init__(self, halves: Halves | None, name: str):
        self._held, self._name = weakref.ref(halves) if halves else lambda: None, name

    def __call__(self, *_) -> None:
        if (halves := self._held()) is not None:
            getattr(halves, self._name)()

    def __reduce__(self):
        return _Look, (None, self._name)
