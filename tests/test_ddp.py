"""Training with DDP on gloo, 2 to 4 ranks."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
from commopt.collectives.link import Link
from commopt.compressors import overview
from ranks import Given, Mixed, close, conserved, each_rank, loss_of, raised, same, same_everywhere, total

RULES = {"embed*": "int8:ef=true", "*.bias|*norm*|scale": "none", "fc1*": "topk:ratio=0.05"}
SPECS = [
    "none", "fp16", "bf16", "int8", "int8:ef=true", "int8:rounding=stochastic", "int4", "int4:rounding=stochastic",
    "topk:ratio=0.01", "topk:ratio=0.01,values=bf16", "topk:ratio=0.01,values=int8", "topk:ratio=0.01,warmup=4", "topk:ratio=1.0",
    "int8:ef=true,collective=integer_sum", "int4:collective=integer_sum",
]


def train_step(model, optimizer, rank, step):
    optimizer.zero_grad()
    loss_of(model, rank, step).backward()
    optimizer.step()


def mixed(**options) -> DDP:
    torch.manual_seed(3)
    return DDP(Mixed(), bucket_cap_mb=0.01, **options)


@pytest.mark.parametrize("spec, rules", [*((s, None) for s in SPECS), ("int4", RULES)], ids=str)
@each_rank(2, 3, 4)
def test_all_ranks_hold_the_same_bits_and_nothing_is_lost(rank, world, spec, rules):
    """After every step. What was sent plus what is kept is what there was, over all ranks; small tensors are exact."""
    ddp = mixed()
    handle = commopt.attach(ddp, spec, rules=rules)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    named = [(n, p) for n, p in ddp.module.named_parameters() if p.requires_grad]
    for step in range(6):
        local = copy.deepcopy(ddp.module)
        loss_of(local, rank, step).backward()
        had = [p.grad.double() for p in local.parameters() if p.requires_grad]
        kept = dict(handle.state_dict()["residual"])
        train_step(ddp, optimizer, rank, step)
        same_everywhere(ddp.parameters(), f"step {step}")
        now = handle.state_dict()["residual"]
        mean = total(had).div(world).split([p.numel() for _, p in named])
        for (name, p), m in zip(named, mean):
            before, after = (r.get(name, torch.zeros(p.numel())).double() for r in (kept, now))
            if p.dim() <= 1 or p.numel() < 1024:
                close(p.grad.view(-1), m, 3e-7 * m.abs() + 1e-8, f"{name} step {step}")
                assert not after.any(), f"{name} travels exactly but has a residual"
            elif "ef=false" not in spec and (now or spec == "none"):
                bound = 1e-6 * (m.abs().max() + before.abs().max() + 1e-6)
                close(p.grad.view(-1).double() + after, m + before, bound, f"{name} step {step}")
    assert len(handle.plan) > 2, handle.plan


@pytest.mark.parametrize("spec", [
    "fp8", "mxfp8:ef=true", "mxfp4", "nvfp4", "natural", "int2", "ternary", "sign", "int4:rotate=hadamard",
    "topk:ratio=0.05,scope=block,values=fp8", "randomk:ratio=0.1", "powersgd:rank=2", "dct", "vote",
    "topk:ratio=0.05,collective=sparse_two_shot", "topk:ratio=0.05,collective=sparse_two_shot,scope=threshold,values=int8",
    "int2:rounding=stochastic,collective=integer_sum"])
@each_rank(3)
def test_so_they_do_with_every_other_method(rank, world, spec):
    test_all_ranks_hold_the_same_bits_and_nothing_is_lost.body(rank, world, spec, None)


@each_rank(2, 4)
def test_none_is_plain_ddp_bit_for_bit(rank, world):
    plain, ours = mixed(), mixed()
    commopt.attach(ours, "none")
    for step in range(4):
        for model in (plain, ours):
            model.zero_grad()
            loss_of(model, rank, step).backward()
        for (name, p), q in zip(plain.named_parameters(), ours.parameters()):
            if p.requires_grad:
                same(q.grad, p.grad, f"{name} step {step}")
            with torch.no_grad():
                if p.requires_grad:
                    p -= 0.1 * p.grad
                    q -= 0.1 * q.grad


SHAPES = [(64, 33), (7,), (1031, 3), (), (40, 50), (0, 5), (33, 129)]


def given_step(ddp: DDP, rank: int, world: int, step: int, scale: float = 1.0, unused=()) -> list[torch.Tensor]:
    """One backward with gradients of its own for each rank; returns their exact means, float64."""
    ddp.zero_grad()
    everyone = [ddp.module.random(r, step, scale) for r in range(world)]
    mine = [None if i in unused else g for i, g in enumerate(everyone[rank])]
    ddp(mine).backward()
    return [sum(r[i].double() for r in everyone) / world for i in range(len(mine))]


OPTIONS = [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("spec", ["int4", "topk:ratio=0.02", "int8:ef=true,rounding=stochastic"])
@each_rank(2)
def test_the_residual_stays_with_its_parameter_when_buckets_are_rebuilt(rank, world, spec, options):
    ddp = DDP(Given(*SHAPES), bucket_cap_mb=0.01, **options)
    handle = commopt.attach(ddp, spec, start_step=0)
    kept, layouts = {}, []
    for step in range(5):
        means = given_step(ddp, rank, world, step, scale=10.0 ** (step % 3))
        kept = conserved(handle, list(ddp.module.named_parameters()), means, kept, f"step {step}")
        layouts.append(sorted(tuple(p["parameters"]) for p in handle.plan))
        same_everywhere([p.grad for p in ddp.parameters()])
    assert len({tuple(l) for l in layouts}) == (1 if "find_unused_parameters" in options else 2), layouts
    assert all(kept[n].any() for n, p in ddp.module.named_parameters() if p.dim() == 2 and p.numel() > 1023), "no residual at all"


@each_rank(2, 4)
def test_topk_of_everything_is_the_mean(rank, world):
    ddp = DDP(Given(*SHAPES))
    commopt.attach(ddp, "topk:ratio=1.0", start_step=0)
    for step in range(3):
        for p, mean in zip(ddp.parameters(), given_step(ddp, rank, world, step)):
            close(p.grad, mean, 3e-7 * mean.abs() + 3e-7)


# The largest error of one value relative to the largest magnitude of what is encoded, per encoding.
STEP = {"fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 0.5 / 127, "int8:rounding=stochastic": 1 / 127, "int4:ef=false": 0.5 / 7,
        "int8:collective=integer_sum": 0.5 / 127}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", STEP)
@each_rank(3)
def test_the_average_is_within_the_bound_of_the_exact_mean(rank, world, spec, dtype):
    ddp = DDP(Given((96, 131), (50, 60), dtype=dtype))
    handle = commopt.attach(ddp, spec, start_step=0)
    for step in range(3):
        means = given_step(ddp, rank, world, step)
        everyone = [ddp.module.random(r, step) for r in range(world)]
        for i, (p, mean) in enumerate(zip(ddp.parameters(), means)):
            if spec in ("bf16", "fp16"):  # relative to each value
                first = STEP[spec] * sum(r[i].double().abs() for r in everyone) / world
                bound = first + STEP[spec] * (mean.abs() + first) + 1e-9
            else:  # to the largest of a block, here of the tensor
                first = STEP[spec] * sum(r[i].double().abs().max() for r in everyone) / world
                bound = first + STEP[spec] * (mean.abs().max() + first)
            rounding = {torch.float32: 2e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype] * (mean.abs() + bound)
            if handle.plan[0]["collective"] == "sum":  # a message would be no smaller: plain DDP's sum, rounded at each addition
                rounding = rounding.max() * world
            close(p.grad, mean, bound + rounding, f"step {step}")
            if spec not in ("bf16", "fp16") or dtype == torch.float32:  # those would send no less than 16-bit gradients
                assert not torch.equal(p.grad.double(), mean), "nothing was compressed"


@each_rank(2)
def test_no_sync_accumulates_and_leaves_the_residual_alone(rank, world):
    ddp = DDP(Given(*SHAPES))
    handle = commopt.attach(ddp, "int4", start_step=0)
    kept = {}
    for step in range(3):
        ddp.zero_grad()
        micro = [[ddp.module.random(r, 10 * step + k) for k in range(3)] for r in range(world)]
        before = {n: v.clone() for n, v in handle._residuals.views.items()}
        with ddp.no_sync():
            for k in range(2):
                ddp(micro[rank][k]).backward()
        for name, value in before.items():
            same(handle._residuals.views[name], value, name)
        ddp(micro[rank][2]).backward()
        means = [sum(m[k][i].double() for m in micro for k in range(3)) / world for i in range(len(SHAPES))]
        kept = conserved(handle, list(ddp.module.named_parameters()), means, kept, f"step {step}")
    assert handle.stats()["steps"] == 3


@pytest.mark.parametrize("spec", ["topk:ratio=0.05", "int4"])
@each_rank(2)
def test_a_rank_that_joined_early_sends_zeros_and_keeps_its_residual(rank, world, spec):
    ddp = DDP(Given((64, 33), (7,), (50, 50)), bucket_cap_mb=0.01)
    handle = commopt.attach(ddp, spec, start_step=0)
    steps, grads = 3 + 2 * rank, []
    with ddp.join():
        for step in range(steps):
            given_step(ddp, rank, world, step)
            grads.append([p.grad.clone() for p in ddp.parameters()])
            kept = {n: v.clone() for n, v in handle._residuals.views.items()}
    if rank == 0:
        for name, value in kept.items():
            same(handle._residuals.views[name], value, name)
            assert value.any() or name == "w.1"
    else:
        for step in (3, 4):  # half of this rank's gradient, small tensors to the last bit
            same(grads[step][1], ddp.module.random(1, step)[1] / 2, f"step {step}")
            for got, mine in zip(grads[step], ddp.module.random(1, step)):
                assert nn.functional.cosine_similarity(got.flatten(), mine.flatten(), 0) > 0.3


@pytest.mark.parametrize("spec", ["int8", "int4", "topk:ratio=0.05"])
@each_rank(2)
def test_parameters_that_are_not_used_on_some_ranks(rank, world, spec):
    ddp = DDP(Given((64, 33), (7,), (50, 50), (40, 40)), bucket_cap_mb=0.01, find_unused_parameters=True)
    handle = commopt.attach(ddp, spec, start_step=0)
    parameters = list(ddp.module.named_parameters())
    kept = {}
    for step in range(4):
        unused = {0: (), 1: (0,) if rank == 0 else (), 2: (1, 2) if rank else (), 3: (3,)}[step]
        given_step(ddp, rank, world, step, unused=unused)
        assert (ddp.module.w[3].grad is None) == (step == 3)  # not used anywhere
        whole = [ddp.module.random(r, step) for r in range(world)]
        skipped = {1: {0: (0,)}, 2: {1: (1, 2)}, 3: {0: (3,), 1: (3,)}}.get(step, {})
        means = [sum(whole[r][i].double() * (i not in skipped.get(r, ())) for r in range(world)) / world for i in range(4)]
        used = [i for i in range(4) if parameters[i][1].grad is not None]
        if spec != "int8":
            kept = conserved(handle, [parameters[i] for i in used], [means[i] for i in used], kept, f"step {step}")
        else:
            for i in used:
                close(parameters[i][1].grad, means[i], 0.05, f"step {step}")
        same_everywhere([parameters[i][1].grad for i in used])


@each_rank(2)
def test_mixed_dtypes_and_channels_last(rank, world):
    """float64 travels exactly; the others are compressed, each dtype in its own buckets."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    ddp = DDP(Given((64, 33), (50, 50), (40, 40), (60, 40), (5,), dtype=dtypes))
    handle = commopt.attach(ddp, "int4", start_step=0)
    kept = {}
    for step in range(4):
        means = given_step(ddp, rank, world, step)
        kept = conserved(handle, list(ddp.module.named_parameters()), means, kept, f"step {step}")
        close(ddp.module.w[2].grad, means[2], 1e-15)
    assert sorted(p["collective"] for p in handle.plan) == ["gather", "gather", "gather", "sum"], handle.plan

    conv = nn.Conv2d(8, 64, 3).to(memory_format=torch.channels_last)
    torch.manual_seed(rank)
    x = torch.randn(2, 8, 9, 9)
    local = copy.deepcopy(conv)
    local(x).square().sum().backward()
    ddp = DDP(conv)
    commopt.attach(ddp, "fp16", start_step=0)
    for _ in range(3):
        ddp.zero_grad()
        ddp(x).square().sum().backward()
        mean = total([local.weight.grad]) / world
        close(conv.weight.grad.flatten(), mean, 3 * 2.0**-11 * float(mean.abs().max()))


