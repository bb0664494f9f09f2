"""Ours against PyTorch's own hooks, as a user would choose: what does a step's communication cost with the best of each
that trains as well as plain DDP?

    python -m commopt bench rivals --emulate 100mbit

1. Loss: --task, by default the byte-level GPT, is trained with each spec, as `bench accuracy` does it, over the loopback. A spec is in the band
   if its mean loss over the seeds is at most --band nats above plain DDP's. --losses takes it from earlier runs instead.
2. Communication: steps of the same model on the same text over the link, all candidates in turns.
   Buckets are of --bucket-mb, so that all but the last can travel during the backward pass, as they do in a larger model.
   PyTorch's PowerSGD has one bucket: on gloo it deadlocks with two.
3. Of those in the band, the one that adds least to a step is the best: of ours, and of theirs, to which plain DDP belongs.

"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from . import accuracy, candidates, launch, learning, steps, tasks, works
from .steps import cell

__doc__ += steps.__doc__

OURS = "int8,int4,mxfp4,topk:ratio=0.3,values=int4,warmup=0,powersgd:rank=16,values=int8"
SAME = ("task", "parameters", "world", "steps", "seeds", "tuned", "bucket_mb")  # in which files of losses must agree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    accuracy.add_arguments(parser)
    parser.set_defaults(bucket_mb=1.0, spec=f"{','.join(candidates.EXTERNAL)},{OURS}", seeds=3, timeout=None)
    parser.add_argument("--rounds", type=int, default=15, help="turns of every candidate on the link")
    parser.add_argument("--band", type=float, default=0.02, help="nats that a loss may lie above plain DDP's")
    parser.add_argument("--losses", metavar="FILE", nargs="+", help="the JSON of earlier runs of this bench or of bench accuracy: nothing is trained")


def main(args: argparse.Namespace) -> tuple[dict, str]:
    """The result, and the table that shows it."""
    specs = list(dict.fromkeys(["plain", *launch.split_specs(args.spec)]))
    candidates.check(specs)
    if args.task not in tasks.TASKS:
        raise ValueError(f"no task {args.task!r}; there are {', '.join(tasks.TASKS)}, of which this bench takes one")
    if args.world < 2 or args.rounds < 1:
        raise ValueError(f"a bench needs at least 2 ranks and 1 round, got --world {args.world} --rounds {args.rounds}")
    link = steps.link_of(args.world, args.emulate)  # a mistake in it is said before hours of training
    trained = read(args.losses, specs) if args.losses else train(args, specs)
    sizes = learning.Sizes.of(args.task, args)
    arguments = {"specs": specs, "task": args.task, **sizes._asdict(), "bucket_mb": args.bucket_mb, "rounds": args.rounds,
                 "rate": args.emulate, "world": args.world, "timeout": args.timeout}
    result = steps.compare("commopt.bench.rivals", arguments, works.parameters(args.task, sizes.width, sizes.layers), link)
    result = judged(result, trained, args.band)
    return result, table(result)


def train(args: argparse.Namespace, specs: list[str]) -> dict:
    """The result of bench accuracy."""
    settings = argparse.Namespace(**vars(args) | {"spec": " ".join(specs), "emulate": None, "timeout": args.timeout or 24 * 3600.0})
    return accuracy.main(settings)[0]["results"][0]


def read(files: list[str], specs: list[str]) -> dict:
    """The same from files; ValueError unless they belong together and have all specs. What several have, the last one says."""
    found = [json.loads(Path(file).read_text()) for file in files]
    found = [result.get("trained") or result["results"][0] for result in found]
    for file, result in zip(files, found):
        for key in SAME:
            if result["what"].get(key) != found[0]["what"].get(key):
                raise ValueError(f"--losses: {file} has {key} {result['what'][key]}, and {files[0]} has {found[0]['what'][key]}")
    runs = {spec: runs for result in found for spec, runs in result["runs"].items()}
    if missing := [spec for spec in specs if spec not in runs]:
        raise ValueError(f"--losses: none of the files has {', '.join(missing)}, only {', '.join(runs)}")
    return {"what": found[0]["what"], "runs": {spec: runs[spec] for spec in specs}}


def judged(result: dict, trained: dict, band: float) -> dict:
    """The result with the loss of each row, whether it is in the band, and the best of each side."""
    losses = {spec: statistics.mean(run["curve"][-1]["loss"] for run in runs) for spec, runs in trained["runs"].items()}
    for row in result["rows"]:
        row["above_plain"] = losses[row["spec"]] - losses["plain"]
        row["in_band"] = row["above_plain"] <= band
    best: dict[str, Any] = {"band": band}
    for side, rows in (("ours", [r for r in result["rows"] if r["spec"] not in candidates.EXTERNAL]),
                       ("theirs", [r for r in result["rows"] if r["spec"] in candidates.EXTERNAL])):
        best[side] = min((r for r in rows if r["in_band"]), key=lambda r: r["added_ms"], default={"spec": None})["spec"]
    added = {row["spec"]: row["added_ms"] for row in result["rows"]}
    ours, theirs = (added.get(best[side]) for side in ("ours", "theirs"))
    best["ratio"] = theirs / ours if ours is not None and ours > 0 else None
    return result | {"best": best, "trained": trained}


def table(result: dict) -> str:
    """One line per spec, and the verdict."""
    width = max(len(row["spec"]) for row in result["rows"]) + 1
    best, lines = result["best"], [f"{'spec':{width}}{'above plain':>12}{'in band':>9}{'sent MB':>9}{'added ms':>10}{'of plain':>10}{'floor ms':>10}{'step ms':>9}"]
    for row in result["rows"]:
        lines.append(f"{row['spec']:{width}}{row['above_plain']:>+12.4f}{'yes' if row['in_band'] else 'no':>9}{row['sent'] / 1e6:>9.3f}"
                     f"{row['added_ms']:>10.1f}" + cell(row["of_plain"], 10, 3) + cell(row["floor_ms"], 10, 1) + f"{row['step_ms']:>9.1f}")
    trained = result["trained"]["what"]
    lines.append(steps.circumstances(result["what"]))
    lines.append(f"loss: {trained['task']}, {trained['parameters'] / 1e6:.2f}M parameters, {trained['world']} ranks, {trained['steps']} steps, {trained['seeds']} seed(s)")
    return "\n".join([*lines, verdict(result)])


def verdict(result: dict) -> str:
    best, rows = result["best"], {row["spec"]: row for row in result["rows"]}
    said = [f"{best[side]} adds {rows[best[side]]['added_ms']:.1f} ms" if best[side] else "none is" for side in ("ours", "theirs")]
    ratio = f"; theirs / ours = {best['ratio']:.2f}" if best["ratio"] is not None else ""
    return f"within {best['band']:g} nats of plain DDP: of ours {said[0]}, of theirs {said[1]}{ratio}"


def worker() -> None:
    arguments = launch.worker_arguments()
    steps.serve(works.work(arguments["task"], arguments["width"], arguments["layers"], arguments["batch"]), arguments)


if __name__ == "__main__":
    worker()
