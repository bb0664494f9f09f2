"""What a training step takes: forward, backward and optimizer of a real model, under each spec and schedule, and when its
parts were at work.

    python -m commopt bench step --model gpt --spec none,int8 --schedule pipelined,priority --emulate 1gbit

    p50, p75, p90    percentiles of the measured steps of all turns, in ms
    of plain         p50 / plain DDP's p50
    added            p50 - p50 of no_sync, in ms. no_sync: the same without communication, and what no step can be below
    exposed          ms per measured step that computation waited for communication, by the candidate's own account
    sent             MB that a rank hands to the network in a step, by the candidate's own account
    floor            sent / rate, in ms (with --emulate): what no step can be below either
    predicted        ms that the schedule expected of a step when it planned its order
    of p50           predicted / p50
    memory           MB by which a worker's resident memory grew to its largest from before the candidate was made to the end
                     of its warm-up: model, gradients, optimizer, buckets, messages, and what backward keeps of forward

Of exposed, sent and memory that of the rank which has most. Below the table a chart for each candidate: one more
turn is run with the profiler, and rank 0 shows its last measured step, all charts at one scale. Behind a lane are the ms
that it is busy.

"""

import argparse
import contextlib
import sys
from functools import partial
from typing import Any

import torch.distributed as dist

import commopt
from commopt.schedulers import parse_schedule

from . import candidates, launch, link, steps, timeline, training, works
from .steps import cell

__doc__ += training.__doc__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt", help=", ".join(works.KINDS))
    parser.add_argument("--spec", default="none,int8",
                        help=f"specs, separated by blanks or by commas before a name; beside ours: {', '.join(candidates.EXTERNAL)}; plain is always run")
    parser.add_argument("--schedule", default="pipelined,priority,decoupled", help=f"of {', '.join(commopt.schedules())}, separated likewise; ours are run under each")
    parser.add_argument("--emulate", metavar="RATE[,LATENCY]", help=link.EMULATE)
    parser.add_argument("--world", type=int, default=2, help="number of ranks")
    parser.add_argument("--width", type=int, help="of a layer; channels of resnet's first stage. Defaults: those of the model")
    parser.add_argument("--layers", type=int, help="of the model; blocks per stage of resnet")
    parser.add_argument("--batch", type=int, help="per rank and step")
    parser.add_argument("--bucket-mb", type=float, help="DDP's bucket_cap_mb; default: 1, so that buckets travel during backward as in a large model; of stack DDP's own 25, of sleeping 0.6, one for each layer")
    parser.add_argument("--optimizer", default="sgd", choices=training.OPTIMIZERS, help="sgd has momentum 0.9")
    parser.add_argument("--accumulate", type=int, default=1, help="backward passes of a step, each of a batch; only the last one synchronises")
    parser.add_argument("--rounds", type=int, default=6, help=f"turns of every candidate, of {training.STEPS} measured steps")
    parser.add_argument("--timeout", type=float, help="seconds for everything; default: what plain DDP would take, and some more")


def main(args: argparse.Namespace) -> tuple[dict, str]:
    """The result, and the table and the charts that show it."""
    names = list_candidates(launch.split_specs(args.spec), launch.split_specs(args.schedule))
    kind = works.kind(args.model)
    sizes = {key: getattr(kind, key) if getattr(args, key) is None else getattr(args, key) for key in ("width", "layers", "batch", "bucket_mb")}
    if args.world < 2 or args.rounds < 1 or args.accumulate < 1 or min(sizes.values()) <= 0:
        raise ValueError(f"a bench needs at least 2 ranks, 1 round, 1 pass and sizes above 0, got --world {args.world} --rounds {args.rounds} --accumulate {args.accumulate} "
                         + " ".join(f"--{key.replace('_', '-')} {value}" for key, value in sizes.items()))
    network = steps.link_of(args.world, args.emulate)
    rate = link.bits_per_second(args.emulate) if args.emulate else None
    count = len(names) * (training.WARMUP + (args.rounds + 1) * training.TURN) * args.accumulate
    timeout = args.timeout or steps.time_limit(count, works.parameters(args.model, sizes["width"], sizes["layers"]), rate)
    arguments = {"model": args.model, "candidates": names, "optimizer": args.optimizer, "accumulate": args.accumulate, "rounds": args.rounds, "rate": args.emulate, **sizes}
    result = compared(launch.run("commopt.bench.step", arguments, args.world, timeout=timeout, link=network), rate)
    return result, table(result) + "\n" + charts(result, marks_for(sys.stdout.encoding))


