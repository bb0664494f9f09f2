"""Calls that all ranks should make, made by some of them: an error that says who was where, and no wait for a timeout."""

import logging
import os
import random
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
from commopt.collectives.link import hang_up
from commopt.hooks import whereabouts
from commopt.hooks.whereabouts import Whereabouts
from ranks import Given, each_rank, raised, run, same_everywhere

SHAPES = [(64, 33), (7,), (50, 50), (40, 40)]


def train(ddp: DDP, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    """In two passes, as schedule=delayed wants it."""
    for step in steps:
        optimizer.zero_grad()
        with ddp.no_sync():
            ddp(ddp.module.random(rank, step)).backward()
        ddp(ddp.module.random(rank, step)).backward()
        optimizer.step()


def attached(rank: int, schedule: str = "pipelined", steps: int = 4):
    ddp = DDP(Given(*SHAPES), bucket_cap_mb=0.01)
    handle, optimizer = commopt.attach(ddp, "int8", start_step=0, schedule=schedule), torch.optim.SGD(ddp.parameters(), lr=0.1)
    train(ddp, optimizer, rank, range(steps))
    return ddp, handle, optimizer


def everyones(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# --- calls of one rank ---

CALLS = {
    "set": (lambda handle: handle.set("int4"), "step 4 with int4"),
    "pause": (lambda handle: handle.pause(), "step 4 with exact averages"),
    "detach": (lambda handle: handle.detach(), "step 4 with exact averages"),
    "load_state_dict": (lambda handle: handle.load_state_dict({"version": 1, "step": 50, "residual": {}}), "step 51 with int8, after load_state_dict"),
    "load_state_dict of the same step": (lambda handle: handle.load_state_dict({"version": 1, "step": 3, "residual": {}}), "step 4 with int8, after load_state_dict"),
    "state_dict": (lambda handle: handle.state_dict(), "state_dict after step 3"),
    "flush": (lambda handle: handle.flush(), ""),
}


@pytest.mark.parametrize("schedule", ["pipelined", "decoupled", "delayed", "delayed:correction=local"])
@each_rank(3)
def test_a_call_of_one_rank_is_an_error_on_all(rank, world, schedule):
    for name, (call, place) in CALLS.items():
        local = schedule == "delayed:correction=local"  # where flush, load_state_dict and detach bring replicas together
        for culprit in (0, 2) if local or place else ():
            ddp, handle, optimizer = attached(rank, schedule)
            begin = time.monotonic()

            def go_on() -> None:
                if rank == culprit:
                    call(handle)
                train(ddp, optimizer, rank, range(4, 8))

            error = raised(go_on)
            assert time.monotonic() - begin < 5, f"{name}: {time.monotonic() - begin} s"
            texts = everyones(str(error))
            assert len(set(texts)) == 1 and type(error) is RuntimeError, f"{name} on rank {culprit}: {texts}"
            assert f"\n  rank {culprit}: {'' if local else place + chr(10)}" in texts[0], texts[0]
            ahead = re.search(r"\n  rank (\S+): step 4 with int8\n", texts[0])  # of the others, the last may not be there yet
            assert ahead and str(culprit) not in ahead[1] and "between the same two steps" in texts[0], texts[0]


@each_rank(2)
def test_a_checkpoint_of_ranks_at_different_steps(rank, world):
    ddp, handle, optimizer = attached(rank)

    def go_on() -> None:
        train(ddp, optimizer, rank, range(4, 4 + rank))
        handle.state_dict()

    error = raised(go_on)
    assert "rank 0: state_dict after step 3" in str(error) and "rank 1: step 4 with int8" in str(error), error


@each_rank(3)
def test_calls_of_all_ranks_at_different_times(rank, world):
    """Slow ranks are waited for."""
    ddp, handle, optimizer = attached(rank)
    for step, call in enumerate([lambda: handle.set("int4"), handle.pause, handle.resume, handle.state_dict, lambda: handle.load_state_dict(handle.state_dict())]):
        time.sleep(0.3 * ((rank + step) % world))
        call()
        train(ddp, optimizer, rank, range(2 * step, 2 * step + 2))
        same_everywhere(ddp.parameters())
    assert handle.step == 13


def _leave_or_die(rank: int, world: int, die: bool) -> tuple[str, float]:
    ddp, handle, optimizer = attached(rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL if die else signal.SIGSTOP)
    begin = time.monotonic()
    return str(raised(handle.state_dict)), time.monotonic() - begin


@pytest.mark.parametrize("die", [True, False])
def test_a_rank_that_cannot_come(die):
    """Dead, or stopped: then after the timeout. The error tells where it was last."""
    for text, took in run(3, _leave_or_die, lost=(1,), timeout=3, die=die):
        assert took < 2 if die else 2 < took < 8, took
        assert "to come to: state_dict after step 3" in text and "rank 1: step 3 with int8" in text, text


@each_rank(2)
def test_who_waits_for_long_says_so(rank, world):
    ddp, handle, optimizer = attached(rank)
    whereabouts._LONG, said = 0.5, []
    whereabouts.log.addHandler(type("Kept", (logging.Handler,), {"emit": lambda self, record: said.append(record.getMessage())})())
    time.sleep(1.5 * rank)
    handle.state_dict()
    assert len(said) == (rank == 0), said
    assert rank or "rank 0: state_dict after step 3" in said[0] and "rank 1: step 3 with int8" in said[0], said


# --- places ---


@each_rank(4)
def test_ranks_that_go_the_same_way_meet(rank, world):
    """A thousand places in a random order of kinds, each rank late at some of them."""
    where, kinds, late = Whereabouts(dist.distributed_c10d._get_default_store(), dist.group.WORLD), random.Random(0), random.Random(rank)
    met = 0
    for place in range(1000):
        if late.random() < 0.02:
            time.sleep(0.01 * late.random())
        if kinds.random() < 0.3:
            where.meet(f"meeting {kinds.randrange(2)}")
            met += 1
        else:
            where.pass_by(f"step {kinds.randrange(2)}")
    where.meet("the end")
    dist.barrier()
    while where.of_all() != "  rank 0,1,2,3: the end":  # what is told needs no answer, and may be under way
        time.sleep(0.01)
    assert 250 < met < 350


@each_rank(2)
def test_a_rank_that_is_far_ahead(rank, world):
    """With late gradients, nothing holds it up at once."""
    group = dist.new_group([0, 1])
    where = Whereabouts(dist.PrefixStore("one", dist.distributed_c10d._get_default_store()), group)
    where.meet("begin")
    for step in range(3 * rank):
        where.pass_by(f"step {step}")
    if rank == 0:
        while "step 2" not in where.of_all():
            time.sleep(0.01)
        assert "rank 1: step 2" in str(raised(where.meet, "step 0")), "not seen"
        hang_up(group)
    dist.barrier()


@each_rank(3)
def test_ranks_that_meet_elsewhere(rank, world):
    """Two meet at one place, one at another; none passes by a meeting of others, either."""
    where = Whereabouts(dist.PrefixStore("one", dist.distributed_c10d._get_default_store()), dist.new_group([0, 1, 2]))
    where.pass_by("here")
    if rank == 2:
        error = raised(where.meet, "there")
        assert re.search("rank 0(,1)?: where", str(error)) or isinstance(error, ConnectionError), error
    else:
        error = raised(where.meet, "where")
        assert "rank 2: there" in str(error) or isinstance(error, ConnectionError), error
    hang_up(where._group)
    assert any("different ways" in text for text in everyones(str(error)))
