"""Exchanges under way when something ends: a handle, a model, a rank, a process; and what they hold."""

import gc
import os
import signal
import sys
import threading
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.optimizer import _global_optimizer_pre_hooks

import commopt
import test_faults  # registers compressors that fail
from commopt.schedulers.awaited import AwaitedParameter
from ranks import Given, Mixed, close, each_rank, endings, loss_of, raised, run, same, same_everywhere, slow, start
from test_state import through_a_file

SCHEDULES = ["with_optimizer", "priority", "decoupled"]
SHAPES = [(64, 33), (7,), (50, 50), (40, 40)]


def model(schedule: str | None, spec: str = "int4", shapes: list = SHAPES, **options):
    torch.manual_seed(3)
    ddp = DDP(Given(*shapes), bucket_cap_mb=0.008)
    handle = commopt.attach(ddp, spec, schedule=schedule, start_step=0, **options) if schedule else None
    return ddp, handle, torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)


def train(ddp, optimizer, rank: int, steps) -> None:
    """Leaves the last step under way."""
    for step in steps:
        optimizer.zero_grad()
        ddp(ddp.module.random(rank, step)).backward()
        optimizer.step()


def waits(ddp) -> bool:
    return any(type(p) is AwaitedParameter for p in ddp.module.w)


def all_as_the_first(results: list[list[torch.Tensor]]) -> None:
    """The parameters that each of SCHEDULES has led to are those of the one before them, bit for bit."""
    for schedule, got in zip(SCHEDULES, results[1:]):
        for p, q in zip(got, results[0]):
            same(p, q, schedule)


def gone_soon(*references: weakref.ref) -> bool:
    """When the threads have let go of them, too."""
    deadline = time.monotonic() + 5
    while any(reference() is not None for reference in references) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return all(reference() is None for reference in references)


# --- ends in the middle of an exchange ---

READERS = {
    "parameters": lambda ddp, handle: None,
    "flush": lambda ddp, handle: handle.flush(),
    "detach": lambda ddp, handle: handle.detach(),
    "state": lambda ddp, handle: handle.state_dict(),
    "load": lambda ddp, handle: handle.load_state_dict(handle.state_dict()),
    "pause": lambda ddp, handle: (handle.pause(), handle.resume(), handle.set("int8")),
    "collected": lambda ddp, handle: gc.collect(),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@each_rank(2)
def test_whatever_ends_the_step_its_parameters_are_those_of_the_plain_schedule(rank, world, schedule):
    slow(0.01)
    ddp, handle, optimizer = model("plain")
    train(ddp, optimizer, rank, range(4))
    want = [p.detach().clone() for p in ddp.parameters()]
    for how, end in READERS.items():
        ddp, handle, optimizer = model(schedule)
        train(ddp, optimizer, rank, range(4))
        assert waits(ddp) == (schedule != "with_optimizer"), how
        end(ddp, handle)
        if how in ("flush", "detach", "state", "load"):
            assert not waits(ddp), how
        for p, q in zip(ddp.parameters(), want):
            same(p.detach(), q, how)
    ddp, handle, optimizer = model(schedule)
    train(ddp, optimizer, rank, range(4))
    inner, gone = ddp.module, weakref.ref(handle)
    del ddp, handle, optimizer
    gc.collect()
    for p, q in zip(inner.parameters(), want):
        same(p.detach(), q, "the model alone")
    assert gone_soon(gone)
    ddp, handle, optimizer = model(schedule)
    ddp(ddp.module.random(rank, 9)).backward()
    parameters = list(ddp.parameters())
    del ddp, handle, optimizer
    gc.collect()
    for i, p in enumerate(parameters):
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), sum(Given(*SHAPES).random(r, 9)[i] for r in range(world)).flatten(), 0) > 0.9, "the gradients alone"
    ddp, handle, optimizer = model(schedule)
    train(ddp, optimizer, rank, range(4))
    if rank == 0:  # for whom the other still exchanges
        for p, q in zip(ddp.parameters(), want):
            same(p.detach(), q, "on one rank only")
    del ddp, handle, optimizer
    gc.collect()
    dist.barrier()
    time.sleep(0.5)
    assert len([t for t in threading.enumerate() if t.name.startswith("commopt")]) <= 2


