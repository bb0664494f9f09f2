"""What each collective costs, and whether `commopt.tuning` knew: one bucket, exchanged again and again over a slow link.

    python -m commopt bench collectives --emulate 1gbit --world 4
    python -m commopt bench collectives --emulate 1gbit --world 4 --machine 2

    sent       bytes that a rank hands to the network in an exchange, as the collective says
    counted    bytes that leave its interface, or that of its machine, protocol headers included (with --emulate)
    rounds     how often it waits for the others
    passes     encoding, adding and decoding, in units of the time that copying the bucket takes
    floor      sent / rate (with --emulate)
    predicted  by commopt.tuning.cost, from the network as commopt.tuning.probe finds it and from the work on this machine,
               which all ranks measure at the same time
    measured   median over the rounds of the slowest rank, from the beginning to the mean
    of plain   measured, as a fraction of that of `none`

Every spec's mean is verified first, element by element, see wrong.py.
"""

import argparse
import contextlib
import statistics
from typing import NamedTuple

import torch
import torch.distributed as dist

import commopt
from commopt.collectives.link import Link
from commopt.hooks.agreement import nodes as hosts
from commopt.hooks.traffic import Traffic
from commopt.tuning import cost, probe
from commopt.tuning.probe import timed

from . import launch, link, wrong
from .exchange import Ours
from .steps import cell, kernels_in_use, link_of

SPECS = ("none,bf16,int8,int4,int8:collective=integer_sum,int4:collective=integer_sum,sign,topk:ratio=0.01,collective=gather,"
         "topk:ratio=0.01,collective=sparse_two_shot,powersgd:rank=4,intra=none,inter=bf16,intra=none,inter=int4")
WIDTH = 2560  # of a row of the bucket: a layer's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", default=SPECS, help="specs, separated by blanks or by commas before a name; none is always run")
    parser.add_argument("--emulate", metavar="RATE[,LATENCY]", help=link.EMULATE)
    parser.add_argument("--world", type=int, default=2, help="number of ranks")
    parser.add_argument("--machine", type=int, default=1, help="ranks on each machine, which share its link; a divisor of --world")
    parser.add_argument("--rows", type=int, default=2560, help=f"rows of {WIDTH} float32 in the bucket; 2560 make 25 MiB")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every spec")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for everything")


def main(args: argparse.Namespace) -> tuple[dict, str]:
    """The result, and the table that shows it."""
    specs = list(dict.fromkeys(["none", *launch.split_specs(args.spec)]))
    for spec in specs:
        commopt.parse(spec)
    if args.world < 2 or args.rounds < 1 or args.rows < 1 or args.machine < 1 or args.world % args.machine:
        raise ValueError(f"a bench needs at least 2 ranks, 1 round, 1 row and machines of a divisor of the ranks, got --world {args.world} "
                         f"--rounds {args.rounds} --rows {args.rows} --machine {args.machine}")
    network = link_of(args.world, args.emulate, args.machine)
    arguments = {"specs": specs, "rows": args.rows, "rounds": args.rounds, "rate": args.emulate, "machine": args.machine,
                 "uplinks": network.machines if network else []}
    result = launch.run("commopt.bench.collectives", arguments, args.world, timeout=args.timeout, link=network, machine=args.machine)
    for row in result["rows"]:
        row["of_plain"] = row["measured_ms"] / result["rows"][0]["measured_ms"]
        row["floor_ms"] = 8e3 * row["sent"] / link.bits_per_second(args.emulate) if args.emulate and args.machine == 1 else None
    return result, table(result)


def table(result: dict) -> str:
    width = max(len(row["spec"]) for row in result["rows"]) + 1
    lines = [f"{'spec':{width}}{'collective':>17}{'sent MB':>9}{'counted':>9}{'rounds':>8}{'passes':>8}{'floor ms':>10}{'predicted':>11}{'measured':>10}{'pred/meas':>11}{'of plain':>10}"]
    for row in result["rows"]:
        lines.append(f"{row['spec']:{width}}{row['collective']:>17}{row['sent'] / 1e6:>9.3f}" + cell(row["counted"] and row["counted"] / 1e6, 9, 3)
                     + f"{row['rounds']:>8}{row['passes']:>8.1f}" + cell(row["floor_ms"], 10, 1)
                     + f"{row['predicted_ms']:>11.1f}{row['measured_ms']:>10.1f}{row['predicted_ms'] / row['measured_ms']:>11.2f}{row['of_plain']:>10.3f}")
    what = result["what"]
    lines.append(f"a bucket of {what['elements'] * 4 / 2**20:.1f} MiB, {what['world']} ranks of {what['threads']} threads, {what['machine']} to a machine, {what['rounds']} rounds, link {what['link']}, "
                 f"found to have {1e3 * what['latency']:.2f} ms and {8e-6 * what['rate']:.0f} Mbit/s for a rank, kernels {what['kernels']}, torch {what['torch']}, commopt {what['commopt']}")
    return "\n".join(lines)


