"""Gradients that are applied a step late: both corrections against their formulas, what interrupts them, and what they refuse."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
import test_faults
from ranks import Mixed, batch, each_rank, flat, loss_of, raised, run, same, same_everywhere

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3),
}
STEPS = 8


class Training:
    """A model, its optimizer with a schedule of its learning rate, and its handle."""

    def __init__(self, rank: int, k: int, optimizer: str = "sgd", schedule: str = "delayed", spec: str = "none", **options):
        torch.manual_seed(5)
        self.rank, self.k = rank, k
        self.ddp = DDP(Mixed(), bucket_cap_mb=0.01, **options)
        self.handle = commopt.attach(self.ddp, spec, schedule=schedule)
        self.optimizer = OPTIMIZERS[optimizer]([p for p in self.ddp.parameters() if p.requires_grad])
        self.rates = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.ddp.parameters() if p.requires_grad]

    def passes(self, step: int, which: range | None = None, k: int | None = None) -> None:
        """The step's passes, or some of them; the last is synchronised."""
        k = k or self.k
        for i in which if which is not None else range(k):
            with self.ddp.no_sync() if i < k - 1 else contextlib.nullcontext():
                (loss_of(self.ddp, self.rank, 10 * step + i) / k).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()

    def train(self, steps: range, check=lambda: None) -> None:
        for step in steps:
            self.passes(step)
            self.step()
            check()


class Simulated:
    """ACCO as it is defined, with all ranks in this process, and nothing of ours."""

    def __init__(self, world: int, optimizer: str):
        torch.manual_seed(5)
        self.world, self.net = world, Mixed()
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[optimizer](self.parameters)
        self.rates = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.held: tuple | None = None  # parameters, the optimizer's state_dict and a, where the real step is due
        self.late: list[Tensor] = []  # b

    def mean(self, step: int, which: range, k: int) -> list[Tensor]:
        ranks = []
        for rank in range(self.world):
            self.optimizer.zero_grad()
            for i in which:
                (loss_of(self.net, rank, 10 * step + i) / k).backward()
            ranks.append([p.grad.clone() for p in self.parameters])
        return [sum(grads[1:], grads[0]) / self.world for grads in zip(*ranks)]

    def apply(self, gradients: list[Tensor]) -> None:
        for p, g in zip(self.parameters, gradients):
            p.grad = g.clone()
        self.optimizer.step()

    def real(self) -> None:
        if self.held is None:
            return
        values, state, a = self.held
        rate = self.optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            for p, value in zip(self.parameters, values):
                p.copy_(value)
        self.optimizer.load_state_dict(state)
        self.apply([x + y for x, y in zip(a, self.late)])
        self.optimizer.param_groups[0]["lr"] = rate
        self.held = None

    def train_synchronously(self, step: int, k: int) -> None:
        self.apply(self.mean(step, range(k), k))
        self.rates.step()

    def train(self, step: int, k: int) -> None:
        h = k // 2
        a = self.mean(step, range(h), k)
        self.real()
        self.late = self.mean(step, range(h, k), k)
        self.held = [p.detach().clone() for p in self.parameters], copy.deepcopy(self.optimizer.state_dict()), a
        self.apply([k / h * g for g in a])
        self.rates.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@each_rank(2)
def test_half_is_what_its_formula_says(rank, world, optimizer):
    """After each step the estimate, and after a flush the real parameters and state, bit for bit."""
    for k in (2, 4):
        follow(rank, world, optimizer, k)


def follow(rank: int, world: int, optimizer: str, k: int) -> None:
    training, simulated = Training(rank, k, optimizer), Simulated(world, optimizer)
    for step in range(STEPS):
        training.train(range(step, step + 1))
        (simulated.train_synchronously if step < 2 else simulated.train)(step, k)
        for p, q in zip(training.parameters, simulated.parameters):
            same(p, q, f"step {step}")
        same_everywhere(training.parameters, f"step {step}")
    training.handle.flush()
    simulated.real()
    equal(training, simulated, "the end")
    training.handle.flush()
    equal(training, simulated, "nothing more")


