"""What must be survived, or end in the same clear error on every rank: overflows, ranks that differ, fail, die or hang."""

import os
import pathlib
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
from commopt.collectives.merge import WORTH
from commopt.hooks.alarm import Alarm
from ranks import Given, close, conserved, each_rank, endings, raised, run, same, same_everywhere, start

SHAPES = [(64, 33), (7,), (50, 50), (40, 40)]


def given_step(ddp, rank, step, scaler=None, bad=None):
    """One backward, with bad in one value of the gradient."""
    ddp.zero_grad()
    gradients = ddp.module.random(rank, step)
    if bad is not None:
        gradients[0][3, 5] = bad
    loss = ddp(gradients)
    (loss if scaler is None else scaler.scale(loss.float())).backward()


def residuals(handle) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in handle._residuals.views.items()}


# --- overflows and the loss scale ---

EF = ["topk:ratio=0.05", "topk:ratio=0.05,values=int8", "int4", "int8:ef=true", "bf16:ef=true", "fp16:ef=true"]


@pytest.mark.parametrize("spec", [*EF, "int8", "none", "bf16"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@each_rank(2)
def test_an_overflow_on_one_rank_is_skipped_by_all_and_forgotten(rank, world, spec, bad):
    """A run with a bad step in the middle equals one without it, bit for bit: a power of two changes no rounding."""
    runs = []
    for steps in ([0, 1, "bad", 2, 3], [0, 1, 2, 3]):
        # topk divides its bytes among buckets anew at certain steps, which the bad step counts towards: one bucket there
        ddp = DDP(Given(*SHAPES), bucket_cap_mb=25 if spec.startswith("topk") else 0.01)
        handle = commopt.attach(ddp, spec, start_step=0)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for step in steps:
            parameters, kept, scale = [p.detach().clone() for p in ddp.parameters()], residuals(handle), scaler.get_scale()
            given_step(ddp, rank, 9 if step == "bad" else step, scaler, bad if step == "bad" and rank == 1 else None)
            if step == "bad":
                assert not torch.isfinite(ddp.module.w[0].grad).all(), "hidden from the scaler"
            scaler.step(optimizer)
            scaler.update()
            same_everywhere(ddp.parameters(), f"step {step}")
            if step == "bad":
                assert scaler.get_scale() == scale / 2, "not seen"
                for p, before in zip(ddp.parameters(), parameters):
                    same(p.detach(), before, "a step was taken")
        runs.append(([p.detach() for p in ddp.parameters()], residuals(handle)))
        assert handle.stats()["nonfinite_steps"] == len(steps) - 4
    (parameters, kept), (want_parameters, want_kept) = runs
    for got, want in zip(parameters, want_parameters):
        same(got, want, "parameter")
    for name in want_kept:
        same(kept[name], want_kept[name], f"residual of {name}")


@pytest.mark.parametrize("spec", EF)
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
@each_rank(2)
def test_without_a_scaler_an_overflow_leaves_residuals_finite(rank, world, spec, bad):
    ddp = DDP(Given(*SHAPES), bucket_cap_mb=0.01)
    handle = commopt.attach(ddp, spec, start_step=0)
    for step in range(5):
        given_step(ddp, rank, step, bad=bad if step == 2 and rank == 0 else None)
        if step == 2:
            assert not torch.isfinite(ddp.module.w[0].grad).all()
        else:
            assert all(torch.isfinite(p.grad).all() for p in ddp.parameters()), f"step {step}"
        assert all(torch.isfinite(r).all() for r in residuals(handle).values()), f"step {step}"
        same_everywhere([p.grad.nan_to_num(0, 1, -1) for p in ddp.parameters()])
    assert handle.stats()["nonfinite_steps"] == 1


@pytest.mark.parametrize("spec", ["topk:ratio=0.05", "int4"])
@each_rank(2)
def test_the_residual_is_in_unscaled_units(rank, world, spec):
    """Loss scale 65536 -> 4096 -> 65536: sent plus kept is what there was, in unscaled units."""
    ddp = DDP(Given(*SHAPES))
    handle = commopt.attach(ddp, spec, start_step=0)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    kept = {}
    for step in range(6):
        given_step(ddp, rank, step, scaler)
        scaler.unscale_(optimizer)
        means = [sum(ddp.module.random(r, step)[i].double() for r in range(world)) / world for i in range(len(SHAPES))]
        kept = conserved(handle, list(ddp.module.named_parameters()), means, kept, f"step {step}")
        scaler.step(optimizer)
        scaler.update({1: 4096.0, 3: 65536.0}.get(step))


# --- ranks that differ ---

DIFFERENT = {
    "spec": lambda rank: dict(spec=["int8", "int8:block=128"][rank]),
    "rules": lambda rank: dict(rules=[None, {"w.0": "none"}][rank]),
    "seed": lambda rank: dict(seed=rank),
    "start_step": lambda rank: dict(start_step=rank),
    "commopt": lambda rank: dict(version=f"0.1.{rank}"),
    "parameters": lambda rank: dict(shapes=[SHAPES, [(64, 33), (7,), (33, 64), (40, 40)]][rank]),
    "parameters ": lambda rank: dict(shapes=[SHAPES, SHAPES[:3]][rank]),
    "parameters  ": lambda rank: dict(dtype=[torch.float32, torch.bfloat16][rank]),
}


def _attach(rank: int, spec="int8", version=None, shapes=SHAPES, dtype=torch.float32, door="attach", **options) -> str:
    if version:
        commopt.hooks.state.__version__ = version
    # DDP itself would notice other shapes, so the ranks' models are wrapped each for itself.
    alone = [dist.new_group([r]) for r in range(2)][rank]
    ddp = DDP(Given(*shapes, dtype=dtype), process_group=alone)
    begin = time.monotonic()
    error = raised(lambda: commopt.attach(ddp, spec, group=dist.group.WORLD, **options))
    assert isinstance(error, RuntimeError), error
    assert time.monotonic() - begin < 10
    return str(error)


def _differ(rank: int, world: int, what: str) -> str:
    return _attach(rank, **DIFFERENT[what](rank))


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_differ_get_the_same_error(what):
    texts = run(2, _differ, what=what)
    assert texts[0] == texts[1]
    assert "do not agree" in texts[0] and f"\n  {what.strip()}: rank 0: " in texts[0] and "rank 1: " in texts[0], texts[0]


@each_rank(2)
def test_ranks_whose_handles_are_changed_differently_get_the_same_error(rank, world):
    ddp = DDP(Given(*SHAPES))
    handle = commopt.attach(ddp, "int8", start_step=0)
    given_step(ddp, rank, 0)
    handle.set(["int4", "topk"][rank])
    begin = time.monotonic()
    error = raised(given_step, ddp, rank, 1)
    assert isinstance(error, RuntimeError) and "have gone different ways" in str(error) and time.monotonic() - begin < 10, error
    texts = [None] * world
    dist.all_gather_object(texts, str(error))
    assert texts[0] == texts[1]


# --- ranks that fail ---

fail = {"encode": False, "decode_sum": False}  # what raises now, or ends the process, in this one


def _fault(where: str) -> None:
    if fail[where] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fail[where]:
        raise OSError("the dog ate it")


def machines(rank: int, of: int = 2) -> None:
    """Ranks as torchrun numbers them on machines of so many."""
    os.environ |= {"LOCAL_RANK": str(rank % of), "LOCAL_WORLD_SIZE": str(of)}


class _Failing(commopt.Compressor):
    def fields(self, n):
        return [("values", torch.bfloat16, n)]

    def encode(self, kernels, x, residual, values):
        _fault("encode")
        kernels.dense_encode(x, residual, kernels.loss_scale, values)

    def decode_sum(self, kernels, out, weight, values):
        _fault("decode_sum")
        kernels.dense_decode_sum(out, weight, values)


def trained(rank: int, spec: str) -> DDP:
    """A model of several buckets after three steps."""
    machines(rank)
    ddp = DDP(Given(*SHAPES), bucket_cap_mb=0.01)
    commopt.attach(ddp, spec, start_step=0)
    for step in range(3):
        given_step(ddp, rank, step)
    return ddp


@commopt.register("failing_gather")
class FailingGather(_Failing):
    collective = "gather"


@commopt.register("failing_two_shot")
class FailingTwoShot(_Failing):
    collective = "two_shot"


def _fail_in(rank: int, world: int, spec: str, where: str, culprit: int) -> list[str]:
    ddp = trained(rank, spec)
    fail[where] = rank == culprit
    begin = time.monotonic()
    errors = []
    for step in range(3, 6):  # a loop that catches and goes on gets the error again and never a gradient of its own
        errors.append(raised(given_step, ddp, rank, step))
        if errors[-1] is not None and rank == culprit and where == "decode_sum":
            break
        if len([e for e in errors if e]) == 2:
            break
    assert time.monotonic() - begin < 4, f"{time.monotonic() - begin} s"
    errors = [e for e in errors if e is not None]
    assert all(type(e) is RuntimeError for e in errors), errors
    return [str(e) for e in errors]


@pytest.mark.parametrize("spec, world", [("failing_gather", 3), ("failing_two_shot", 3), ("intra=none,inter=failing_two_shot", 4), ("intra=failing_two_shot,inter=int4", 4)])
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_rank_that_fails_to_encode_makes_all_raise(spec, world, culprit):
    texts = run(world, _fail_in, spec=spec, where="encode", culprit=culprit)
    assert all(len(t) == 2 and t[0] == t[1] == texts[0][0] for t in texts), texts
    assert f"rank {culprit} failed" in texts[0][0] and "OSError: the dog ate it" in texts[0][0], texts


@pytest.mark.parametrize("spec", ["failing_gather", "failing_two_shot"])
def test_a_rank_that_fails_to_decode_makes_all_raise_within_a_step(spec):
    texts = run(3, _fail_in, spec=spec, where="decode_sum", culprit=1)
    assert all(t and t[0] == texts[0][0] for t in texts), texts
    assert "rank 1 failed" in texts[0][0] and "OSError: the dog ate it" in texts[0][0], texts


@each_rank(2)
def test_messages_that_look_like_the_mark_of_a_failure(rank, world):
    """Constant gradients: a row of nothing but 0xff codes is a message like any other."""
    for value, spec in [(1.0, "int4"), (-1.0, "int8"), (1.0, "int8")]:
        ddp = DDP(Given((64, 64)))
        commopt.attach(ddp, spec, start_step=0)
        gradient = torch.full((64, 64), value)
        if spec == "int8":
            gradient[:, 60:] = 127.0  # so that the others' code is 1 or -1
        for step in range(2):
            ddp.zero_grad()
            ddp([gradient]).backward()
            close(ddp.module.w[0].grad, gradient, 1e-4 * float(gradient.abs().max()))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True))
        return x.square().sum()