@pytest.mark.parametrize("schedule", SCHEDULES)
@each_rank(2)
def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_one(rank, world, schedule):
    """All three states taken in the middle of a step, in each order."""
    slow()

    def steps(ddp, optimizer, numbers):
        for step in numbers:
            optimizer.zero_grad()
            loss_of(ddp, rank, step).backward()
            optimizer.step()

    for spec in ("none", "int8"):
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            made = []
            for _ in range(2):
                torch.manual_seed(3)
                ddp = DDP(Mixed(), bucket_cap_mb=0.01, find_unused_parameters=True)
                made.append((ddp, torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=1e-3), commopt.attach(ddp, spec, schedule=schedule)))
            states: list = [None] * 3
            steps(*made[0][:2], range(3 + order[0]))
            for i in order:
                states[i] = through_a_file(made[0][i].state_dict())
            for i in order[::-1]:
                made[1][i].load_state_dict(states[i])
            for ddp, optimizer, _ in made:
                steps(ddp, optimizer, range(3 + order[0], 7))
            for p, q in zip(made[1][0].parameters(), made[0][0].parameters()):
                same(p.detach(), q.detach(), f"{spec} {order}")


@pytest.mark.parametrize("spec", ["none", "int4"])
@each_rank(2, 3)
def test_uneven_inputs(rank, world, spec):
    slow()
    results = []
    for schedule in ("plain", *SCHEDULES):
        ddp, handle, optimizer = model(schedule, spec)
        with ddp.join():
            train(ddp, optimizer, rank, range(2 + 2 * rank))
        same_everywhere(ddp.parameters(), schedule)
        results.append([p.detach().clone() for p in ddp.parameters()])
        handle.detach()
    for schedule, got in zip(SCHEDULES, results[1:]):
        for p, q in zip(got, results[0]):
            if spec == "none" and world > 2 and schedule == "decoupled":  # sums in another order
                close(p, q, 1e-6, schedule)
            else:
                same(p, q, schedule)


@each_rank(2)
def test_a_backward_that_raises_does_not_harm_the_next_step(rank, world):
    """Before the first bucket is ready: DDP itself goes on after that."""
    slow()
    results = []
    for schedule in ("plain", *SCHEDULES):
        ddp, handle, optimizer = model(schedule)
        for step in range(5):
            optimizer.zero_grad()
            loss = ddp(ddp.module.random(rank, step))
            if step in (1, 3):
                loss.register_hook(lambda grad: 1 / 0)
                assert isinstance(raised(loss.backward), ZeroDivisionError)
            else:
                loss.backward()
                optimizer.step()
        results.append([p.detach().clone() for p in ddp.parameters()])
        handle.detach()
    all_as_the_first(results)


@each_rank(2)
def test_stats_tell_what_was_deferred(rank, world):
    slow(0.02)
    for schedule in ("pipelined", *SCHEDULES):
        ddp, handle, optimizer = model(schedule)
        train(ddp, optimizer, rank, range(5))
        handle.flush()
        stats = handle.stats()
        assert (stats["deferred_steps"], stats["early_steps"]) == ((0, 0) if schedule == "pipelined" else (5, 0)), (schedule, stats)
        assert stats["steps"] == 5 and stats["exposed_ms"] > 0 and {"encode_ms", "comm_ms", "decode_ms"} <= stats.keys()
        assert (stats["predicted_ms"] is not None) == (schedule in ("priority", "decoupled"))
        for step in range(3):
            optimizer.zero_grad()
            ddp(ddp.module.random(rank, step)).backward()
            nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
            optimizer.step()
        assert (handle.stats()["deferred_steps"], handle.stats()["early_steps"]) == ((0, 0) if schedule == "pipelined" else (5, 3)), (schedule, handle.stats())
        handle.detach()


