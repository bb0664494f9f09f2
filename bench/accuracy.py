"""What compression costs in loss: the same byte-level GPT, from the same seeds, on the same batches, with each spec.

    python -m commopt bench accuracy --spec plain,int8,topk:ratio=0.01 --steps 400 --seeds 3

`plain` is DDP without a hook; `torch:powersgd1` and `torch:fp16` are PyTorch's own hooks. The text is the standard
library's source, and the loss is that of held-out files in nats per byte. The line of a table is the mean over the seeds.

AdamW with a learning rate that rises over the first tenth of the steps and falls to zero along a cosine: with a constant
one, runs that differ by 1e-6 in their first parameters end some hundredths of a nat apart, and nothing could be told from
a difference between two specs; with this one they end within 0.0001.
"""

import argparse
import contextlib
import math
import statistics
import time

import torch
import torch.distributed as dist

import commopt

from . import candidates, launch, link, text
from .models import ByteGPT, next_byte_loss
from .steps import check_same

JUDGED = 256  # held-out stretches that the loss is taken over, the same for all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", default="plain,int8,topk:ratio=0.01", help=f"specs, separated by blanks or by commas before a name; beside ours: {', '.join(candidates.EXTERNAL)}")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest, of AdamW, the same for every spec")
    parser.add_argument("--batch", type=int, default=8, help="stretches of text per rank and step")
    parser.add_argument("--width", type=int, default=128, help="of the GPT; 128 gives 1.1M parameters")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--schedule", default="pipelined", help=f"of ours: {', '.join(commopt.schedules())}")
    parser.add_argument("--accumulate", type=int, default=1, help="backward passes that a step's batch is divided into")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="DDP's bucket_cap_mb")
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--emulate", metavar="RATE[,LATENCY]", help=link.EMULATE)
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds for everything")


def main(args: argparse.Namespace) -> tuple[dict, str]:
    """The result, and the table that shows it."""
    specs = launch.split_specs(args.spec)
    candidates.check(specs)
    settings = vars(args) | {"specs": specs}
    shaped = link.Link(args.world, args.emulate) if args.emulate else None
    result = launch.run("commopt.bench.accuracy", {k: v for k, v in settings.items() if not callable(v)}, args.world, timeout=args.timeout, link=shaped)
    return result, table(result)


def table(result: dict) -> str:
    """One line per spec: mean final loss, its difference to the first spec's, the spread over the seeds, bytes and time."""
    base = None
    lines = [f"{'spec':28} {'loss':>8} {'difference':>10} {'spread':>8} {'MB sent/step':>12} {'ms/step':>8} {'seconds':>8}"]
    for spec, runs in result["runs"].items():
        losses = [run["curve"][-1]["loss"] for run in runs]
        loss = statistics.mean(losses)
        base = loss if base is None else base
        sent, step = (statistics.mean(run[k] for run in runs) for k in ("bytes_per_step", "seconds_per_step"))
        lines.append(f"{spec:28} {loss:8.4f} {loss - base:+10.4f} {max(losses) - min(losses):8.4f} {sent / 1e6:12.3f} "
                     f"{1e3 * step:8.1f} {statistics.mean(run['seconds'] for run in runs):8.1f}")
    what = result["what"]
    return "\n".join(lines + [f"{what['parameters'] / 1e6:.2f}M parameters, {what['world']} ranks, {what['steps']} steps, {what['seeds']} seed(s), "
                              f"AdamW lr {what['lr']} with warm-up and cosine, schedule {what['schedule']}, {what['accumulate']} pass(es) a step, link {what['link']}, torch {what['torch']}, commopt {what['commopt']}"])


def train(spec: str, seed: int, args: argparse.Namespace) -> dict:
    """One training run on this rank; the held-out loss, seconds and bytes so far at every `eval_every`-th step."""
    rank = dist.get_rank()
    torch.manual_seed(seed)
    ddp, handle = candidates.wrap(spec, ByteGPT(args.width, args.layers), seed=seed, bucket_mb=args.bucket_mb, schedule=args.schedule)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, args.steps))
    training, held_out = text.standard_library()
    batches = torch.Generator().manual_seed(1000 * seed + rank)
    judged = text.batch(held_out, JUDGED, ddp.module.context, torch.Generator().manual_seed(0))
    curve, seconds = [], 0.0
    for step in range(1, args.steps + 1):
        begin = time.perf_counter()
        optimizer.zero_grad()
        parts = text.batch(training, args.batch, ddp.module.context, batches).chunk(args.accumulate)
        for i, part in enumerate(parts):
            with ddp.no_sync() if i < len(parts) - 1 else contextlib.nullcontext():
                (next_byte_loss(ddp, part) * (len(part) / args.batch)).backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - begin
        if step % args.eval_every == 0 or step == args.steps:
            with torch.no_grad():
                value = next_byte_loss(ddp.module, judged).item()
            sent = candidates.bytes_per_step(spec, ddp, handle) * step
            curve.append({"step": step, "loss": value, "seconds": seconds, "bytes": sent})
            launch.progress(f"{spec} seed {seed}: step {step}/{args.steps}, loss {value:.4f}")
    if handle:
        handle.flush()
    check_same(spec, torch.cat([p.detach().flatten() for p in ddp.parameters()]), f"parameters after {args.steps} steps")
    sent = curve[-1]["bytes"]
    return {"curve": curve, "seconds": seconds, "seconds_per_step": seconds / args.steps, "bytes_per_step": sent / args.steps}


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a fraction of the highest."""
    return min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def worker() -> None:
    args = argparse.Namespace(**launch.worker_arguments())
    dist.init_process_group("gloo")
    runs = {spec: [] for spec in args.specs}
    for seed in range(args.seeds):
        for spec in args.specs:
            runs[spec].append(train(spec, seed, args))
    what = {"parameters": sum(p.numel() for p in ByteGPT(args.width, args.layers).parameters()), "world": args.world, "steps": args.steps,
            "seeds": args.seeds, "lr": args.lr, "schedule": args.schedule, "accumulate": args.accumulate, "bucket_mb": args.bucket_mb, "link": args.emulate or "loopback", "torch": torch.__version__, "commopt": commopt.__version__}
    launch.finish({"what": what, "runs": runs})
    dist.destroy_process_group()


if __name__ == "__main__":
    worker()