def list_candidates(specs: list[str], schedules: list[str]) -> list[tuple[str, str | None]]:
    """(spec, schedule) of every row; the schedule is None for what is not ours. ValueError for an unknown one."""
    candidates.check(specs)
    for schedule in schedules:
        parse_schedule(schedule)
    ours = lambda spec: spec not in candidates.EXTERNAL
    rows = [(spec, schedule) for spec in specs for schedule in (schedules if ours(spec) else [None])]
    return list(dict.fromkeys([(training.NO_SYNC, None), ("plain", None), *rows]))


def compared(result: dict, rate: float | None) -> dict:
    """The result with what follows from the numbers of several rows, and from the rate in bits per second."""
    p50 = {row["spec"]: row["p50_ms"] for row in result["rows"] if row["schedule"] is None}
    for row in result["rows"]:
        row["of_plain"] = row["p50_ms"] / p50["plain"]
        row["added_ms"] = row["p50_ms"] - p50[training.NO_SYNC]
        row["floor_ms"] = 8e3 * row["sent"] / rate if rate else None
        row["of_p50"] = row["predicted_ms"] / row["p50_ms"] if row["predicted_ms"] else None
    return result


def table(result: dict) -> str:
    what, rows = result["what"], result["rows"]
    spec, schedule = (max(len(row[key] or "") for row in rows) + 2 for key in ("spec", "schedule"))
    schedule = max(schedule, len("schedule") + 2)
    lines = [f"{'spec':{spec}}{'schedule':{schedule}}{'p50 ms':>8}{'p75':>8}{'p90':>8}{'of plain':>10}{'added ms':>10}{'exposed ms':>12}"
             f"{'sent MB':>9}{'floor ms':>10}{'predicted':>11}{'of p50':>8}{'memory MB':>11}"]
    for row in rows:
        lines.append(f"{row['spec']:{spec}}{row['schedule'] or '-':{schedule}}" + "".join(f"{row[f'p{p}_ms']:>8.1f}" for p in (50, 75, 90))
                     + f"{row['of_plain']:>10.3f}{row['added_ms']:>10.1f}" + cell(row["exposed_ms"], 12, 1) + f"{row['sent'] / 1e6:>9.3f}"
                     + cell(row["floor_ms"], 10, 1) + cell(row["predicted_ms"], 11, 1) + cell(row["of_p50"], 8, 3)
                     + cell(row["grown"] and row["grown"] / 1e6, 11, 1))
    lines.append(f"{what['model']} of width {what['width']}, {what['layers']} layers, batch {what['batch']}, {what['accumulate']} pass(es) a step, {what['optimizer']}, "
                 f"{training.STEPS} steps a round: " + steps.circumstances(what))
    return "\n".join(lines)


def charts(result: dict, marks: str) -> str:
    """A chart for every candidate, the longest of timeline.COLUMNS columns."""
    lines, column = [], max(row["period_ms"] for row in result["rows"]) / timeline.COLUMNS
    for row in result["rows"]:
        lines += ["", f"{row['spec']} {row['schedule'] or ''}".strip() + f": {row['period_ms']:.1f} ms from one backward to the next, rank 0"]
        lines += timeline.chart([(e["lane"], e["start_ms"], e["stop_ms"]) for e in row["events"]], row["period_ms"], column, marks)
    return "\n".join(lines)


def marks_for(encoding: str | None) -> str:
    """What a chart is drawn with where text is written in this encoding."""
    try:
        timeline.BLOCKS.encode(encoding or "ascii")
        return timeline.BLOCKS
    except UnicodeEncodeError:
        return timeline.ASCII


def serve(arguments: dict[str, Any]) -> None:
    """In a worker: measures, and hands over what `main` shows."""
    dist.init_process_group("gloo")
    rate, sizes = arguments["rate"], {key: arguments[key] for key in ("model", "width", "layers", "batch", "bucket_mb", "optimizer", "accumulate")}
    work = works.work(sizes["model"], sizes["width"], sizes["layers"], sizes["batch"])
    unshaped = partial(link.unshaped, rate) if rate else contextlib.nullcontext
    all_of_them = training.prepare(arguments["candidates"], work, sizes["optimizer"], sizes["bucket_mb"], sizes["accumulate"], unshaped)
    training.check(all_of_them)
    training.measure(all_of_them, arguments["rounds"])
    rows = [training.row(c) for c in all_of_them]
    training.check(all_of_them)
    plain = all_of_them[1].ddp
    launch.finish({"what": steps.what_was_measured(plain, arguments["rounds"], rate) | sizes, "rows": rows})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    serve(launch.worker_arguments())