@pytest.mark.parametrize("mode, schedule", [(True, "pipelined"), (False, "pipelined"), ("python_reducer", "pipelined"), ("python_reducer", "decoupled")], ids=str)
@each_rank(2, seconds=120)
def test_compiled_models(rank, world, mode, schedule):
    torch._dynamo.config.optimize_ddp = mode
    torch._dynamo.config.compiled_autograd = mode == "python_reducer"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 30))
    ddp = DDP(copy.deepcopy(net))
    compiled = torch.compile(ddp, backend="aot_eager")
    handle = commopt.attach(compiled, "int8", start_step=0, schedule=schedule)
    torch.manual_seed(rank)
    x = torch.randn(16, 40)
    net(x).square().mean().backward()
    means = total([p.grad for p in net.parameters()]).div(world).split([p.numel() for p in net.parameters()])
    for step in range(3):
        ddp.zero_grad()
        compiled(x).square().mean().backward()
        for (name, p), mean in zip(ddp.module.named_parameters(), means):
            bound = 2e-7 + 1e-6 * mean.abs() if p.dim() == 1 else 1.01 * mean.abs().max() / 100
            close(p.grad.flatten(), mean, bound, f"{name} step {step}")
        same_everywhere([p.grad for p in ddp.parameters()], f"step {step}")
    assert handle.stats()["bytes_wire"] < 0.5 * handle.stats()["bytes_raw"], "nothing was compressed"


