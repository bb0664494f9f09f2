"""What a checkpoint holds, and training that goes on from one."""

import io

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
from ranks import Given, Mixed, close, conserved, each_rank, loss_of, raised, run, same, same_everywhere

SHAPES = [(64, 33), (7,), (1031, 3), (40, 50)]


def through_a_file(state: dict) -> dict:
    """As torch.load gives it by default: plain tensors only."""
    file = io.BytesIO()
    torch.save({"commopt": state}, file)
    file.seek(0)
    return torch.load(file)["commopt"]


def train(ddp, handle, rank, steps):
    for step in steps:
        ddp.zero_grad()
        loss_of(ddp, rank, step).backward()
        with torch.no_grad():
            for p in ddp.parameters():
                if p.grad is not None:
                    p -= 0.2 * p.grad
    return [p.detach().clone() for p in ddp.parameters()]


def model(spec, state=None, parameters=None, **options):
    torch.manual_seed(3)
    net = Mixed()
    if parameters is not None:
        with torch.no_grad():
            for p, value in zip(net.parameters(), parameters):
                p.copy_(value)
    ddp = DDP(net, bucket_cap_mb=0.01, **options)
    handle = commopt.attach(ddp, spec)
    if state is not None:
        handle.load_state_dict(through_a_file(state))
    return ddp, handle


# bf16 rounds each value for itself, so its bits do not depend on buckets; with find_unused_parameters they are never rebuilt
@pytest.mark.parametrize("spec, options", [
    ("bf16", {}), ("none", {"find_unused_parameters": True}), ("int8", {"find_unused_parameters": True}), ("int8:rounding=stochastic", {"find_unused_parameters": True})], ids=str)
@each_rank(2, 3)
def test_without_residuals_a_resumed_run_is_the_uninterrupted_one(rank, world, spec, options):
    ddp, handle = model(spec, **options)
    half = train(ddp, handle, rank, range(4))
    state = handle.state_dict()
    want = train(ddp, handle, rank, range(4, 8))
    again, resumed = model(spec, state, half, **options)
    got = train(again, resumed, rank, range(4, 8))
    for p, q in zip(got, want):
        same(p, q, spec)
    assert resumed.step == handle.step == 7


@pytest.mark.parametrize("spec", ["int4", "topk:ratio=0.05", "int8:ef=true"])
@each_rank(2)
def test_a_resumed_run_loses_nothing(rank, world, spec):
    """The mean residual is what was saved, before and after buckets are rebuilt; parameters end where the uninterrupted
    run's do but for residuals in another place: what both have sent differs by no more than what both have kept."""
    ddp = DDP(Given(*SHAPES), bucket_cap_mb=0.01)
    handle = commopt.attach(ddp, spec)

    def steps(ddp, numbers, kept=None):
        sums = [torch.zeros(p.shape, dtype=torch.float64) for p in ddp.parameters()]
        for step in numbers:
            ddp.zero_grad()
            ddp(ddp.module.random(rank, step)).backward()
            means = [sum(ddp.module.random(r, step)[i].double() for r in range(world)) / world for i in range(len(SHAPES))]
            if kept is not None:
                kept = conserved(resumed, list(ddp.module.named_parameters()), means, kept, f"step {step}")
            for s, p in zip(sums, ddp.parameters()):
                s += p.grad
        return sums

    steps(ddp, range(5))
    state = handle.state_dict()
    assert state["residual"]["w.0"].any()
    again = DDP(Given(*SHAPES), bucket_cap_mb=0.01)
    resumed = commopt.attach(again, spec)
    resumed.load_state_dict(through_a_file(state))
    for name, value in resumed.state_dict()["residual"].items():
        same(value, state["residual"][name], name)
    want, got = steps(ddp, range(5, 10)), steps(again, range(5, 10), state["residual"])
    ends = [h.state_dict()["residual"] for h in (handle, resumed)]
    for i, (a, b) in enumerate(zip(want, got)):
        kept = [e[f"w.{i}"].double().view(a.shape) for e in ends]
        close(a + kept[0], b + kept[1], 5e-6, f"w.{i}")


