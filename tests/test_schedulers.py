"""Every schedule gives the parameters that the plain one gives, bit for bit."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import commopt
from ranks import Mixed, batch, each_rank, loss_of, same, same_everywhere

SCHEDULES = ["pipelined", "with_optimizer", "priority", "decoupled"]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def train(rank, schedule, spec, optimizer, steps=7):
    torch.manual_seed(5)
    ddp = DDP(Mixed(), bucket_cap_mb=0.01)
    handle = commopt.attach(ddp, spec, schedule=schedule)
    chosen = OPTIMIZERS[optimizer]([p for p in ddp.parameters() if p.requires_grad and p.numel()])
    for step in range(steps):
        chosen.zero_grad()
        loss_of(ddp, rank, step).backward()
        chosen.step()
    return [p.detach().clone() for p in ddp.parameters()], handle


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@each_rank(2)
def test_every_optimizer_ends_where_it_does_with_the_plain_schedule(rank, world, optimizer):
    for spec in ("none", "int4"):
        want, _ = train(rank, "plain", spec, optimizer)
        for schedule in SCHEDULES:
            got, handle = train(rank, schedule, spec, optimizer)
            for p, q in zip(got, want):
                same(p, q, f"{spec} {schedule}")
            stats = handle.stats()
            assert stats["early_steps"] == 0
            print(schedule, stats["deferred_steps"], stats["predicted_ms"])
            handle.detach()
        same_everywhere(want)