@each_rank(2)
def test_from_when_something_is_compiled_backward_waits(rank, world):
    """Also in the middle of a backward, and after torch._dynamo.reset(), which forgets who wanted to know."""
    slow()
    results = []
    for schedule in ("plain", *SCHEDULES):
        ddp, handle, optimizer = model(schedule)
        train(ddp, optimizer, rank, range(2))
        torch._dynamo.reset()
        train(ddp, optimizer, rank, range(2, 4))
        deferred = handle.stats()["deferred_steps"]
        double = torch.compile(lambda x: 2 * x, backend="eager")
        hook = ddp.module.w[1].register_hook(double)  # its bucket is not the first
        train(ddp, optimizer, rank, [4])
        assert not waits(ddp), schedule
        train(ddp, optimizer, rank, [5, 6])
        assert not waits(ddp) and handle.stats()["deferred_steps"] == deferred, schedule
        assert handle.stats()["early_steps"] == 0
        hook.remove()
        results.append([p.detach().clone() for p in ddp.parameters()])
        handle.detach()
    all_as_the_first(results)


# --- ranks that fail or die ---


def _fail(rank: int, world: int, schedule: str, where: str, spec: str) -> list[str]:
    slow()
    ddp, handle, optimizer = model(schedule, spec)
    train(ddp, optimizer, rank, range(3))
    test_faults.fail[where] = rank == 1
    begin = time.monotonic()
    errors = []
    for step in range(3, 6):
        if (error := raised(train, ddp, optimizer, rank, [step])) is not None:
            errors.append(error)
            assert not waits(ddp), "one error is enough"
    assert time.monotonic() - begin < 6, f"{time.monotonic() - begin} s"
    assert all(type(error) is RuntimeError for error in errors) and len({str(error) for error in errors}) == 1, errors
    raised(handle.flush)
    assert not waits(ddp) and all(torch.isfinite(p).all() for p in ddp.parameters()), "the model can be read"
    return str(errors[0])


@pytest.mark.parametrize("where", ["encode", "decode_sum"])
@pytest.mark.parametrize("schedule, spec", [("with_optimizer", "failing_gather"), ("priority", "failing_two_shot"), ("decoupled", "failing_two_shot")])
def test_a_failure_is_raised_by_all_ranks_where_they_next_look(schedule, spec, where):
    texts = run(2, _fail, schedule=schedule, where=where, spec=spec)
    assert texts[0] == texts[1] and "rank 1 failed" in texts[0] and "OSError: the dog ate it" in texts[0], texts


def _die(rank: int, world: int, schedule: str, sign: int) -> float:
    """In the middle of an exchange, before the others look at it."""
    slow(0.05)
    ddp, handle, optimizer = model(schedule, "int8")
    train(ddp, optimizer, rank, range(3))
    if rank == 2:
        handle.flush()
        wait = commopt.collectives.run.Clock.wait
        commopt.collectives.run.Clock.wait = lambda *args: (os.kill(os.getpid(), sign), wait(*args))[1]
    begin = time.monotonic()
    errors = [raised(train, ddp, optimizer, rank, [3]), raised(lambda: [p.sum() for p in ddp.parameters()]), raised(train, ddp, optimizer, rank, [4]), raised(handle.flush)]
    took = time.monotonic() - begin
    errors = [error for error in errors if error is not None]
    assert errors and all(type(error) is RuntimeError and "among ranks [0, 1, 2]" in str(error) for error in errors), errors
    assert all(torch.isfinite(p).all() for p in ddp.parameters()) and not waits(ddp)
    return took


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rank_that_dies_is_reported_by_all_others(schedule):
    for took in run(3, _die, lost=(2,), schedule=schedule, sign=signal.SIGKILL):
        assert took < 6, took