def equal(training: Training, other: Training | Simulated, what: str) -> None:
    """Parameters and state, bit for bit."""
    for p, q in zip(training.parameters, other.parameters):
        same(p, q, what)
        for name, value in training.optimizer.state[p].items():
            same(value, other.optimizer.state[q][name], f"{what}, {name}")
    assert training.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("look", ["flush", "state_dict", "model", "optimizer", "evaluation", "inference", "detach"])
@each_rank(2)
def test_who_looks_sees_real_parameters_and_nothing_is_lost(rank, world, look):
    """After the look the training goes on from the real parameters, as the simulation does whose real step came as early."""
    training, simulated = Training(rank, 2), Simulated(world, "sgd")
    training.train(range(5))
    for step in range(5):
        (simulated.train_synchronously if step < 2 else simulated.train)(step, 2)
    simulated.real()
    if look == "flush":
        training.handle.flush()
    elif look == "state_dict":
        training.handle.load_state_dict(training.handle.state_dict())
    elif look == "model":
        for (name, value), p in zip(training.ddp.state_dict().items(), simulated.net.parameters()):
            same(value, p, name)
    elif look == "optimizer":
        training.optimizer.state_dict()
    elif look == "detach":
        training.handle.detach()
    elif rank == 0:  # one rank alone may evaluate
        with torch.no_grad() if look == "evaluation" else torch.inference_mode():
            same(training.ddp.module(batch(0, 1)[0]).clone(), simulated.net(batch(0, 1)[0]), "what the model says")
    if rank == 0 or look not in ("evaluation", "inference"):
        equal(training, simulated, look)
    if look not in ("evaluation", "inference"):
        for step in (5, 6):
            training.train(range(step, step + 1))
            (simulated.train_synchronously if look == "detach" else simulated.train)(step, 2)
    else:
        training.train(range(5, 7))
    training.handle.flush()
    simulated.real()
    if look not in ("evaluation", "inference"):
        equal(training, simulated, look)
    same_everywhere(training.parameters, look)


@pytest.mark.parametrize("detach", [False, True])
@each_rank(2)
def test_a_flush_within_a_step(rank, world, detach):
    """Between passes nothing changes but what is due; between backward and the step that becomes synchronous."""
    training, simulated = Training(rank, 4), Simulated(world, "sgd")
    for step in range(4):
        training.train(range(step, step + 1))
        (simulated.train_synchronously if step < 2 else simulated.train)(step, 4)
    training.passes(4, range(3))
    (training.handle.detach if detach else training.handle.flush)()
    training.passes(4, range(3, 4))
    training.handle.flush()
    a = simulated.mean(4, range(2), 4)
    simulated.real()
    b = simulated.mean(4, range(2, 4), 4)
    for p, x, y, q in zip(training.parameters, a, b, simulated.parameters):
        same(p, q, "before the step")
        assert torch.allclose(p.grad, x + y, rtol=1e-5, atol=1e-7) if detach else torch.equal(p.grad, x + y)
    training.step()
    before = flat(training.parameters)
    training.handle.flush()
    same(flat(training.parameters), before, "the step was a real one")
    same_everywhere(training.parameters)