@each_rank(2)
def test_a_failure_under_reentrant_checkpoints_is_raised_in_the_same_step(rank, world):
    """The backward of a checkpoint is one of its own, which ends before the rest of the step."""
    ddp = DDP(Checkpointed(), bucket_cap_mb=0.005)
    commopt.attach(ddp, "failing_gather", start_step=0)
    step = lambda: ddp(torch.randn(5, 40).requires_grad_()).backward()
    step(), step()
    bucket = {"count": 0}
    encode = FailingGather.encode

    def encode_the_last_badly(self, *args):
        bucket["count"] += 1
        fail["encode"] = rank == 0 and bucket["count"] == 4
        encode(self, *args)

    FailingGather.encode = encode_the_last_badly
    error = raised(step)
    assert error is not None and "the dog ate it" in str(error), f"{error!r} after {bucket['count']} buckets"


@each_rank(2)
def test_a_result_is_always_valid(rank, world):
    """Whatever the compressor wrote, the reducer gets the bucket itself."""
    from commopt.hooks.state import State

    ddp = DDP(Given(*SHAPES))
    seen = []
    exchange = State.exchange

    def watched(self, x, parameters, last):
        future = exchange(self, x, parameters, last)
        seen.append((x, future))
        return future

    State.exchange = watched
    commopt.attach(ddp, "int4", start_step=0)
    for step in range(3):
        given_step(ddp, rank, step)
    for x, future in seen:
        value = future.value()
        assert value.data_ptr() == x.data_ptr() and value.shape == x.shape and value.dtype == x.dtype and value.is_contiguous()