@each_rank(2)
def test_sparse_gradients_travel_exactly(rank, world):
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Embedding(100, 20, sparse=True), nn.Linear(20, 60)])
    net.forward = lambda i: net[1](net[0](i)).square().sum()
    plain = DDP(net)
    again = copy.deepcopy(net)
    again.forward = lambda i: again[1](again[0](i)).square().sum()
    ours = DDP(again)
    commopt.attach(ours, "int8", start_step=0)
    for step in range(3):
        index = torch.randint(0, 100, (9,), generator=torch.Generator().manual_seed(10 * step + rank))
        for model in (plain, ours):
            model.zero_grad()
            model(index).backward()
        same(again[0].weight.grad.to_dense(), net[0].weight.grad.to_dense(), f"step {step}")
        close(again[1].weight.grad, net[1].weight.grad, 0.01 * float(net[1].weight.grad.abs().max()))
        assert again[0].weight.grad.is_sparse


@each_rank(2)
def test_two_models_in_one_process(rank, world):
    ddps = [DDP(Given(*SHAPES), bucket_cap_mb=0.01) for _ in range(2)]
    handles = [commopt.attach(ddps[0], "int4", start_step=0), commopt.attach(ddps[1], "topk:ratio=0.05", start_step=0)]
    kept = [{}, {}]
    for step in range(4):
        for i in (0, 1, 0) if step % 2 else (0, 1):
            means = given_step(ddps[i], rank, world, 2 * step + i)
            kept[i] = conserved(handles[i], list(ddps[i].module.named_parameters()), means, kept[i], f"model {i} step {step}")
    assert [h.stats()["steps"] for h in handles] == [6, 4]

    for ddp in ddps:  # one backward over both
        ddp.zero_grad()
    everyone = [[ddp.module.random(r, 90 + i) for r in range(world)] for i, ddp in enumerate(ddps)]
    (ddps[0](everyone[0][rank]) + ddps[1](everyone[1][rank])).backward()
    for i, ddp in enumerate(ddps):
        means = [sum(r[j].double() for r in everyone[i]) / world for j in range(len(SHAPES))]
        conserved(handles[i], list(ddp.module.named_parameters()), means, kept[i], f"model {i}")


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))

    def forward(self, x, again=True):
        for layer in self.layers:
            x = torch.tanh(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True) if again else layer(x))
        return x.square().sum()


