"""Every schedule gives the parameters that the plain one gives, bit for bit: all optimizers, all kinds of training loops."""

import contextlib
import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
from ranks import Mixed, each_rank, loss_of, same, same_everywhere, slow

SCHEDULES = ["pipelined", "with_optimizer", "priority", "decoupled"]
MIXTURE = {"embed*": "int8", "conv*": "int4", "fc1*": "topk:ratio=0.05"}  # all in one training


class Training:
    """A model and its handle, for one training after the other from the same parameters. schedule: None is DDP alone."""

    def __init__(self, rank: int, schedule: str | None, spec: str, rules: dict | None = None, net: nn.Module | None = None, **options):
        self.rank, self.schedule, self.spec = rank, schedule, spec
        torch.manual_seed(5)
        self.ddp = DDP(net or Mixed(), bucket_cap_mb=0.01, **options)
        self.handle = commopt.attach(self.ddp, spec, schedule=schedule, rules=rules) if schedule else None
        self._start = copy.deepcopy(self.ddp.module.state_dict())
        self.seen: list[Tensor] = []  # what a training loop has looked at on its way

    def parameters(self) -> list[Tensor]:
        return [p for p in self.ddp.parameters() if p.requires_grad and p.numel()]

    def see(self, *values) -> None:
        self.seen += [torch.as_tensor(value).detach().clone() for value in values]

    def backward(self, step: int, scale: float = 1.0) -> None:
        (scale * loss_of(self.ddp, self.rank, step)).backward()

    def run(self, loop) -> tuple[list[Tensor], int, int]:
        """All that the loop has seen, and the parameters that it ends with; deferred and early steps."""
        self.ddp.module.load_state_dict(self._start)
        self.ddp.zero_grad()
        self.seen, before = [], self.counts()
        loop(self)
        deferred, early = (now - was for now, was in zip(self.counts(), before))
        return [*self.seen, *(p.detach().clone() for p in self.ddp.parameters())], deferred, early

    def counts(self) -> tuple[int, int]:
        stats = self.handle.stats() if self.handle else {"deferred_steps": 0, "early_steps": 0}
        return stats["deferred_steps"], stats["early_steps"]


def all_equal(trainings: list[Training], loops: dict, spec: str, early: dict[str, bool | None] | None = None) -> None:
    """The first training's results are the wanted ones. early: whether the loop looks at gradients before the step; None: some."""
    for name, loop in loops.items():
        want, *_ = trainings[0].run(loop)
        same_everywhere(trainings[0].ddp.parameters(), name)
        for training in trainings[1:]:
            what = f"{name}, {spec}, {training.schedule}"
            got, deferred, looked = training.run(loop)
            assert len(got) == len(want), what
            for i, (p, q) in enumerate(zip(got, want)):
                same(p, q, f"{what}, {i} of {len(got)}")
            expected = (early or {}).get(name, False)
            if training.schedule in ("with_optimizer", "priority", "decoupled") and expected is not None:
                assert (looked > 0, deferred > 0) == (expected, not expected), f"{what}: {deferred} deferred, {looked} early"


def train(optimizer, steps: int = 4):
    """A training loop with that optimizer."""

    def loop(t: Training) -> None:
        chosen = optimizer(t.parameters())
        for step in range(steps):
            chosen.zero_grad()
            t.backward(step)
            chosen.step()

    return loop


def halves(parameters: list[Tensor]) -> list[dict]:
    """Groups with settings of their own; no bucket is all in one of them."""
    return [{"params": parameters[0::3]}, {"params": parameters[1::3], "lr": 3e-3, "weight_decay": 1e-2}, {"params": parameters[2::3], "lr": 2e-2}]


class CrossParameter(torch.optim.Optimizer):
    """All parameters move by what all gradients measure together."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.seen = 1.0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            self.seen += float(sum(p.grad.square().sum() for p in group["params"]))
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] / self.seen)


class Halving(torch.optim.SGD):
    """Does more in its step than what it is derived from."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99).add_(p.grad, alpha=-1e-3)