# --- ranks that die or hang ---


def _lose(rank: int, world: int, sign: int, spec: str) -> tuple[str, float]:
    ddp = trained(rank, spec)
    if rank == world - 1:
        os.kill(os.getpid(), sign)
    begin = time.monotonic()
    error = raised(given_step, ddp, rank, 3)
    took = time.monotonic() - begin
    assert type(error) is RuntimeError, error
    again = raised(given_step, ddp, rank, 4)
    assert str(again) == str(error), "the second backward must raise too, not return this rank's own gradient"
    return str(error), took


def _die_in(rank: int, world: int, spec: str, where: str) -> tuple[str, float]:
    ddp = trained(rank, spec)
    fail[where] = "die" if rank == 1 else False
    begin = time.monotonic()
    error = raised(given_step, ddp, rank, 3) or raised(given_step, ddp, rank, 4)  # whom its last row had reached ends that step
    assert type(error) is RuntimeError, error
    return str(error), time.monotonic() - begin


@pytest.mark.parametrize("spec, world", [("failing_two_shot", 3), ("intra=failing_two_shot,inter=int4", 4), ("intra=none,inter=failing_two_shot", 4)])
@pytest.mark.parametrize("where", ["encode", "decode_sum"])
def test_a_rank_that_dies_in_the_middle_of_an_exchange_is_reported_by_all_others(spec, world, where):
    """While it encodes its share, or after its rows have been sent and before it sends the sum."""
    for text, took in run(world, _die_in, lost=(1,), spec=spec, where=where):
        assert took < 5 and "among ranks" in text, (took, text)