@each_rank(2)
def test_the_number_of_passes_may_change_on_one_rank_only(rank, world):
    """Every step has two halves, perhaps an empty first one: what is applied for real is the mean of what there was."""
    training, simulated = Training(rank, 4), Simulated(world, "sgd")
    for step, ks in enumerate([(4, 4), (4, 4), (4, 4), (1, 4), (4, 2), (3, 3), (2, 2), (4, 4), (1, 1), (4, 4)]):
        training.passes(step, k=ks[rank])
        if step == 8:
            same_everywhere([p.grad for p in training.parameters], "a step of one pass")
        training.step()
        if ks[0] == ks[1]:
            same_everywhere(training.parameters, f"step {step}")
        training.handle.flush()
        same_everywhere(training.parameters, f"step {step} for real")
        gradients = []
        for r, k in enumerate(ks):  # everything at the real parameters: no estimate was left when this step began
            simulated.optimizer.zero_grad()
            for i in range(k):
                (loss_of(simulated.net, r, 10 * step + i) / k).backward()
            gradients.append([p.grad.clone() for p in simulated.parameters])
        simulated.apply([(x + y) / 2 for x, y in zip(*gradients)])
        simulated.rates.step()
        for p, q in zip(training.parameters, simulated.parameters):
            assert torch.allclose(p, q, rtol=1e-3, atol=1e-5), f"step {step}"


@each_rank(2)
def test_half_with_all_that_DDP_and_trainers_do(rank, world):
    """Compressed, with small buckets that travel together, views of buckets, unused parameters, gradients that stay, groups
    and two optimizers: ranks hold the same bits after every step."""
    for spec, options in [("int8", {}), ("topk:ratio=0.05", {"gradient_as_bucket_view": True}), ("powersgd:rank=2", {"find_unused_parameters": True}),
                          ("int4:ef=false", {}), ("sign", {"gradient_as_bucket_view": True, "find_unused_parameters": True})]:
        training = Training(rank, 3, "adamw", spec=spec, **options)
        parameters = training.parameters
        training.optimizer = torch.optim.AdamW(parameters[0::2], lr=1e-3)
        second = torch.optim.SGD([{"params": parameters[1::4]}, {"params": parameters[3::4], "lr": 0.02}], lr=0.01, momentum=0.9)
        for step in range(6):
            training.passes(step)
            same_everywhere([p.grad for p in training.parameters], f"gradients of step {step}, {spec}")
            second.step()
            training.optimizer.step()
            same_everywhere(training.parameters, f"step {step}, {spec}")
            second.zero_grad(set_to_none=False)
            training.optimizer.zero_grad(set_to_none=step % 2 == 0)
        training.handle.flush()
        same_everywhere(training.parameters, f"the end, {spec}")
        stats = training.handle.stats()
        assert stats["steps"] == 6 and stats["bytes_raw"] == (2 + 2 * 4) * 4 * sum(p.numel() for p in training.parameters), stats
        training.handle.detach()


@each_rank(2)
def test_clipping_by_norm_is_repeated_for_the_real_step(rank, world):
    """The factor that p.grad was multiplied by is that of the real gradient; what is no factor is refused."""
    training, simulated = Training(rank, 2), Simulated(world, "sgd")
    for step in range(3):
        training.train(range(step, step + 1))
        (simulated.train_synchronously if step < 2 else simulated.train)(step, 2)
    training.passes(3)
    size = float(nn.utils.clip_grad_norm_(training.parameters, 0.1))
    training.step()
    training.handle.flush()
    a = simulated.mean(3, range(1), 2)
    simulated.real()
    b = simulated.mean(3, range(1, 2), 2)
    assert size == pytest.approx(float(2 * flat(a).norm()), rel=1e-5)
    simulated.apply([0.1 / size * (x + y) for x, y in zip(a, b)])
    for p, q in zip(training.parameters, simulated.parameters):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    training.passes(4)
    nn.utils.clip_grad_norm_(training.parameters, 1e6)  # by one
    training.step()
    training.passes(5)
    nn.utils.clip_grad_value_(training.parameters, 1e-3)
    assert "but by a factor for each parameter" in str(raised(training.optimizer.step))


