"""What compression costs in loss: the same model, from the same seeds, on the same batches, with each spec.

    python -m commopt bench accuracy --spec plain,int8,topk:ratio=0.01 --seeds 3
    python -m commopt bench accuracy --task recommender,resnet,gpt --spec recommended --seeds 3 --tune

`plain` is DDP without a hook; `torch:powersgd1`, `torch:fp16` and so on are PyTorch's own hooks.

    loss        of what was held out, mean over the seeds
    above       loss - loss of the first spec
    band        from the least to the greatest loss of the first spec's seeds. in it: whether loss is at most the greatest
    spread      greatest - least of the spec's own seeds; as for the band, of those whose loss is finite
    lr          highest learning rate: --lr, or the task's; with --tune, of half of it, itself and twice as much, the one with the
                least loss after half of the steps from a seed that is not judged: for every spec, the first too
    sent        MB that a rank hands to the network in a step, by the candidate's own account
    target      the loss that the first spec has after three quarters of its steps. MB and s to it: what a rank has sent and how
                long training has taken, evaluations left out, when the mean of the seeds first gets there; linear between evaluations

"""

import argparse
import math
import statistics
from typing import Any

import torch
import torch.distributed as dist

import commopt
from commopt.schedulers import parse_schedule

from . import candidates, launch, learning, link, tasks, works
from .steps import cell, link_of

__doc__ += tasks.__doc__

OURS = ("int8", "int4", "mxfp4", "topk:ratio=0.3,values=int4,warmup=0", "topk:ratio=0.01", "powersgd:rank=16,values=int8")
RECOMMENDED = ("plain", "torch:fp16", "torch:powersgd1", "torch:powersgd4", "torch:powersgd16", *OURS)
TARGET = 0.75  # of the first spec's steps
EVALUATIONS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", default="gpt", help=f"of {', '.join(tasks.TASKS)}, separated by commas")
    parser.add_argument("--spec", default="plain,int8,topk:ratio=0.01",
                        help=f"specs, separated by blanks or by commas before a name; beside ours: {', '.join(candidates.EXTERNAL)}; "
                             f"recommended: plain, PyTorch's hooks, and of ours {' '.join(OURS)}")
    parser.add_argument("--steps", type=int, help="default: the task's")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--lr", type=float, help="the highest, the same for every spec; default: the task's")
    parser.add_argument("--tune", action="store_true", help="find each spec's own learning rate first")
    parser.add_argument("--batch", type=int, help="per rank and step; default: the task's, like the next two")
    parser.add_argument("--width", type=int, help="of a layer")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--schedule", default="pipelined", help=f"of ours: {', '.join(commopt.schedules())}")
    parser.add_argument("--accumulate", type=int, default=1, help="backward passes that a step's batch is divided into")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="DDP's bucket_cap_mb")
    parser.add_argument("--eval-every", type=int, help="steps; default: an eighth of them")
    parser.add_argument("--emulate", metavar="RATE[,LATENCY]", help=link.EMULATE)
    parser.add_argument("--timeout", type=float, default=6 * 3600.0, help="seconds for everything")


def main(args: argparse.Namespace) -> tuple[dict, str]:
    """The result, and the table that shows it."""
    specs, chosen = _specs(args.spec), args.task.split(",")
    check(chosen, args)
    settings = {k: v for k, v in vars(args).items() if not callable(v)} | {"specs": specs, "tasks": chosen}
    result = launch.run("commopt.bench.accuracy", settings, args.world, timeout=args.timeout, link=link_of(args.world, args.emulate))
    return result, "\n\n".join(table(one) for one in result["results"])


def _specs(text: str) -> list[str]:
    specs = list(RECOMMENDED) if text == "recommended" else launch.split_specs(text)
    candidates.check(specs)
    return specs


def check(chosen: list[str], args: argparse.Namespace) -> None:
    """ValueError for what cannot be trained, before anything is."""
    if unknown := [task for task in chosen if task not in tasks.TASKS]:
        raise ValueError(f"--task: no task {unknown[0]!r}; there are {', '.join(tasks.TASKS)}")
    if len(chosen) > 1 and (given := [f"--{key}" for key in ("lr", "batch", "width", "layers") if getattr(args, key) is not None]):
        raise ValueError(f"{' and '.join(given)}: only with a single --task, since every task has its own; got {', '.join(chosen)}")
    if args.tune and args.lr is not None:
        raise ValueError(f"--tune finds each spec's learning rate, and --lr {args.lr:g} sets it: leave one of them out")
    for key, least in {"world": 2, "seeds": 1, "steps": 1, "batch": 1, "width": 1, "layers": 1, "eval_every": 1, "accumulate": 1}.items():
        if (value := getattr(args, key)) is not None and value < least:
            raise ValueError(f"--{key.replace('_', '-')} must be at least {least}, got {value}")
    for key in ("lr", "bucket_mb"):
        if (value := getattr(args, key)) is not None and not value > 0:
            raise ValueError(f"--{key.replace('_', '-')} must be above 0, got {value:g}")
    for task in chosen:
        sizes = learning.Sizes.of(task, args)
        if sizes.batch % args.accumulate:
            raise ValueError(f"--accumulate {args.accumulate} does not divide the batch of {task}, {sizes.batch} per rank")
        works.parameters(task, sizes.width, sizes.layers)  # refuses sizes of which there is no model
    parse_schedule(args.schedule)