LOST = [("int8", 3), ("topk:ratio=0.05", 3), ("int8:collective=integer_sum", 3), ("powersgd:rank=2", 3), ("intra=none,inter=int4", 4)]


@pytest.mark.parametrize("spec, world", [*LOST, ("none", 3)])
def test_a_rank_that_dies_is_reported_by_all_others(spec, world):
    for text, took in run(world, _lose, lost=(world - 1,), sign=signal.SIGKILL, spec=spec):
        assert took < 5 and "bucket" in text and f"among ranks {list(range(world))}" in text, text


def _lose_where_posts_take_long(rank: int, world: int, spec: str) -> tuple[str, float]:
    post = Alarm.post
    Alarm.post = lambda *args: (time.sleep(0.3), post(*args))
    return _lose(rank, world, signal.SIGKILL, spec)


def test_a_failure_is_posted_before_a_row_shows_it():
    """Rank 0 has nothing to do with rank 3 but by rank 1."""
    for text, took in run(4, _lose_where_posts_take_long, lost=(3,), spec="intra=none,inter=int4"):
        assert took < 5 and "among ranks [0, 1, 2, 3]" in text, (took, text)


@pytest.mark.parametrize("spec, world", LOST)
def test_a_rank_that_hangs_is_reported_after_the_timeout(spec, world):
    for text, took in run(world, _lose, lost=(world - 1,), sign=signal.SIGSTOP, spec=spec, timeout=3):
        assert 2 < took < 10 and "bucket" in text and f"among ranks {list(range(world))}" in text, (took, text)
        assert f"  rank {world - 1}: step 2 with " in text, f"not told that it had not begun step 3: {text}"


# --- the end of the process ---


def train_and_exit(rank: int, world: int, port: int, how: str) -> None:
    """A script: trains, then ends in one of several ways."""
    torch.set_num_threads(1)
    start(rank, world, port)
    ddp = DDP(Given(*SHAPES), bucket_cap_mb=0.01)
    commopt.attach(ddp, "int4", start_step=0)
    for step in range(5):
        given_step(ddp, rank, step)
        if how == "exception" and step == 3:
            raise KeyError("of the training loop")
        if how == "status" and step == 3:
            sys.exit(7)
        if how == "terminated" and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    if how == "destroyed first":
        dist.destroy_process_group()
        del ddp
    elif how == "destroyed":
        dist.destroy_process_group()
    print("trained", flush=True)


ENDS = {"destroyed": 0, "destroyed first": 0, "left": 0, "exception": 1, "status": 7, "terminated": -signal.SIGTERM}


def test_a_process_ends_with_its_own_exit_code():
    """With the groups destroyed or not, an exception, sys.exit, SIGTERM."""
    for ended in endings("test_faults", list(ENDS)):
        for how, (code, _, said) in ended.items():
            assert code == ENDS[how], f"{how}: exit code {code}\n{said}"
            assert ("trained" in said) == (ENDS[how] == 0), f"{how}: {said}"
            assert "terminate called" not in said and "Fatal Python error" not in said, f"{how}: {said}"
            assert ("KeyError: 'of the training loop'" in said) == (how == "exception"), f"{how}: {said}"


# --- memory and threads ---


