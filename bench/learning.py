"""One training of one task with one spec, and the learning rate that suits the spec."""

import argparse
import contextlib
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import candidates, launch, tasks, works
from .steps import check_same

RATES = (0.5, 1.0, 2.0)  # times the task's, which each spec is tried with
TUNED_BY = 1000  # the seed of those trials, which no judged run has


class Sizes(NamedTuple):
    """Of a task's model, and its batches per rank and step."""

    width: int
    layers: int
    batch: int

    @classmethod
    def of(cls, task: str, args: argparse.Namespace) -> "Sizes":
        """Those that are given, and the task's own."""
        return cls(*(getattr(works.kind(task) if getattr(args, key) is None else args, key) for key in cls._fields))


def tuned(task: str, spec: str, sizes: Sizes, args: argparse.Namespace, steps: int) -> float:
    """Of RATES times the task's learning rate, the one with the least loss after half of the steps, on all ranks the same."""
    losses, half = {}, max(1, steps // 2)
    once = argparse.Namespace(**vars(args) | {"eval_every": half})
    for factor in RATES:
        lr = factor * tasks.TASKS[task].lr
        losses[lr] = train(task, spec, TUNED_BY, sizes, once, half, lr)["curve"][-1]["loss"]
    return min(losses, key=lambda lr: (losses[lr] != losses[lr], losses[lr]))  # not one that ends as a NaN


def train(task: str, spec: str, seed: int, sizes: Sizes, args: argparse.Namespace, steps: int, lr: float) -> dict[str, Any]:
    """One training run on this rank; the held-out loss, seconds and bytes so far at every `eval_every`-th step."""
    rank, kind, what = dist.get_rank(), works.kind(task), tasks.TASKS[task]
    torch.manual_seed(seed)
    ddp, handle = candidates.wrap(spec, kind.model(sizes.width, sizes.layers), seed=seed, bucket_mb=args.bucket_mb, schedule=args.schedule)
    optimizer = what.optimizer(ddp.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: tasks.rate(step, steps))
    loss, draw = kind.data(sizes.width, sizes.batch // args.accumulate)
    batches, held_out = torch.Generator().manual_seed(1000 * seed + rank), what.held_out()
    curve, seconds = [], 0.0
    for step in range(1, steps + 1):
        begin = time.perf_counter()
        optimizer.zero_grad()
        for i in range(args.accumulate):
            with ddp.no_sync() if i < args.accumulate - 1 else contextlib.nullcontext():
                (loss(ddp, draw(batches)) / args.accumulate).backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - begin
        if step % args.eval_every == 0 or step == steps:
            value = tasks.judged(loss, ddp.module, held_out)
            sent = candidates.bytes_per_step(spec, ddp, handle) * step
            curve.append({"step": step, "loss": value, "seconds": seconds, "bytes": sent})
            launch.progress(f"{task}: {spec} seed {seed} lr {lr:g}: step {step}/{steps}, loss {value:.4f}")
    if handle:
        handle.flush()
    check_same(spec, torch.cat([p.detach().flatten() for p in ddp.parameters()]), f"parameters after {steps} steps")
    if handle:
        handle.detach()
    return {"curve": curve, "lr": lr, "seconds": seconds, "seconds_per_step": seconds / steps, "bytes_per_step": curve[-1]["bytes"] / steps}