class Renamed(torch.optim.AdamW):
    """Leaves the step alone."""


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adam, tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2, t0=2),
    "groups, nesterov": lambda p: torch.optim.SGD(halves(p), lr=0.05, momentum=0.9, nesterov=True),
    "groups, adamw": lambda p: torch.optim.AdamW(halves(p), lr=1e-3),
    "a subclass": lambda p: Renamed(p, lr=1e-3),
}
LOOK_FOR_THEMSELVES = {"a step of its own": lambda p: Halving(p, lr=0.05, momentum=0.9), "all together": CrossParameter}


@pytest.mark.parametrize("spec", ["none", "int8", "int4", "topk:ratio=0.05"])
@each_rank(2, seconds=100)
def test_every_optimizer_ends_where_it_does_with_the_plain_schedule(rank, world, spec):
    """Each with exact gradients, and with one of three ways to compress them."""
    slow()
    loops = list({name: train(optimizer) for name, optimizer in (OPTIMIZERS | LOOK_FOR_THEMSELVES).items()}.items())
    some = {"none": loops, "int8": loops[0::3], "int4": loops[1::3], "topk:ratio=0.05": loops[2::3]}[spec]
    trainings = [Training(rank, schedule, spec) for schedule in [None if spec == "none" else "plain", *SCHEDULES]]
    all_equal(trainings, dict(some), spec, dict.fromkeys(LOOK_FOR_THEMSELVES, True))


# --- training loops ---


def adamw(t: Training) -> torch.optim.Optimizer:
    return torch.optim.AdamW(t.parameters(), lr=1e-3)


def stepwise(before=None, after=None, optimizer=adamw, steps: int = 4, set_to_none: bool = True):
    """A training loop that does something more, before(t, step, optimizer) its step and after it."""

    def loop(t: Training) -> None:
        chosen = optimizer(t)
        for step in range(steps):
            chosen.zero_grad(set_to_none)
            t.backward(step)
            if before:
                before(t, step, chosen)
            chosen.step()
            if after:
                after(t, step, chosen)

    return loop


def scaled(fused: bool):
    def loop(t: Training) -> None:
        """One step in the middle is skipped."""
        optimizer = torch.optim.AdamW(t.parameters(), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(5):
            optimizer.zero_grad()
            scaled = scaler.scale(loss_of(t.ddp, t.rank, step))
            (scaled * float("inf") if step == 2 and t.rank == 1 else scaled).backward()
            scaler.step(optimizer)
            scaler.update()
            t.see(scaler.get_scale())

    return loop


def without_sync(t: Training) -> None:
    optimizer = adamw(t)
    for step in range(3):
        with t.ddp.no_sync():
            t.backward(10 * step)
            t.backward(10 * step + 1)
        t.backward(10 * step + 2)
        optimizer.step()
        optimizer.zero_grad()


def several_backwards(t: Training) -> None:
    optimizer = adamw(t)
    for step in range(3):
        for part in range(3):
            t.backward(10 * step + part)
        optimizer.step()
        optimizer.zero_grad(set_to_none=step == 1)


def never_zeroed(t: Training) -> None:
    optimizer = adamw(t)
    for step in range(4):
        t.backward(step)
        optimizer.step()


def scheduled(t: Training) -> None:
    optimizer = torch.optim.SGD(t.parameters(), lr=0.1, momentum=0.9)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=8)
    for step in range(5):
        optimizer.zero_grad()
        t.backward(step)
        optimizer.step()
        rates.step()


