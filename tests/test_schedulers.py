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
        self.rank, self.schedule = rank, schedule
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
    slow()
    trainings = [Training(rank, schedule, spec) for schedule in [*[None] * (spec == "none"), "plain", *SCHEDULES]]
    loops = {name: train(optimizer) for name, optimizer in (OPTIMIZERS | LOOK_FOR_THEMSELVES).items()}
    all_equal(trainings, loops, spec, dict.fromkeys(LOOK_FOR_THEMSELVES, True))