@each_rank(2)
def test_reentrant_checkpoints(rank, world):
    torch.manual_seed(0)
    ddp = DDP(Checkpointed(), bucket_cap_mb=0.005)
    handle = commopt.attach(ddp, "int4", start_step=0)
    kept = {}
    for step in range(3):
        x = torch.randn(5, 40, generator=torch.Generator().manual_seed(10 * step + rank)).requires_grad_()
        local = copy.deepcopy(ddp.module)
        local(x, again=False).backward()
        means = [m.view(40, -1).squeeze() for m in total([p.grad for p in local.parameters()]).div(world).split([p.numel() for p in local.parameters()])]
        ddp.zero_grad()
        ddp(x).backward()
        kept = conserved(handle, list(ddp.module.named_parameters()), means, kept, f"step {step}")
    assert handle.stats()["steps"] == 3 and handle.step == 2


@each_rank(2)
def test_the_door_of_pytorch(rank, world):
    """register_comm_hook(State(model, spec), hook) does what attach does."""
    ours, theirs = DDP(Given(*SHAPES)), DDP(Given(*SHAPES))
    commopt.attach(ours, "int4", seed=3)
    theirs.register_comm_hook(commopt.State(theirs, "int4", seed=3), commopt.hook)
    for step in range(4):
        given_step(ours, rank, world, step)
        given_step(theirs, rank, world, step)
        for p, q in zip(ours.parameters(), theirs.parameters()):
            same(p.grad, q.grad, f"step {step}")


