"""All kinds of models under every schedule: they end where they do with DDP alone, or with the plain schedule."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import commopt
from ranks import each_rank, same, slow

SCHEDULES = ["with_optimizer", "priority", "decoupled"]
WIDTH = 24


class Net(nn.Module):
    """Layers that are called one after the other, on [batch, 6, WIDTH], between an embedding and a loss."""

    def __init__(self, *layers: nn.Module, sparse: bool = False):
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH, sparse=sparse)
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(WIDTH, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        return self.out(x)


class Attention(nn.Module):
    """The projection's module is never called, only its parameters are used."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class Tied(Net):
    """The embedding's weight is the head's too, once as its own parameter and once without any module's."""

    def __init__(self, direct: bool):
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        self.direct = direct
        if direct:
            del self.out
        else:
            self.out.weight = self.embed.weight

    def head(self, x):
        return F.linear(x, self.embed.weight) if self.direct else self.out(x)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


class Times(torch.autograd.Function):
    """Takes a parameter as C++ does: without a function of torch."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.T, (x.transpose(-1, -2) @ grad).sum(0)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(0.2 * torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return Times.apply(x, self.inner.weight)


class Convolution(nn.Module):
    """Channels last, with a norm that keeps buffers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, (3, 5), padding=(1, 2)).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.back = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        return self.back(self.norm(self.conv(x.unsqueeze(1).to(memory_format=torch.channels_last)))).squeeze(1)


class Cast(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.bfloat16()).float()


class Checkpointed(nn.Module):
    def __init__(self, *layers: nn.Module, **options):
        super().__init__()
        self.layers, self.options = nn.ModuleList(layers), options

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), x, **self.options)
        return x


def selective():
    """Keeps the results of all products, in the order of the forward."""
    keep = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor}
    return create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE if op in keep else CheckpointPolicy.PREFER_RECOMPUTE)