def test_a_rank_that_hangs_is_reported_after_the_timeout():
    for took in run(3, _die, lost=(2,), schedule="decoupled", sign=signal.SIGSTOP, timeout=3):
        assert 2 < took < 10, took


# --- the end of the process ---


def train_and_exit(rank: int, world: int, port: int, how: str) -> None:
    """A script that ends right behind a step whose exchange is under way."""
    torch.set_num_threads(1)
    start(rank, world, port, timeout=20)
    for schedule in SCHEDULES if how == "left" else SCHEDULES[-2:]:
        ddp, handle, optimizer = model(schedule)
        train(ddp, optimizer, rank, range(3))
    slow(0.05)
    train(ddp, optimizer, rank, [3])
    assert waits(ddp)
    if how == "one looks" and rank == 0:
        print("sum", float(sum(p.double().sum() for p in ddp.parameters())), flush=True)
        assert all(torch.isfinite(p).all() for p in ddp.parameters())
    if "destroyed" in how:
        dist.destroy_process_group()
    if how == "destroyed, then looks":
        assert all(torch.isfinite(p).all() for p in ddp.parameters())
    if how == "status":
        sys.exit(7)
    if how == "exception":
        raise KeyError("of the training loop")
    if how == "deleted":
        del ddp, handle, optimizer
    print("trained", flush=True)


ENDS = {"destroyed": 0, "destroyed, then looks": 0, "one looks": 0, "left": 0, "deleted": 0, "status": 7, "exception": 1}


def test_a_process_ends_with_its_own_exit_code_and_soon():
    for ended in endings("test_schedulers_faults", list(ENDS)):
        for how, (code, seconds, said) in ended.items():
            assert code == ENDS[how] and seconds < 12, f"{how}: exit code {code} after {seconds} s\n{said}"
            assert "terminate called" not in said and "Fatal Python error" not in said and "failed" not in said, f"{how}: {said}"


# --- what is held ---


@pytest.mark.parametrize("schedule", ["with_optimizer", "decoupled"])
@each_rank(2, seconds=100)
def test_five_hundred_steps_leak_nothing(rank, world, schedule):
    ddp, handle, optimizer = model(schedule, "int8")
    marks = []
    for step in range(600):
        train(ddp, optimizer, rank, [step % 7])
        if step in (150, 599):
            handle.stats(), handle.flush(), gc.collect()
            marks.append((test_faults._held(), len(gc.get_objects()), test_faults._status("VmRSS"), test_faults._status("Threads")))
    (held, objects, rss, threads), (held_now, objects_now, rss_now, threads_now) = marks
    assert held_now == held, f"tensors grew by {held_now - held} bytes"
    assert objects_now - objects < 200, f"{objects_now - objects} more objects"
    assert rss_now - rss < 768 * 1024, f"resident memory grew by {rss_now - rss} bytes in 450 steps"
    assert threads_now == threads and len(handle._planner and handle._planner._uses or ()) < 50


@each_rank(2)
def test_handles_come_and_go_while_exchanges_are_under_way(rank, world):
    for schedule in (*SCHEDULES, *SCHEDULES, *SCHEDULES):
        ddp, handle, optimizer = model(schedule)
        train(ddp, optimizer, rank, range(2))
        gone = [weakref.ref(handle), weakref.ref(handle._deferral), weakref.ref(ddp.module.w[0])]
        del ddp, handle, optimizer
        assert gone_soon(*gone), f"{schedule}: {[type(r) for g in gone if g() is not None for r in gc.get_referrers(g())]}"
    deadline = time.monotonic() + 5
    while (left := [t.name for t in threading.enumerate() if t.name.startswith("commopt")]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, left
    nn.Linear(1, 1)(torch.ones(1))  # a hook whose model has gone goes when it is called
    assert not nn.modules.module._global_forward_pre_hooks and len(_global_optimizer_pre_hooks) <= 1
