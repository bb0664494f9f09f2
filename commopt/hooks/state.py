"""The handle: everything that belongs to one attached model, and the exchange of one bucket."""

import contextlib
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from .. import __version__
from ..collectives.run import Runner, future_of
from ..compressors import Compressor, parse
from ..plan import Parameter, Plan
from ..residual import Residuals
from ..schedulers import Schedule, parse_schedule
from ..schedulers.awaited import can_wait
from ..schedulers.deferral import Deferral
from ..schedulers.halves import Halves
from ..schedulers.late import Handle
from ..schedulers.launcher import Launcher
from ..schedulers.local_first import LocalFirst
from ..schedulers.order import Planner
from .agreement import agree, nodes
from .bucket import Bucket
from .counts import Counts
from .course import Course
from .exposed import Exposed
from .grad_scaler import LossScale, scaled
from .traffic import Traffic
from .whereabouts import Whereabouts

log = logging.getLogger("commopt")


class State:
    """What `attach` returns, and the state to give to `register_comm_hook` beside `commopt.hook`.

    model: the DistributedDataParallel module. spec: what to compress with, see `commopt.compressors()`.
    rules: {"pattern|pattern": spec}; the first pattern that matches a parameter's name wins. Without a rule, parameters
        with one dimension or fewer than 1024 elements travel exactly, in the same message.
    schedule: when messages travel and what waits for them, see `commopt.schedules()`.
    group: the process group to average over, by default the model's. commopt makes groups of its own with its ranks.
    start_step: the first step that is compressed. Before it gradients are averaged exactly. The default leaves out the
        first step, whose buckets DDP throws away.
    seed: of the random numbers that stochastic rounding draws; the user's random state is not touched.

    Making one is a collective call: all ranks make it, with the same arguments, or all get the same RuntimeError.
    """

    def __init__(
        self, model: torch.nn.Module, spec: str | Compressor, *, schedule: str | Schedule = "pipelined",
        rules: dict[str, str | Compressor] | None = None, group: dist.ProcessGroup | None = None, start_step: int = 1, seed: int = 0,
    ):
        if not dist.is_initialized():
            raise RuntimeError("commopt needs a process group: call torch.distributed.init_process_group first")
        wrong = None
        try:
            self._course, self.schedule = Course(spec, rules or {}, start_step), parse_schedule(schedule)
        except ValueError as error:  # raised when the others know of it: they would wait
            wrong = error
        self.seed, self.step = seed, -1
        module = getattr(model, "module", model)
        ignored = getattr(model, "parameters_to_ignore", ())  # by DDP
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad and n not in ignored]
        self._parameters = {id(p): Parameter(n, p.shape, p.numel()) for n, p in named}
        self._keep_alive = [p for _, p in named]  # an id is a key only while its owner lives
        runner = Launcher if not wrong and self.schedule.planned else Runner
        self._traffic = Traffic(group if group is not None else getattr(model, "process_group", None), self._fail, runner)
        self.rank, self.world = self._traffic.rank, self._traffic.world
        facts = {
            "commopt": __version__, "arguments": f"refused: {wrong}" if wrong else "accepted",
            "spec": str(spec), "schedule": str(schedule), "rules": [f"{patterns}: {rule}" for patterns, rule in (rules or {}).items()], "start_step": start_step, "seed": seed, "world size": self.world,
            "parameters": [f"{n} {list(p.shape)} {str(p.dtype)[6:]}" for n, p in named],
        }
        agree(self._traffic.control, facts)
        self._whereabouts = Whereabouts(self._traffic.alarm.store, self._traffic.control)
        self._nodes = nodes(self._traffic.control)
        if wrong:
            raise wrong
        if self.world == 1:
            log.warning("commopt: the group has one rank, so there is nothing to exchange; gradients are compressed all the same")
        self._buckets: dict[tuple[int, ...], Bucket] = {}  # by the ids of the parameters
        self._loaded = False  # since the last step began
        self._residuals = Residuals()
        self._loss_scale = LossScale()
        self._exchanged: set[str] = set()  # the parameters that this step has begun to exchange
        self._plan_numbers = itertools.count()
        self._backward = -1  # the number of the backward whose end is awaited
        self._sinks: list[tuple[Callable, int]] = []
        self._deferral = self._defer(model, module)
        self._delay = self._be_late(module)
        self._planner = Planner() if self.schedule.planned else None
        self._exposed, self._device = Exposed(), self._keep_alive[0].device if named else torch.device("cpu")
        self._said = False
        self._logged = -1  # the last step that was given to the sinks
        self._counts = Counts()

    def _defer(self, model: torch.nn.Module, module: torch.nn.Module) -> Deferral | None:
        """What has gradients awaited, where the schedule wants that and the model allows it."""
        if self.schedule.waits not in ("step", "use"):
            return None
        unused = getattr(model, "find_unused_parameters", False) or getattr(model, "static_graph", False)
        if unused and getattr(model, "gradient_as_bucket_view", False):
            log.warning("commopt: with unused parameters and gradient_as_bucket_view, DDP itself waits for all gradients when backward is over")
            return None
        held, alarm = weakref.ref(self), self._traffic.alarm  # awaited parameters may outlive the handle
        deferral = Deferral(module, self.schedule.waits, unused, alarm.raise_known, lambda numbers: held()._waiting(numbers) if held() else contextlib.nullcontext())
        self._accumulators = deferral.guard(module)
        return deferral

    def _be_late(self, module: torch.nn.Module) -> Halves | LocalFirst | None:
        """What has gradients come a step late, where the schedule wants that."""
        if self.schedule.waits != "next step":
            return None
        held, alarm, control = weakref.ref(self), self._traffic.alarm, self._traffic.control  # a hook of the model may outlive the handle
        handle = Handle(
            begin=lambda x, parameters, last: held()._begin_late(x, parameters, last), waiting=lambda: held()._exposed.waiting(held()._device),
            ended=alarm.raise_known, agree=lambda facts: agree(control, facts), scaled=scaled, average=lambda tensors: held()._bring_together(tensors))
        return (Halves if self.schedule.correction == "half" else LocalFirst)(module, self._keep_alive, handle)

    # --- one bucket ---

    def exchange(self, x: Tensor, parameters: list[Tensor], last: bool = False) -> Future:
        """Averages x, the flat gradient of the parameters, in place. The future holds x. Never raises: see `_end_step`.
        last: whether none follows in this step. A small exchange waits for the next, or for the end of the backward."""
        backward = torch._C._current_graph_task_id()  # -1: none, this rank has joined
        began = time.perf_counter()
        try:
            if backward not in (-1, self._backward):  # with reentrant checkpoints a step has several, each with its end
                self._backward = backward
                _after_backward(self)
            if not self._traffic.alarm.left:
                if self._delay is not None and self._delay.takes(x, parameters, last, joined=backward == -1):
                    return _completed(x)
                bucket, future, futures = self._begin(x, parameters, last, backward == -1, began)
                if self._deferring and backward != -1 and not x.is_sparse and all(map(can_wait, parameters)):
                    for some in bucket.awaited(x, parameters, self._traffic, futures):
                        self._deferral.expect(*some)
                    return _completed(x)
                if self.schedule.waits == "hook":
                    with self._waiting(bucket.numbers):
                        future.wait()
                return future
        except Exception as error:
            self._hook_failed(error)
        if backward == -1 and self._traffic.alarm.error is not None:  # within join() nothing follows where it could be raised
            raise self._traffic.alarm.error
        return _completed(x)

    def _begin(self, x: Tensor, parameters: list[Tensor], last: bool, joined: bool, began: float) -> tuple[Bucket, Future, list[Future]]:
        """The bucket, the future of x and those of the bucket's pieces."""
        known, key = [self._parameters[id(p)] for p in parameters], tuple(map(id, parameters))
        if self.step < 0 or known[0].name in self._exchanged:
            self._begin_step(began)
        self._exchanged.update(p.name for p in known)
        bucket = self._buckets.get(key) or self._make_plan(x, known, key)
        future, futures = self._send(x, bucket, joined)
        if last or self.schedule.waits == "hook":
            self._traffic.close_batch()
        if self._all_begun:
            self._traffic.close()
        return bucket, future, futures

    def land(self, future: Future) -> None:
        """Returns when that exchange is over, for whoever hands in the next one only then."""
        self._traffic.close()
        future.wait()

    def _begin_late(self, x: Tensor, parameters: list[Tensor], last: bool) -> Future:
        """Begins to average x, which is not DDP's. Never raises."""
        try:
            if not self._traffic.alarm.left:
                return self._begin(x, parameters, last, False, time.perf_counter())[1]
        except Exception as error:
            self._hook_failed(error)
        return _completed(x)

    @property
    def _all_begun(self) -> bool:
        """Whether this step has begun to exchange every parameter."""
        return len(self._exchanged) == len(self._parameters)

    @property
    def _deferring(self) -> bool:
        return self._deferral is not None and not self._deferral.compiled

    @contextlib.contextmanager
    def _waiting(self, numbers: list[int]) -> Iterator[None]:
        """Entered for as long as computation waits for those exchanges."""
        self._traffic.close()
        began = time.perf_counter()
        with self._exposed.waiting(self._device):
            yield
        if self._planner:
            self._planner.used(numbers, began)

    def _send(self, x: Tensor, bucket: Bucket, joined: bool) -> tuple[Future, list[Future]]:
        plan = bucket.plan
        plan.step = self.step if self._delay is None else self._delay.draw(self.step)
        plan.loss_scale = self._scale_on(x.device)
        self._counts.exchange(x, plan)
        return bucket.begin(self._traffic, x, joined)

    def _scale_on(self, device: torch.device) -> Tensor | None:
        scale = self._loss_scale.value
        return None if scale is None else scale.to(device)

    def _make_plan(self, x: Tensor, known: list[Parameter], key: tuple[int, ...]) -> Bucket:
        """A plan for a bucket that was not seen before. The ranks compare what they are about to do."""
        self._traffic.finish()
        if self._delay is not None:
            self._delay.land()
        names = {p.name for p in known}
        self._buckets = {k: b for k, b in self._buckets.items() if names.isdisjoint(p.name for p in b.plan.parameters)}
        spec, rules = (self._course.now if not x.is_sparse else None) or (parse("none"), {})
        plan = Plan(next(self._plan_numbers), known, x.dtype, x.device, spec, rules, self.rank, self.world, self.seed, self._nodes)
        if self.schedule.splits_sums and not x.is_sparse:
            plan.split_sum()
        agree(self._traffic.control, {"bucket": [p.name for p in known], "parts": [f"{p.start}:{p.stop} {p.compressor}" for p in plan.parts], "step": self.step, "plan": plan.number})
        self._residuals.serve(plan)
        self._traffic.free()
        if self._planner:
            self._planner.reset()
        self._buckets[key] = Bucket(plan, self.schedule.planned and not x.is_sparse)
        return self._buckets[key]

    # --- one step ---

    def _begin_step(self, now: float) -> None:
        """now: when the first bucket of the step came."""
        self._finish()
        if self._deferring and self.step >= 0:
            self._traffic.alarm.raise_if_any(self.step)
        opens = self._delay is None or self._delay.opens  # and is not the second half of a step
        self.step += opens
        self._counts.steps += opens
        self._exchanged.clear()
        self._traffic.drop_batch()  # what a backward left that did not end
        turns, loaded, self._loaded = self._course.turn(self.step), self._loaded, False
        here = f"step {self.step} with {self._course}{', after load_state_dict' if loaded else ''}"
        if turns or loaded:  # others may not have been told to
            self._traffic.finish()
            self._whereabouts.meet(here)
        else:
            self._whereabouts.pass_by(here)
        if self._planner:
            self._planner.begin_step(self._traffic.runners, now, self._traffic.control)
        if turns:
            if self._delay is not None:
                self._delay.land()
            self._buckets = {}
        if not self._buckets or self.step < 2:
            self._loss_scale.find()
        if self._loss_scale.updated():
            self._residuals.follow(self._loss_scale.value, self._loss_scale.backoff)

    def _finish(self) -> None:
        """Returns when nothing of a step is under way any more."""
        if self._deferral is not None:
            self._deferral.flush()
            self._deferral.forget()
            self._traffic.finish()
        self._count()

    def _end_step(self, backward_done) -> None:
        """Runs when backward is over and DDP has the gradients. Here, and only here, errors are raised: from backward(),
        on all ranks, with the reducer in good order."""
        if self._deferral is not None and self._all_begun:  # else DDP is still to write gradients
            self._deferral.backward_is_over()
        if not self._deferring:
            self._exposed.end(self._device, backward_done)
        self._count()
        if self._deferring:
            self._traffic.alarm.raise_known()  # the network is busy with gradients; _begin_step asks
        else:
            self._traffic.alarm.raise_if_any(self.step)
        if self._delay is not None and self._all_begun:
            self._delay.backward_is_over()
        if not self._said and self._course.now is not None:
            self._said = True
            if self.rank == 0:
                _say(str(self))
        for sink, every in self._sinks:
            if self.step % every == 0 and self._logged != self.step:
                sink(self.stats(), self.step)
        self._logged = self.step

    def _meet(self, where: str) -> None:
        """Returns when all ranks are about to do what only all can do; else all get the same error."""
        self._finish()
        self._traffic.finish()
        try:
            self._whereabouts.meet(f"{where} after step {self.step}")
        except Exception as error:
            self._fail(error, f"in {where}")
            self._traffic.alarm.raise_known()

    def _bring_together(self, tensors: list[Tensor]) -> None:
        """Replaces replicas by their mean."""
        self._meet("bringing replicas together")
        self._traffic.average(tensors)

    def _hook_failed(self, error: Exception) -> None:
        self._fail(error, "in the hook")
        self._traffic.alarm.leave()

    def _fail(self, error: Exception, where: str) -> None:
        if isinstance(error, ConnectionError) and self._traffic.alarm.error is None:  # else nobody reads it
            error = ConnectionError(f"{error}. Where the ranks came by last:\n{self._whereabouts.of_all()}")
        self._traffic.alarm.post(error, where, self.step)

    @property
    def _plans(self) -> list[Plan]:
        return [bucket.plan for bucket in self._buckets.values()]

    def _count(self) -> None:
        with self._traffic.beside(self._device):  # with some schedules nothing has waited yet for what is seen
            self._counts.see([piece.plan for bucket in self._buckets.values() for piece in bucket.pieces], self.step)

    def _nonfinite_steps(self) -> int:
        with self._traffic.beside(self._device):
            return self._counts.nonfinite()

    # --- what the user calls ---

    @property
    def spec(self) -> Compressor:
        return self._course.spec

    @property
    def plan(self) -> list[dict]:
        """What was decided for each bucket."""
        return [bucket.describe() for bucket in self._buckets.values()]

    def set(self, spec: str | Compressor) -> None:
        """Compresses with another spec from the next step on. All ranks call it between the same two steps."""
        self._course.spec = parse(spec)
        self._said = False

    def pause(self) -> None:
        """Averages exactly from the next step on; residuals wait. All ranks call it between the same two steps."""
        self._course.paused = True

    def resume(self) -> None:
        """Compresses again from the next step on. All ranks call it between the same two steps."""
        self._course.paused = False

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Backward passes in this block average exactly, on all ranks."""
        was, self._course.paused = self._course.paused, True
        try:
            yield
        finally:
            self._course.paused = was

    def flush(self) -> None:
        """Returns when all gradients have come and all steps that optimizers were asked for are taken. A use of a gradient or a
        parameter does the same for that one; this is for what looks at them from outside of Python. With schedule="delayed",
        where parameters are not final before, with correction=local a collective call."""
        if self._delay is not None:
            self._delay.flush()
        self._finish()
        if self._planner:
            self._planner.flushed()

    def detach(self) -> None:
        """Averages exactly for ever and frees residuals and messages. DDP keeps a hook until it is deleted."""
        self._finish()
        if self._deferral is not None:
            self._deferral.stop()
            self._deferral = None
        if self._delay is not None:
            self._delay.stop()
            self._delay = None
        self._course.paused, self._residuals = True, Residuals()
        self._buckets = {}
        self._traffic.free()

    def reset_stats(self) -> None:
        self._counts.reset()
        self._exposed.reset()
        self._traffic.reset_clocks()

    def stats(self) -> dict[str, Any]:
        """Since the start or reset_stats(), per rank: steps; bytes_raw and bytes_wire, gradients and what was handed to the
        network for them (for an all-reduce, what a ring sends); ratio of the two; milliseconds per step of encoding (with
        summing a shard), of rows under way (they overlap) and of decoding, and exposed_ms, for which computation waited for
        communication; predicted_ms of a step in the planned order, if there is one; residual_norm; nonfinite_steps; deferred_steps
        and early_steps, in which optimizers left buckets for later, and in which something looked at gradients before them; spec:
        bucket number -> its specs."""
        counts, per_step = self._counts, 1e3 / max(1, self._counts.steps)
        return {
            "steps": counts.steps,
            "bytes_raw": counts.bytes_raw,
            "bytes_wire": counts.bytes_wire,
            "ratio": counts.bytes_raw / counts.bytes_wire if counts.bytes_wire else 1.0,
            **{f"{name}_ms": per_step * seconds for name, seconds in self._traffic.clocks().items()},
            "exposed_ms": per_step * self._exposed.seconds,
            "predicted_ms": 1e3 * self._planner.predicted if self._planner and self._planner.predicted else None,
            "deferred_steps": self._deferral.deferred_steps if self._deferral else 0,
            "early_steps": self._deferral.early_steps if self._deferral else 0,
            "residual_norm": self._residuals.norm(),
            "nonfinite_steps": self._nonfinite_steps(),
            "spec": {plan.number: plan.describe()["specs"] for plan in self._plans},
        }

    def log_to(self, sink: Callable[[dict, int], None], every: int = 50) -> None:
        """Calls sink(stats, step) after every `every`-th step, on every rank. `commopt.jsonl(file)` is a sink."""
        self._sinks.append((sink, every))

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, loadable with torch.load's default. A collective call: every rank gets the mean residual, so the
        file of any one rank is complete and any number of ranks can load it."""
        self._meet("state_dict")
        self.flush()
        return {"version": 1, "spec": str(self.spec), "step": self.step, "residual": self._residuals.mean(self._traffic.control)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what state_dict returned, with any spec and world size."""
        if not isinstance(state, dict) or state.get("version") != 1 or not {"step", "residual"} <= state.keys():
            raise ValueError("state must be what handle.state_dict() returned, with version 1, step and residual, got "
                             + (f"version {state.get('version')!r} and keys {', '.join(map(str, state))}" if isinstance(state, dict) else repr(state)))
        self.flush()
        self._residuals.load(state["residual"], {p.name: p.numel for p in self._parameters.values()})
        self.step = state["step"]
        self._loaded = True
        self._exchanged = {p.name for p in self._parameters.values()}  # so that the next exchange begins a step

    def __str__(self) -> str:
        raw, sent = (sum(d[k] for d in self.plan) for k in ("bytes_raw", "bytes_sent"))
        text = (f"commopt: {self.spec}, {self.schedule}, on {len(self._plans)} buckets from step {self._course.start_step} on, "
                f"{raw / 1e6:.1f} MB of gradients as {sent / 1e6:.1f} MB per rank and step")
        if self._course.warming_up:
            text += " during the warm-up"
        if self._course.now is not None and self.spec.name != "none" and all(plan.summed for plan in self._plans):
            text += "; nothing is compressed, since that would send no less"
        return text

    def __getstate__(self):
        raise TypeError("a commopt handle belongs to running process groups and cannot be pickled or copied: "
                        "save handle.state_dict(), and attach to the new model")

    def __del__(self):
        if hasattr(self, "_traffic"):
            self._traffic.stop()


def _say(line: str) -> None:
    """One line for the user, also where nobody has configured logging."""
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    log.info(line)


def _completed(x: Tensor) -> Future:
    future = future_of(x)
    future.set_result(x)
    return future


def _after_backward(state: State) -> None:
    """Has state._end_step called when this backward is over and DDP has copied the results. A callback that is queued
    inside the hook runs before DDP's own, one that is queued by such a callback runs after it."""
    engine = torch.autograd.Variable._execution_engine

    def before() -> None:
        state._traffic.close_batch()  # DDP has a last bucket, but not in every mode
        if not state._deferring:
            state._traffic.close()
        if state._planner:
            state._planner.backward_is_over()
        began = state._exposed.begin(state._device)
        engine.queue_callback(lambda: state._end_step(began))

    engine.queue_callback(before)