@pytest.mark.parametrize("spec", ["int8:ef=true", "int4", "topk:ratio=0.05,warmup=0", "topk:ratio=0.05,values=int8,warmup=0"])
@each_rank(2)
def test_error_feedback_in_bfloat16_buckets_falls_as_one_over_time(rank, world, spec):
    """The error of the mean of T averages of the same gradients. The sum of gradient and residual must not be rounded to
    bfloat16. What remains is the rounding of the results themselves, which is not ours and is taken out."""
    ddp = DDP(Given((50, 60), dtype=torch.bfloat16))
    handle = commopt.attach(ddp, spec, start_step=0)
    seen, errors = torch.zeros(50, 60, dtype=torch.float64), {}
    for step in range(1, 401):
        ddp.zero_grad()
        ddp(ddp.module.random(rank, 0)).backward()
        seen += ddp.module.w[0].grad.double()
        if step in (25, 100, 400):
            mean = sum(ddp.module.random(r, 0)[0].double() for r in range(world)) / world
            kept = handle.state_dict()["residual"]["w.0"].double().view(50, 60)
            errors[step] = float((seen / step - mean).norm() / mean.norm())
            drift = float((seen / step + kept / step - mean).norm() / mean.norm())
            assert drift < 1.5e-3, f"{drift}: more than what bfloat16 rounds off the results"
    largest = float(kept.abs().max())
    assert errors[100] < 0.4 * errors[25] + 1e-3 and errors[400] < 0.4 * errors[100] + 1e-3, errors
    assert largest < 200, "the residual grows"


@each_rank(2, seconds=100)
def test_exact_parameters_of_different_ranks_in_bfloat16_stay_exact(rank, world):
    """Gradients of the ranks that nearly cancel: 1 and -0.98. Peers that keep a residual of exact tensors drift away."""
    ddp = DDP(Given((64, 20), (33,), dtype=torch.bfloat16))
    commopt.attach(ddp, "int4", start_step=0)
    matrix = ddp.module.random(rank, 1)[0]
    bias = torch.full((33,), 1.0 if rank else -0.98).bfloat16()
    want = ((torch.full((33,), 1.0).bfloat16().float() + torch.full((33,), -0.98).bfloat16().float()) / 2).bfloat16()
    for step in range(2000):
        ddp.zero_grad()
        ddp([matrix, bias]).backward()
        same(ddp.module.w[1].grad, want, f"step {step}")