@each_rank(2)
def test_what_half_refuses(rank, world):
    training = Training(rank, 1)
    training.train(range(2))
    for _ in range(2):
        error = raised(training.passes, 2)
        assert isinstance(error, RuntimeError) and "two or more backward passes" in str(error) and "delayed:correction=local" in str(error)
        training.optimizer.zero_grad()

    training = Training(rank, 2)
    training.passes(0)
    assert "closure" in str(raised(training.optimizer.step, lambda: 0.0))
    training.step()
    training.train(range(1, 4))
    training.passes(4)
    training.optimizer.step()
    assert "steps twice" in str(raised(training.optimizer.step))
    with torch.no_grad():
        training.parameters[0].mul_(0.5)
    assert "parameters were written" in str(raised(training.handle.flush))

    training = Training(rank, 2)
    training.train(range(3))
    training.passes(3)
    training.optimizer.step()
    assert "zero_grad" in str(raised(training.passes, 4))

    for correction in ("half", "local"):
        training, scaler = Training(rank, 2, schedule=f"delayed:correction={correction}"), torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss_of(training.ddp, rank, 0)).backward()
        assert "GradScaler" in str(raised(scaler.step, training.optimizer))
        del scaler


class Curved(nn.Module):
    """Each rank has its own curvature: loss = h w^2 / 2 + c w."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((2048,), 1.0))

    def forward(self, h: float, c: float) -> Tensor:
        return (0.5 * h * self.w.square() + c * self.w).sum()


def curved(rank: int, lr: float, schedule: str, steps: int, h: tuple[float, ...] = (0.5, 1.5), look=lambda step, ddp, handle: None):
    """Trains; the model and the handle."""
    ddp = DDP(Curved())
    handle = commopt.attach(ddp, "none", schedule=schedule)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=lr, momentum=0.9)
    k = 2 if schedule == "delayed" else 1
    for step in range(steps):
        for i in range(k):
            with ddp.no_sync() if i < k - 1 else contextlib.nullcontext():
                (ddp(h[rank], 1.0 + rank + step % 3) / k).backward()
        optimizer.step()
        look(step, ddp, handle)
        optimizer.zero_grad()
    return ddp, handle


@each_rank(2)
def test_local_is_what_its_formula_says(rank, world):
    """x = g + (mean - own) of the step before; every 64 steps the mean of all ranks, which is where exact averages lead with
    SGD; ranks are apart by one correction and no more."""
    nets = [Curved() for _ in range(world)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9) for net in nets]
    late, apart, largest = [torch.zeros(2048) for _ in nets], [], [0.0]

    def follow(step: int, ddp: nn.Module, handle) -> None:
        gradients = []
        for r, net in enumerate(nets):
            net.w.grad = None
            net((0.5, 1.5)[r], 1.0 + r + step % 3).backward()
            gradients.append(net.w.grad.clone())
        mean = sum(gradients) / world
        for r, net in enumerate(nets):
            net.w.grad = mean.clone() if step < 2 else gradients[r] + late[r]
            late[r] = mean - gradients[r] if step >= 2 else late[r]
            optimizers[r].step()
        largest.append(max(largest[-1], float(late[0].abs().max())))
        if step == 63:
            for held in ([net.w for net in nets], [o.state[n.w]["momentum_buffer"] for o, n in zip(optimizers, nets)]):
                with torch.no_grad():
                    both = sum(held) / world
                    for t in held:
                        t.copy_(both)
            late[:] = [torch.zeros(2048) for _ in nets]
        same(ddp.module.w, nets[rank].w, f"step {step}")
        if step in (1, 63):
            same_everywhere(ddp.parameters(), f"step {step}")
        apart.append(float((nets[0].w - nets[1].w).detach().abs().max()))

    ddp, handle = curved(rank, 0.02, "delayed:correction=local", 70, look=follow)
    assert apart[1] == apart[63] == 0.0 < max(apart)
    assert all(a <= 2 * 0.02 / (1 - 0.9) * size for a, size in zip(apart, largest[1:])), "one correction, as momentum repeats it"
    handle.flush()
    same_everywhere(ddp.parameters(), "flush")
    wanted = sum(net.w.detach() for net in nets) / world
    same(ddp.module.w, wanted, "flush")


@each_rank(2)
def test_local_in_a_training(rank, world):
    """Several buckets, compressed, with passes under no_sync; who flushes and saves gets replicas that are one."""
    for optimizer, spec in (("sgd", "int8"), ("adamw", "topk:ratio=0.05")):
        training = Training(rank, 2, optimizer, "delayed:correction=local", spec, gradient_as_bucket_view=spec == "int8")
        training.train(range(6))
        assert raised(same_everywhere, training.parameters), "replicas are apart"
        training.handle.state_dict()
        same_everywhere(training.parameters, "state_dict")
        same_everywhere([v for p in training.parameters for v in training.optimizer.state[p].values()], "state")
        training.passes(6)
        training.handle.flush()
        same_everywhere([p.grad for p in training.parameters], "flushed before the step")
        training.step()
        same_everywhere(training.parameters, "a step of what was flushed")
        training.train(range(7, 9))
        training.handle.detach()
        training.train(range(9, 11), check=lambda: same_everywhere(training.parameters, "detached"))


@each_rank(2)
def test_the_guard_trips_where_delay_diverges_and_nowhere_else(rank, world):
    """On all ranks in the same step, with the reason and what to do. `half` bears what the synchronous training bears."""
    fine, _ = curved(rank, 3.0, "pipelined", 300)
    assert fine.module.w.abs().max() < 20, fine.module.w.abs().max()
    seen = []
    for schedule, lr, h in (("delayed:correction=local", 3.0, (0.5, 1.5)), ("delayed", 4.0, (0.5, 1.5)), ("delayed", 1e30, (1e10, 1e10))):
        steps = []
        error = raised(lambda: curved(rank, lr, schedule, 3000, h, look=lambda step, *_: steps.append(step)))
        assert isinstance(error, RuntimeError) and "diverges" in str(error) and 'schedule="decoupled"' in str(error), (schedule, error, steps[-1:])
        seen.append(float(len(steps)))
    same_everywhere([torch.tensor(seen)], "the step")
    for schedule, lr in (("delayed:correction=local", 0.2), ("delayed", 3.0)):
        ddp, handle = curved(rank, lr, schedule, 300)
        handle.flush()
        same_everywhere(ddp.parameters(), schedule)


def test_the_guard_knows_what_is_normal():
    """Decays over many orders of magnitude, plateaus, spikes and noise do not trip it; growth does, however slow it begins."""
    from commopt.schedulers.divergence import Divergence

    noise = torch.Generator().manual_seed(0)
    fine = Divergence()
    for step in range(5000):
        size = 10.0 * 0.99**step + 1e-4 + (100.0 * 0.99**step if step % 97 == 0 else 0.0)
        fine.see_norm(size * float(torch.exp(torch.randn(1, generator=noise))))
    fine.see_norm(9.0)  # up to where it began
    fine.see_norm(0.0)
    for growth in (1.12, 1.5, 10.0):
        guard, size, steps = Divergence(), 1.0, 0
        for _ in range(200):
            guard.see_norm(1.0)
        while raised(guard.see_norm, size) is None:
            size, steps = size * growth, steps + 1
        assert size < 1e18, (growth, steps)
    for size in (float("inf"), float("nan")):
        assert isinstance(raised(Divergence().see_norm, size), RuntimeError)


def _fail(rank: int, world: int, schedule: str, where: str) -> str:
    training = Training(rank, 2, schedule=schedule, spec="failing_gather")
    training.train(range(4))
    test_faults.fail[where] = rank == 1
    errors = [error for step in range(4, 7) if (error := raised(training.train, range(step, step + 1))) is not None]
    assert errors and all(type(error) is RuntimeError for error in errors), errors
    return str(errors[0])


@pytest.mark.parametrize("schedule", ["delayed", "delayed:correction=local"])
def test_a_failure_is_raised_by_all_ranks(schedule):
    texts = run(2, _fail, schedule=schedule, where="encode")
    assert texts[0] == texts[1] and "rank 1 failed" in texts[0] and "OSError: the dog ate it" in texts[0], texts