def _save(rank, world, spec):
    ddp = DDP(Given(*SHAPES), bucket_cap_mb=0.01)
    handle = commopt.attach(ddp, spec, start_step=0)
    for step in range(3):
        ddp.zero_grad()
        ddp(ddp.module.random(rank, step)).backward()
    state = handle.state_dict()
    local = {n: v.clone() for n, v in handle._residuals.views.items()}
    assert any(not torch.equal(local[n], state["residual"][n]) for n in local), "the mean, not this rank's own"
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _load(rank, world, spec, file):
    state = torch.load(io.BytesIO(file))
    ddp = DDP(Given(*SHAPES), bucket_cap_mb=0.01)
    handle = commopt.attach(ddp, spec)
    handle.load_state_dict(state)
    for name, value in handle.state_dict()["residual"].items():
        close(value, state["residual"][name], 1e-6 * float(state["residual"][name].abs().max()), name)
    kept = state["residual"]
    for step in range(3, 6):
        ddp.zero_grad()
        ddp(ddp.module.random(rank, step)).backward()
        means = [sum(ddp.module.random(r, step)[i].double() for r in range(world)) / world for i in range(len(SHAPES))]
        kept = conserved(handle, list(ddp.module.named_parameters()), means, kept, f"step {step}")
        same_everywhere([p.grad for p in ddp.parameters()])


@pytest.mark.parametrize("before, after", [(4, 2), (2, 3)])
def test_another_world_size_and_another_spec_lose_nothing(before, after):
    """The file of rank 0, loaded by every rank of a group of another size, which compresses with something else."""
    file = run(before, _save, spec="int4")[0]
    run(after, _load, spec="topk:ratio=0.05", file=file)
    run(after, _load, spec="int4", file=file)


@each_rank(2)
def test_the_state_is_plain_tensors_and_the_same_on_all_ranks(rank, world):
    ddp = DDP(Given(*SHAPES))
    handle = commopt.attach(ddp, "int4", start_step=0)
    ddp(ddp.module.random(rank, 0)).backward()
    state = handle.state_dict()
    assert set(state) == {"version", "spec", "step", "residual"} and (state["version"], state["spec"], state["step"]) == (1, "int4", 0)
    for name, value in state["residual"].items():
        assert type(value) is torch.Tensor and value.dtype == torch.float32 and value.device.type == "cpu"
        assert value.untyped_storage().nbytes() == 4 * value.numel(), "a view would save the whole bucket"
        mean = handle._residuals.views[name].clone() / world
        torch.distributed.all_reduce(mean)
        close(value, mean, 1e-7)
    same_everywhere([state["residual"][n] for n in sorted(state["residual"])])


@each_rank(2)
def test_a_bad_state_is_refused_and_changes_nothing(rank, world):
    ddp = DDP(Given(*SHAPES))
    handle = commopt.attach(ddp, "int4", start_step=0)
    for step in range(2):
        ddp(ddp.module.random(rank, step)).backward()
    good = handle.state_dict()
    before = {n: v.clone() for n, v in handle._residuals.views.items()}
    zero = torch.zeros(64, 33)
    bad = {
        "nothing": {}, "version": good | {"version": 2}, "size": good | {"residual": {"w.0": torch.zeros(5)}},
        "name": good | {"residual": {"w.0": zero, "v": zero}}, "no residual": {k: good[k] for k in ("version", "spec", "step")},
        "no step": {k: good[k] for k in ("version", "spec", "residual")}, "no tensor": good | {"residual": {"w.0": [0.0] * 2112}},
        "a model's": ddp.state_dict(), "none": None,
    }
    for what, state in bad.items():
        error = raised(handle.load_state_dict, state)
        assert isinstance(error, ValueError) and "state" in str(error), f"{what}: {error!r}"
        assert handle.step == 1
        for name, value in before.items():
            same(handle._residuals.views[name], value, what)
    handle.load_state_dict(good)
    for name, value in handle.state_dict()["residual"].items():
        same(value, good["residual"][name], name)