@pytest.mark.parametrize("spec", ["int8:rounding=stochastic", "int4:rounding=stochastic", "topk:ratio=0.01"])
@each_rank(2)
def test_the_random_state_of_the_user_is_not_touched(rank, world, spec):
    import random

    import numpy as np

    ddp = DDP(Given(*SHAPES))
    gradients = [ddp.module.random(rank, s) for s in range(3)]
    torch.manual_seed(rank), np.random.seed(rank), random.seed(rank)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    commopt.attach(ddp, spec, start_step=0)
    for g in gradients:
        ddp(g).backward()
    same(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


@each_rank(3)
def test_a_default_device_changes_nothing(rank, world):
    """As with torch.set_default_device("cuda"): what is made on the CPU says so. On "meta" nothing else would have values."""
    for spec in [row["spec"] for row in overview()] + ["int4:collective=integer_sum", "topk:ratio=0.05,collective=sparse_two_shot"]:
        ends = []
        for default in ("cpu", "meta"):
            ddp = DDP(Given(*SHAPES), bucket_cap_mb=0.01)
            gradients = [ddp.module.random(rank, step) for step in range(3)]
            with torch.device(default):
                handle = commopt.attach(ddp, spec)
            for given in gradients:
                loss = ddp(given)
                with torch.device(default):
                    loss.backward()
            with torch.device(default):
                kept = handle.state_dict()
                mean = commopt.average(gradients[0], spec, dist.new_group()) if handle.spec.slots == 1 else []
            ends.append([*[p.grad for p in ddp.parameters()], *kept["residual"].values(), *mean])
        for got, want in zip(*ends, strict=True):
            same(got, want, spec)


@each_rank(2)
def test_set_pause_resume_and_exact(rank, world):
    ddp = DDP(Given(*SHAPES))
    handle = commopt.attach(ddp, "int4")
    named, kept = list(ddp.module.named_parameters()), {}

    def step(number: int, want: str) -> None:
        nonlocal kept
        means = given_step(ddp, rank, world, number)
        same_everywhere([p.grad for p in ddp.parameters()])
        assert {s for p in handle.plan for s in p["specs"]} == {want}, handle.plan
        if want == "none":
            for (name, p), mean in zip(named, means):
                close(p.grad, mean, 3e-7 * mean.abs() + 1e-7, f"{name} step {number}")
            for name, value in handle.state_dict()["residual"].items():
                same(value, kept[name], f"{name}: a paused handle must leave the residual")
        elif "ef=false" not in want:
            kept = conserved(handle, named, means, kept, f"step {number}")
            assert kept["w.0"].any()

    step(0, "none")  # start_step is 1
    step(1, "int4")
    step(2, "int4")
    handle.pause()
    step(3, "none")
    step(4, "none")
    handle.resume()
    step(5, "int4")
    with handle.exact():
        step(6, "none")
    step(7, "int4")
    handle.set("topk:ratio=0.1,warmup=0")
    step(8, "topk:ratio=0.1,warmup=0")
    handle.set("int8:ef=true")
    step(9, "int8:ef=true")
    assert isinstance(raised(handle.set, "int9"), ValueError)
    step(10, "int8:ef=true")
    handle.detach()
    kept = {}
    step(11, "none")
    assert handle.state_dict()["residual"] == {} and handle.stats()["residual_norm"] == 0


@each_rank(2)
def test_attach_refuses_what_would_not_work(rank, world):
    import pickle

    ddp = DDP(Given(*SHAPES))
    for what, words in {
        "int9": ["unknown compressor 'int9'", "int8", "topk"],
        "int8:blok=3": ["blok=3", "block=256 (int)", "rounding=nearest"],
        "int8:block=3": ["multiple of 8"],
        "topk:ratio=0": ["ratio must be above 0"],
    }.items():
        error = raised(commopt.attach, ddp, what)
        assert isinstance(error, ValueError) and all(w in str(error) for w in words), error
    for refused, words in [(ddp.module, "wrap the model first"), (nn.Linear(2, 2), "DistributedDataParallel")]:
        error = raised(commopt.attach, refused, "int8")
        assert isinstance(error, ValueError) and words in str(error), error
    assert isinstance(raised(lambda: commopt.attach(ddp, "int8", start_step=-1)), ValueError)

    handle = commopt.attach(ddp, "int4")
    error = raised(commopt.attach, ddp, "int8")
    assert isinstance(error, ValueError) and "handle.set" in str(error), error
    for copying in (pickle.dumps, copy.deepcopy):
        error = raised(copying, handle)
        assert isinstance(error, TypeError) and "state_dict" in str(error), error
        error = raised(copying, ddp)
        assert isinstance(error, TypeError) and "commopt" in str(error), f"{copying}: the copy would train without its hook: {error!r}"
    given_step(ddp, rank, world, 0)
    given_step(ddp, rank, world, 1)

    late = DDP(Given(*SHAPES))
    given_step(late, rank, world, 0)
    late_handle = commopt.attach(late, "int4", start_step=0)  # after a backward
    for step in range(1, 4):
        means = given_step(late, rank, world, step)
        conserved(late_handle, list(late.module.named_parameters()), means, {}, "late") if step == 1 else None


@each_rank(2)
def test_log_to_and_stats(rank, world):
    ddp = DDP(Given((100, 100), (7,)))
    handle = commopt.attach(ddp, "int8", start_step=0)
    seen = []
    handle.log_to(lambda stats, step: seen.append((step, stats)), every=2)
    for step in range(5):
        given_step(ddp, rank, world, step)
    stats = handle.stats()
    assert [step for step, _ in seen] == [0, 2, 4]
    assert stats["steps"] == 5 and stats["bytes_raw"] == 5 * 10007 * 4 and stats["nonfinite_steps"] == 0
    assert stats["bytes_wire"] == 5 * handle.plan[0]["bytes_sent"] and stats["ratio"] == stats["bytes_raw"] / stats["bytes_wire"]
    assert 3.8 < stats["ratio"] < 4
    assert list(stats["spec"].values()) == [["int8"]]
    assert all(stats[k] > 0 for k in ("encode_ms", "comm_ms", "decode_ms", "exposed_ms"))
    handle.reset_stats()
    assert handle.stats()["steps"] == 0 and handle.stats()["bytes_wire"] == 0


@pytest.mark.parametrize("spec", ["int4:rounding=stochastic", "topk:ratio=0.02"])
@each_rank(2, seconds=100)
def test_replicas_stay_identical_for_a_thousand_steps(rank, world, spec):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 17))
    ddp = DDP(net, bucket_cap_mb=0.005)
    commopt.attach(ddp, spec)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(rank)
    for step in range(1000):
        optimizer.zero_grad()
        x = torch.randn(8, 20, generator=g)
        nn.functional.cross_entropy(ddp(x), (x[:, :17]).argmax(1)).backward()
        optimizer.step()
        if step % 10 == 9:
            same_everywhere(ddp.parameters(), f"step {step}")
    assert (ddp(x).argmax(1) == x[:, :17].argmax(1)).float().mean() > 0.4, "it does not learn"