def judged(result: dict) -> list[dict[str, Any]]:
    """A row for each spec of one task's result, as the module's docstring defines them, with the curve of its seeds together."""
    rows: list[dict[str, Any]] = []
    for spec, runs in result["runs"].items():
        curve = [_of_seeds(points) for points in zip(*(run["curve"] for run in runs), strict=True)]
        end, mean = curve[-1], lambda key: statistics.mean(run[key] for run in runs)
        rows.append({"spec": spec, "lr": runs[0]["lr"], "loss": end["loss"], "least": end["least"], "greatest": end["greatest"],
                     "spread": end["greatest"] - end["least"], "curve": curve, "sent": mean("bytes_per_step"), "seconds_per_step": mean("seconds_per_step")})
    first = rows[0]
    target = _loss_at(first["curve"], TARGET * first["curve"][-1]["step"])
    for row in rows:
        row |= {"above": row["loss"] - first["loss"], "in_band": row["loss"] <= first["greatest"], "target": target,
                "bytes_to_target": _reached(row["curve"], target, "bytes"), "seconds_to_target": _reached(row["curve"], target, "seconds")}
    return rows


def _of_seeds(points: tuple[dict[str, float], ...]) -> dict[str, float]:
    """One evaluation: means over the seeds, a NaN where a seed's loss is one, and the least and the greatest loss that is finite."""
    finite = [loss for point in points if math.isfinite(loss := point["loss"])] or [math.nan]
    return {key: statistics.mean(point[key] for point in points) for key in ("step", "loss", "seconds", "bytes")} | {"least": min(finite), "greatest": max(finite)}


def _loss_at(curve: list[dict[str, float]], step: float) -> float:
    """Linear between evaluations; that of the first one before it."""
    for before, after in zip(curve, curve[1:]):
        if before["step"] <= step <= after["step"]:
            return before["loss"] + (step - before["step"]) / (after["step"] - before["step"]) * (after["loss"] - before["loss"])
    return curve[0]["loss"]


def _reached(curve: list[dict[str, float]], target: float, key: str) -> float | None:
    """The key where the loss is first at most the target: linear between evaluations, of which the one before must be finite;
    None if it never is."""
    for before, after in zip([None, *curve], curve):
        if after["loss"] <= target:
            if before is None or not math.isfinite(before["loss"]):
                return after[key]
            return before[key] + (before["loss"] - target) / (before["loss"] - after["loss"]) * (after[key] - before[key])
    return None


def table(result: dict) -> str:
    """One line per spec."""
    rows, what = judged(result), result["what"]
    width = max(28, *(len(row["spec"]) + 1 for row in rows))
    lines = [f"{what['task']:{width}}{'lr':>8}{'loss':>9}{'above':>9}{'in band':>9}{'spread':>8}{'sent MB':>9}{'MB to target':>14}{'s to target':>13}{'ms/step':>9}"]
    for row in rows:
        lines.append(f"{row['spec']:{width}}{row['lr']:>8g}{row['loss']:>9.4f}{row['above']:>+9.4f}{'yes' if row['in_band'] else 'no':>9}"
                     f"{row['spread']:>8.4f}{row['sent'] / 1e6:>9.3f}" + cell(row["bytes_to_target"] and row["bytes_to_target"] / 1e6, 14, 1)
                     + cell(row["seconds_to_target"], 13, 1) + f"{1e3 * row['seconds_per_step']:>9.1f}")
    first = rows[0]
    lines.append(f"loss in {tasks.TASKS[what['task']].unit}: band {first['least']:.4f} to {first['greatest']:.4f}, target {first['target']:.4f}; {what['parameters'] / 1e6:.2f}M parameters, {what['world']} ranks, "
                 f"{what['steps']} steps of {what['batch']} per rank in {what['accumulate']} pass(es), {what['seeds']} seed(s), learning rate {what['tuned']}, "
                 f"schedule {what['schedule']}, link {what['link']}, torch {what['torch']}, commopt {what['commopt']}")
    return "\n".join(lines)


def learn(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """In a worker: all runs of one task."""
    what, sizes = tasks.TASKS[task], learning.Sizes.of(task, args)
    steps = args.steps or what.steps
    settings = argparse.Namespace(**vars(args) | {"eval_every": args.eval_every or max(1, steps // EVALUATIONS)})
    runs: dict[str, list] = {}
    for spec in args.specs:
        lr = learning.tuned(task, spec, sizes, settings, steps) if args.tune else args.lr or what.lr
        runs[spec] = [learning.train(task, spec, seed, sizes, settings, steps, lr) for seed in range(args.seeds)]
    return {"what": {
        "task": task, "parameters": works.parameters(task, sizes.width, sizes.layers), "world": args.world, "steps": steps, "seeds": args.seeds,
        "tuned": "tuned for each spec" if args.tune else "of the task" if args.lr is None else "given", "schedule": args.schedule,
        "accumulate": args.accumulate, "bucket_mb": args.bucket_mb, **sizes._asdict(), "link": args.emulate or "loopback",
        "torch": torch.__version__, "commopt": commopt.__version__}, "runs": runs}


def worker() -> None:
    args = argparse.Namespace(**launch.worker_arguments())
    dist.init_process_group("gloo")
    launch.finish({"results": [learn(task, args) for task in args.tasks]})
    dist.destroy_process_group()


if __name__ == "__main__":
    worker()