def _held() -> int:
    """Bytes of all tensors' storages in this process."""
    import gc

    gc.collect()
    seen = {}
    for o in gc.get_objects():
        if issubclass(type(o), torch.Tensor) and o.layout == torch.strided:
            seen[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(seen.values())


def _status(key: str) -> int:
    """VmRSS, VmHWM or Threads of this process; bytes or a count."""
    line = next(l for l in pathlib.Path("/proc/self/status").read_text().splitlines() if l.startswith(key + ":"))
    return int(line.split()[1]) * (1024 if line.endswith("kB") else 1)


@pytest.mark.parametrize("spec", ["int8", "int4:rounding=stochastic", "topk:ratio=0.01", "topk:ratio=0.01,values=int8"])
@each_rank(2, seconds=100)
def test_two_thousand_steps_leak_nothing(rank, world, spec):
    ddp = DDP(Given((64, 33), (7,), (50, 50)), bucket_cap_mb=0.01)
    handle = commopt.attach(ddp, spec)
    gradients = ddp.module.random(rank, 0)
    marks = []
    for step in range(2001):
        ddp.zero_grad()
        ddp(gradients).backward()
        if step in (400, 2000):
            handle.stats()
            marks.append((_held(), _status("VmRSS"), _status("Threads")))
    (held, rss, threads), (held_now, rss_now, threads_now) = marks
    assert held_now == held, f"tensors grew by {held_now - held} bytes"
    assert rss_now - rss < 512 * 1024, f"resident memory grew by {rss_now - rss} bytes in 1,600 steps"
    assert threads_now == threads


@pytest.mark.parametrize("spec", ["int8", "int4", "topk:ratio=0.01,warmup=0", "topk:ratio=0.01,values=bf16,warmup=0", "bf16"])
@each_rank(2)
def test_extra_memory_is_one_residual_and_the_messages(rank, world, spec):
    small = DDP(Given((64, 64)))  # so that code is loaded and threads have their stacks
    commopt.attach(small, spec, start_step=0)
    small(small.module.random(rank, 0)).backward(), _held()

    n = 4_000_000
    ddp = DDP(Given((4000, 1000), (1000,)))
    gradients = ddp.module.random(rank, 0)

    def peak() -> int:
        """Of the resident memory, in three steps."""
        for _ in range(2):
            ddp(gradients).backward()
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        for _ in range(3):
            ddp(gradients).backward()
        return _status("VmHWM")

    plain = peak()
    before, buckets, exchange = _held(), set(), commopt.State.exchange

    def watched(self, x, parameters, last):
        buckets.add((x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()))  # DDP's own, which we show to Python
        return exchange(self, x, parameters, last)

    commopt.State.exchange = watched
    handle = commopt.attach(ddp, spec, start_step=0)
    ours = peak()
    message, kept = commopt.wire_bytes(spec, n), 4 * n if handle.spec.ef else 0
    messages = world * message if handle.plan[0]["collective"] == "gather" else 3 * message  # two_shot: W rows of n/W, three times
    extra = _held() - before - sum(nbytes for _, nbytes in buckets)
    assert len(buckets) == 1
    # topk notes where large values are: its workspace, and what it carries from step to step
    scratch = 0.5 * n if handle.spec.name == "topk" else 0
    merged = 2 * messages if messages < WORTH * world else 0  # a small message may travel with others: once more, both ways
    want = kept + 1.02 * messages + merged + scratch + 150_000
    assert extra <= want, f"{extra} bytes, residual {kept}, messages {messages}"
    assert ours - plain < want + 5e6, f"{ours - plain} bytes at the peak of a step, residual {kept}, messages {messages}"


@each_rank(2)
def test_handles_come_and_go(rank, world):
    """A model that is dropped takes its threads, residual and messages with it."""
    import gc

    threads = []
    for i in range(12):
        ddp = DDP(Given(*SHAPES))
        handle = commopt.attach(ddp, "int4", start_step=0)
        given_step(ddp, rank, 0)
        del ddp, handle
        gc.collect()
        threads.append(_status("Threads"))
    commopt_threads = [t for t in __import__("threading").enumerate() if t.name.startswith("commopt")]
    assert len(commopt_threads) <= 2, commopt_threads  # those of the last


def _child(pipe) -> None:
    pipe.send(float(torch.ones(1000).sum()))


@each_rank(2)
def test_a_forked_child_works(rank, world):
    """A data loader's, while our threads run."""
    ddp = DDP(Given(*SHAPES))
    commopt.attach(ddp, "int4", start_step=0)
    given_step(ddp, rank, 0)
    loader = torch.utils.data.DataLoader(torch.arange(20.0), batch_size=5, num_workers=1, multiprocessing_context="fork")
    for step, batch in enumerate(loader):
        assert batch.sum() == sum(range(5 * step, 5 * step + 5))
        given_step(ddp, rank, step)