@pytest.mark.parametrize("spec, local", [("intra=none,inter=int4", [0, 1, 0, 1]), ("intra=bf16:ef=true,inter=topk:ratio=0.05,values=int8", [0, 1, 2, 0])])
@each_rank(4, seconds=120)
def test_machines_of_several_ranks(rank, world, spec, local):
    """Two and two ranks, and three and one, as torchrun would number them."""
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(local[rank]), str(local.count(0))
    ddp = DDP(Given((96, 70), (9,), (64, 64), (200, 33)), bucket_cap_mb=0.02)
    handle = commopt.attach(ddp, spec, start_step=0)
    kept = {}
    for step in range(4):
        means = given_step(ddp, rank, world, step)
        kept = conserved(handle, list(ddp.module.named_parameters()), means, kept, f"step {step}")
        same_everywhere([p.grad for p in ddp.parameters()], f"step {step}")
    assert {p["collective"] for p in handle.plan} == {"hierarchical"} and len(handle.plan) > 1


@pytest.mark.parametrize("spec", ["int8", "topk:ratio=0.05,collective=sparse_two_shot"])
@each_rank(3, 4, seconds=30)
def test_ranks_that_send_more_and_less_than_what_is_worth_a_message(rank, world, spec):
    """Shards differ in length, and what travels together must not differ for it: one rank would wait for what never comes."""
    ddp = DDP(Given((41, 99), (50, 70)), bucket_cap_mb=0.001)
    handle = commopt.attach(ddp, spec, start_step=0)
    for step in range(8):
        given_step(ddp, rank, world, step)
        same_everywhere([p.grad for p in ddp.parameters()], f"step {step}")
        sent = [None] * world
        dist.all_gather_object(sent, [plan["bytes_sent"] for plan in handle.plan])
        assert len(set(map(tuple, sent))) > 1, "all send the same: nothing to decide"
        among = sorted(bytes for plans in sent for bytes in plans)
        commopt.hooks.traffic.WORTH = among[(step + 1) * len(among) // 9] / (world - 1)


@each_rank(2, 3)
def test_small_buckets_travel_together(rank, world):
    """Nine buckets of a few KB each: one message to each peer where they are gathered, and DDP's bytes are accounted for."""
    sent, send = [], Link._send

    def counted(link, row, *args):
        sent.append(row.numel())
        send(link, row, *args)

    ddp = DDP(Given(*[(50, 50)] * 9), bucket_cap_mb=0.001)
    handle = commopt.attach(ddp, "topk:ratio=0.05,collective=gather", start_step=0)
    kept = {}
    for step in range(4):
        if step == 3:
            handle.reset_stats()
            Link._send = counted
        means = given_step(ddp, rank, world, step)
        Link._send = send
        kept = conserved(handle, list(ddp.module.named_parameters()), means, kept, f"step {step}")
    assert len(handle.plan) == 9 and len(sent) == world - 1
    assert sum(sent) == handle.stats()["bytes_wire"] == sum(p["bytes_sent"] for p in handle.plan)