class Candidate(NamedTuple):
    """A spec's bucket, and what was measured of it on this rank."""

    bucket: Ours
    seconds: list[float]
    counted: list[int]


def worker() -> None:
    arguments = launch.worker_arguments()
    dist.init_process_group("gloo")
    rate, shape, machine = arguments["rate"], (arguments["rows"], WIDTH), arguments["machine"]
    group = dist.new_group(backend="gloo")

    def fail(error: Exception, where: str) -> None:
        traffic.alarm.post(error, where, 0)

    traffic = Traffic(None, fail)
    make = lambda rank, step: torch.randn(shape[0] * shape[1], generator=torch.Generator().manual_seed(1000 * step + rank))
    gradient, nodes = make(traffic.rank, 0), hosts(traffic.control)
    uplink = arguments["uplinks"][traffic.rank // machine] if arguments["uplinks"] else None
    count = lambda: 0 if not rate else link.counters(uplink, link.UPLINK)[0] if uplink else link.counters()[0]
    with link.unshaped(rate) if rate and not uplink else contextlib.nullcontext():
        candidates = []
        for spec in arguments["specs"]:
            launch.progress(f"{spec}: verifying")
            candidates.append(Candidate(Ours(spec, shape, torch.float32, gradient.device, traffic, nodes, whole=True), [], []))
            wrong.check(candidates[-1].bucket, wrong.Gradients(make, gradient.device, shape, nodes, group))
        dist.barrier()
    dist.barrier()
    everyone = Link(traffic.control, lambda error: None)
    alike = tuple(ranks[traffic.rank % machine] for ranks in nodes)  # one of each machine, all of which share its link
    near = probe(everyone.among(nodes[traffic.rank // machine]), group, 0) if machine > 1 else None
    far = probe(everyone.among(alike), group, 0) if len(nodes) > 1 else near
    predicted = {}
    for c in candidates:
        spec = c.bucket.spec
        launch.progress(f"{spec}: predicting")
        dist.barrier(group)  # all ranks work at the same time, as they will in the exchange
        predicted[spec] = cost(spec, shape, traffic.world, far, near=near, rank=traffic.rank, nodes=nodes)
    for turn in range(-1, arguments["rounds"]):  # the first uses up what the network lets through at once
        for c in candidates:
            launch.progress(f"round {turn + 1}/{arguments['rounds']}: {c.bucket.spec}")
            x, before = gradient.roll(turn), count()
            took = timed(lambda: c.bucket.exchange(x), group)
            dist.barrier(group)
            if turn >= 0:
                c.seconds.append(took)
                c.counted.append(count() - before)
    rows = [row(c, predicted[c.bucket.spec], bool(rate)) for c in candidates]
    what = {"elements": shape[0] * shape[1], "world": traffic.world, "machine": machine, "threads": torch.get_num_threads(), "rounds": arguments["rounds"], "link": rate or "loopback",
            "latency": far.latency, "rate": far.rate, "kernels": kernels_in_use(), "torch": torch.__version__, "commopt": commopt.__version__}
    launch.finish({"what": what, "rows": rows})
    dist.barrier()
    dist.destroy_process_group()


def row(c: Candidate, predicted, emulated: bool) -> dict:
    """What all ranks together found. Of bytes, work and times, those of the rank that has most."""
    mine = torch.tensor([*c.seconds, *c.counted, c.bucket.sent, predicted.seconds, predicted.passes, predicted.work], dtype=torch.float64)
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    rounds = len(c.seconds)
    sent, seconds, passes, work = mine[2 * rounds :].tolist()
    return {
        "spec": c.bucket.spec, "collective": c.bucket.collective, "sent": int(sent), "counted": statistics.median(mine[rounds : 2 * rounds].tolist()) if emulated else None,
        "rounds": predicted.rounds, "passes": passes, "work_ms": 1e3 * work, "predicted_ms": 1e3 * seconds,
        "measured_ms": 1e3 * statistics.median(mine[:rounds].tolist()), "times_ms": (1e3 * mine[:rounds]).tolist(),
    }


if __name__ == "__main__":
    worker()