def other_rates(t: Training, step: int, optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 3.0
        group["weight_decay"] = 0.5 / (step + 1)


def tensor_rates(t: Training, step: int, optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"].mul_(2.0)


def evaluated(t: Training, step: int, optimizer) -> None:
    with (torch.no_grad, torch.inference_mode)[step % 2]():
        t.ddp.eval()
        t.see(loss_of(t.ddp.module if step < 2 else t.ddp, t.rank, 50 + step))
        t.ddp.train()


def averaged(t: Training) -> None:
    average = torch.optim.swa_utils.AveragedModel(t.ddp.module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7))
    stepwise(after=lambda t, step, o: average.update_parameters(t.ddp.module))(t)
    t.see(*average.parameters())


def copied(t: Training, step: int, optimizer) -> None:
    again = copy.deepcopy(t.ddp.module)
    assert all(type(p) is nn.Parameter for p in again.parameters())
    one = copy.copy(t.parameters()[0])
    file = io.BytesIO()
    torch.save(t.ddp.module if step % 2 else t.parameters(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    loaded = list(loaded.parameters()) if step % 2 else loaded
    assert all(type(p) is nn.Parameter for p in (one, *loaded))
    t.see(*again.parameters(), *loaded, one)


def states_taken(t: Training, step: int, optimizer) -> None:
    if step % 2:
        t.see(*optimizer.state_dict()["state"][0].values(), *t.ddp.state_dict().values())
    else:
        t.see(*t.ddp.module.fc1.state_dict().values(), *optimizer.state_dict()["state"][3].values())


def clamped(t: Training, step: int, optimizer) -> None:
    for p in t.parameters():
        p.data.clamp_(-0.05, 0.05)


def logged(t: Training, step: int, optimizer) -> None:
    for p in t.parameters():
        t.see(p.grad.norm(), p.norm())
    assert "tensor" in repr(t.parameters()[1]) and "Awaited" not in repr(t.parameters()[2])


def in_every_way(t: Training, step: int, optimizer) -> None:
    """What reads parameters, by other doors than a module."""
    p = t.parameters()
    t.see(nn.utils.parameters_to_vector(p), torch.stack([q.sum() for q in p]), torch.from_numpy(p[0].detach().numpy()), p[1].tolist(), float(p[3].view(-1)[0]))
    t.see(torch.func.functional_call(t.ddp.module.fc2, dict(t.ddp.module.fc2.named_parameters()), torch.ones(131)), sum(q.data.sum() for q in p))


def written(t: Training, step: int, optimizer) -> None:
    """What writes parameters, after the step and so on top of it."""
    p = t.parameters()
    with torch.no_grad():
        p[0].add_(0.01)
        p[1][0] = 0.5
        torch._foreach_mul_(p[2:4], 0.9)
        nn.init.constant_(p[4], 0.25)
        p[5].data = p[5].data * 0.5
        p[6].copy_(p[6] * 2)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(p[7:9]) * 0.9, p[7:9])


def gradients_written(t: Training, step: int, optimizer) -> None:
    """After the step, which they are not part of any more."""
    p = t.parameters()
    p[0].grad.zero_()
    p[1].grad = torch.full_like(p[1], 7.0)
    p[2].grad = None
    torch._foreach_mul_([q.grad for q in p[3:]], 100.0)


def gradients_given(t: Training, step: int, optimizer) -> None:
    """Before the step, of some parameters."""
    p = t.parameters()
    p[0].grad = torch.full_like(p[0], 0.5)
    p[2].grad = None
    p[3].grad = p[3].grad * 2


def two_optimizers(t: Training) -> None:
    p = t.parameters()
    optimizers = [torch.optim.SGD(p[0::2], lr=0.1, momentum=0.9), torch.optim.AdamW(p[1::2], lr=1e-3)]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        t.backward(step)
        for optimizer in optimizers[:: 1 - 2 * (step % 2)]:
            optimizer.step()


def same_parameters_twice(t: Training) -> None:
    """Two optimizers over the same, and a step taken twice."""
    optimizers = [torch.optim.SGD(t.parameters(), lr=0.1, momentum=0.9), adamw(t)]
    for step in range(3):
        t.ddp.zero_grad()
        t.backward(step)
        for optimizer in (*optimizers, optimizers[0]):
            optimizer.step()


def closures(t: Training) -> None:
    optimizers = [torch.optim.LBFGS(t.parameters(), lr=0.05, max_iter=3), torch.optim.SGD(t.parameters(), lr=0.05)]
    for step in range(2):
        for optimizer in optimizers:

            def closure():
                optimizer.zero_grad()
                loss = loss_of(t.ddp, t.rank, step)
                loss.backward()
                return float(nn.utils.get_total_norm([p.grad for p in t.parameters()]))  # the same on all ranks

            t.see(optimizer.step(closure))


def resumed(t: Training) -> None:
    """The optimizer's state is taken back while a step is under way, then the model's."""
    optimizer = adamw(t)
    for step in range(6):
        if step == 2:
            model, state = copy.deepcopy(t.ddp.state_dict()), copy.deepcopy(optimizer.state_dict())
        if step == 4:
            optimizer.load_state_dict(state)
            t.ddp.load_state_dict(model)
        optimizer.zero_grad()
        t.backward(step)
        optimizer.step()


def grown(t: Training) -> None:
    p = t.parameters()
    optimizer = torch.optim.AdamW(p[:5], lr=1e-3)
    for step in range(4):
        t.ddp.zero_grad()
        t.backward(step)
        optimizer.step()
        if step == 1:
            optimizer.add_param_group({"params": p[5:], "lr": 1e-2})


def automatic_cast(t: Training) -> None:
    """Adafactor multiplies matrices: in the forward's autocast region that would round its state."""
    optimizer = torch.optim.Adafactor(t.parameters(), lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(t.ddp, t.rank, step)
        loss.backward()
        optimizer.step()


def hooked(t: Training) -> None:
    """Hooks of the user's: before a step they may look at gradients, behind it at parameters."""
    optimizer = adamw(t)
    optimizer.register_step_post_hook(lambda o, args, kwargs: t.see(t.parameters()[0]))
    for step in range(4):
        if step == 2:
            handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: nn.utils.clip_grad_value_(t.parameters()[:2], 1e-3))
        optimizer.zero_grad()
        t.backward(step)
        optimizer.step()
        if step == 2:
            handle.remove()


def set_and_paused(t: Training) -> None:
    """The handle's own calls between steps."""
    optimizer, h = adamw(t), t.handle
    calls = {1: lambda: h.set("int8"), 2: lambda: h.pause(), 3: lambda: h.resume(), 4: lambda: h.flush(), 5: lambda: h.set("int4")}
    for step in range(7):
        optimizer.zero_grad()
        with h.exact() if step == 4 and h else contextlib.nullcontext():
            t.backward(step)
        optimizer.step()
        if h and step in calls:
            calls[step]()
    if h:
        h.set(t.spec)


LOOPS = {
    "clipped by norm": stepwise(lambda t, step, o: t.see(nn.utils.clip_grad_norm_(t.parameters(), 0.5))),
    "clipped by norm of each": stepwise(lambda t, step, o: t.see(nn.utils.clip_grad_norm_(t.parameters(), 0.5, foreach=False))),
    "clipped by value": stepwise(lambda t, step, o: nn.utils.clip_grad_value_(t.parameters(), 1e-3)),
    "scaler": scaled(False),
    "scaler, fused": scaled(True),
    "closures": closures,
    "gradients given": stepwise(gradients_given),
    "gradients looked at": stepwise(lambda t, step, o: t.see(t.parameters()[step].grad)),
    "no_sync": without_sync,
    "several backwards": several_backwards,
    "never zeroed": never_zeroed,
    "zeroed in place": stepwise(set_to_none=False),
    "learning rates scheduled": scheduled,
    "learning rates changed": stepwise(after=other_rates),
    "tensor learning rates changed": stepwise(after=tensor_rates, optimizer=lambda t: torch.optim.Adam(t.parameters(), lr=torch.tensor(1e-3))),
    "evaluated": stepwise(after=evaluated),
    "averaged model": averaged,
    "copied": stepwise(after=copied),
    "states taken": stepwise(after=states_taken),
    "clamped": stepwise(after=clamped),
    "logged": stepwise(after=logged),
    "read in every way": stepwise(after=in_every_way),
    "written": stepwise(after=written),
    "gradients written": stepwise(after=gradients_written),
    "two optimizers": two_optimizers,
    "two optimizers of the same parameters": same_parameters_twice,
    "states loaded": resumed,
    "groups added": grown,
    "autocast": automatic_cast,
    "hooks": hooked,
    "handle": set_and_paused,
}
LOOKS = {name: True for name in list(LOOPS)[:8]} | dict.fromkeys(("gradients given", "gradients looked at", "several backwards", "never zeroed", "hooks", "two optimizers of the same parameters", "handle"))


@pytest.mark.parametrize("spec, rules", [("none", None), ("none", MIXTURE)], ids=["none", "mixture"])
@each_rank(2, seconds=150)
def test_every_training_loop_ends_where_it_does_with_the_plain_schedule(rank, world, spec, rules):
    slow()
    exact = spec == "none" and not rules
    trainings = [Training(rank, schedule, spec, rules) for schedule in ([None, *SCHEDULES] if exact else ["plain", *SCHEDULES[1:]])]
    all_equal(trainings, {n: l for n, l in LOOPS.items() if n != "handle" or trainings[0].handle}, spec, LOOKS)