class Branches(nn.Module):
    """Some layers are used in some steps only, or by some ranks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.used = [True] * 5

    def forward(self, x):
        for layer, used in zip(self.layers, self.used):
            x = torch.tanh(layer(x)) if used else x
        return x


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def product() -> nn.Linear:
    """The same operation as an optimizer of matrices needs."""
    return nn.Linear(WIDTH, WIDTH, bias=False)


def mlp() -> nn.Sequential:
    return nn.Sequential(linear(), nn.Tanh(), linear(), nn.Tanh(), linear())


def frozen(net: nn.Module) -> nn.Module:
    net.layers[1].requires_grad_(False)
    return net


def compiled(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def ignored(net: nn.Module) -> nn.Module:
    DDP._set_params_and_buffers_to_ignore_for_model(net, ["layers.0.weight"])
    return net


def initialized(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        net(torch.zeros(1, 6, dtype=torch.int64))
    return net


@dataclass
class Case:
    net: object  # makes the module
    options: dict = field(default_factory=dict)  # DDP's
    wrap: object = lambda ddp: ddp  # what is called
    before: object = lambda net, step, rank: None  # called before each step
    optimizer: object = lambda p: torch.optim.AdamW(p, lr=1e-2)
    defers: bool = True


def use(net, step, rank):
    """Not used: nothing, by rank 0, by rank 1, by none, each by one."""
    net.layers[0].used[1:4] = [(1, 1, 1), (0 if rank == 0 else 1, 1, 1), (1, rank == 0, 1), (1, 0, 1), (rank, 1 - rank, 0)][step % 5]


def freeze(net, step, rank):
    """In the middle of training, then back."""
    net.layers[0].layers[2].requires_grad_(not 2 <= step < 4)


ONE = {"bucket_cap_mb": 25}  # torch.compile asks for no less than 1
UNUSED = {"find_unused_parameters": True}
CASES = {
    "attention": Case(lambda: Net(Attention(), Attention())),
    "transformer": Case(lambda: Net(nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=True), linear())),
    "tied": Case(lambda: Tied(False)),
    "tied, used directly": Case(lambda: Tied(True)),
    "weight norm": Case(lambda: Net(nn.utils.parametrizations.weight_norm(linear()), linear())),
    "old weight norm": Case(lambda: Net(nn.utils.weight_norm(linear()), linear())),
    "spectral norm": Case(lambda: Net(nn.utils.parametrizations.spectral_norm(linear()), linear())),
    "lstm": Case(lambda: Net(Recurrent(nn.LSTM), Recurrent(nn.GRU))),
    "autograd function": Case(lambda: Net(Custom(), linear(), Custom())),
    "batch norm, channels last": Case(lambda: Net(Convolution(), linear())),
    "scripted": Case(lambda: Net(torch.jit.script(mlp()), linear())),
    "scripted, traced": Case(lambda: Net(torch.jit.trace(mlp(), torch.zeros(2, 6, WIDTH)), linear())),
    "reentrant checkpoints": Case(lambda: Net(Checkpointed(linear(), mlp(), linear(), use_reentrant=True))),
    "checkpoints": Case(lambda: Net(Checkpointed(linear(), mlp(), linear(), use_reentrant=False))),
    "selective checkpoints": Case(
        lambda: Net(Checkpointed(product(), product(), product(), use_reentrant=False, context_fn=selective)), optimizer=lambda p: torch.optim.Adafactor(p, lr=1e-2)),
    "sparse": Case(lambda: Net(linear(), linear(), sparse=True), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
    "bfloat16": Case(lambda: Net(mlp()).bfloat16()),
    "half of it bfloat16": Case(lambda: Net(Cast(mlp().bfloat16()), linear())),
    "frozen": Case(lambda: frozen(Net(linear(), linear(), linear()))),
    "ignored by DDP": Case(lambda: ignored(Net(linear(), linear()))),
    "bucket views": Case(lambda: Net(mlp()), {"gradient_as_bucket_view": True}),
    "no bucket views": Case(lambda: Net(mlp()), {"gradient_as_bucket_view": False}),
    "static graph": Case(lambda: Net(mlp()), {"static_graph": True}),
    "static graph, reentrant": Case(lambda: Net(Checkpointed(linear(), mlp(), use_reentrant=True)), {"static_graph": True}),
    "unused": Case(lambda: Net(Branches()), UNUSED, before=use),
    "unused, bucket views": Case(lambda: Net(Branches()), UNUSED | {"gradient_as_bucket_view": True}, before=use, defers=False),
    "frozen in the middle": Case(lambda: Net(Branches()), UNUSED, before=freeze),
    "module.compile": Case(lambda: compiled(Net(mlp())), ONE, defers=False),
    "DDP of compiled": Case(lambda: torch.compile(Net(mlp()), backend="eager"), ONE, defers=False),
    "compiled DDP": Case(lambda: Net(mlp()), ONE, wrap=lambda ddp: torch.compile(ddp, backend="aot_eager"), defers=False),
    "compiled part": Case(lambda: Net(mlp(), compiled(Branches())), ONE, defers=False),
}


def train(case: Case, rank: int, schedule: str | None, spec: str, steps: int = 6):
    torch.manual_seed(7)
    torch._dynamo.reset()
    net = case.net()
    ddp = DDP(net, **{"bucket_cap_mb": 0.004} | case.options)
    handle = commopt.attach(ddp, spec, schedule=schedule, rules={"*": spec} if spec != "none" else None) if schedule else None
    called, optimizer, seen = case.wrap(ddp), case.optimizer([p for p in net.parameters()]), []
    for step in range(steps):
        case.before(getattr(net, "_orig_mod", net), step, rank)
        tokens = torch.randint(0, 40, (5, 6), generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        F.cross_entropy(called(tokens).flatten(0, 1).float(), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()
        if step in (2, 4):  # evaluated, by the module itself and by one of its parts
            with (torch.no_grad, torch.inference_mode)[step == 4]():
                net.eval()
                seen += [net(tokens).clone(), net.out(torch.ones(WIDTH, dtype=net.out.weight.dtype)) if hasattr(net, "out") else tokens]
                net.train()
    seen += [t.detach().to_dense().clone() for t in (*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters() if p.grad is not None))]
    return seen, handle


def check(names, rank: int, spec: str) -> None:
    slow()
    for name in names:
        case = CASES[name]
        if "scripted" in name:  # the first time in a process its results have other last bits
            train(case, rank, None, "none")
        want, _ = train(case, rank, None if spec == "none" else "plain", spec)
        for schedule in SCHEDULES:
            what = f"{name}, {spec}, {schedule}"
            got, handle = train(case, rank, schedule, spec)
            assert len(got) == len(want), what
            for i, (p, q) in enumerate(zip(got, want)):
                same(p, q, f"{what}, {i} of {len(got)}")
            stats = handle.stats()
            assert (stats["deferred_steps"] > 0) == case.defers and stats["early_steps"] == 0, f"{what}: {stats['deferred_steps']} deferred, {stats['early_steps']} early"
            handle.detach()


@pytest.mark.parametrize("names", [list(CASES)[i::3] for i in range(3)], ids=["1", "2", "3"])
@pytest.mark.parametrize("spec", ["none", "int8"])
@each_rank(2, seconds=100)
def test_every_model_ends_where_it_does_with_the_plain_schedule(rank, world, spec, names):
    check(names, rank, spec)
