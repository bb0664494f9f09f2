"""The bandwidth of an exchange, as nccl-tests shows it: gradients of many sizes, averaged by each spec and by the backend's own
all-reduce, verified and then timed.

    python -m commopt bench bandwidth -b 64K -e 16M -f 4 --emulate 1gbit
    torchrun --nproc-per-node 2 -m commopt bench bandwidth -b 1M -e 64M -f 4

Alone it starts its own ranks, on the loopback or an emulated network. Under torchrun it joins the group, on GPUs with NCCL where
there are any, and rank 0 shows the result. `plain` is the backend's all-reduce; a spec may choose its collective, as
topk:ratio=0.01,collective=gather does, and a column says which one has run. Small gradients, which are not compressed, have `sum`.

With n ranks, S the bytes of the gradient and W those that a rank hands to the network in one exchange, by the collective's own
account and of the rank that has most:

    size, count  S, and elements; sizes are powers of 1024, as K, M and G say
    time         median over the iterations of the slowest rank's time, from a beginning together to the mean; min: the least
    algbw        W n / (2 (n - 1)) / time: size / time of an uncompressed all-reduce that would send as many bytes
    busbw        algbw 2 (n - 1) / n = W / time: what a rank sends in a second, to be compared with its link. `plain` and `none` send
                 W = 2 (n - 1) / n S, so that both are as nccl-tests has them
    #wrong       elements of the mean that are not what they must be, on any rank; with one of them nothing is timed, and the exit
                 status is 1. wrong.py says what they must be
    effbw        S / time: what of the gradient is averaged in a second, whatever travels for it
    wire         W; of `plain` that of a ring
    counted      bytes that leave the interface in an exchange, protocol headers included (with --emulate), the least of the
                 iterations. From 256 KiB of W on 5 % between the two is an error; below, headers and greetings are more
    floor        W / rate (with --emulate)
    encode, comm, decode
                 medians of the slowest rank's time in phases that end with rows on their way, of rows under way, and after the
                 last, as in handle.stats(); they overlap, with each other and between ranks. Not of a GPU

"""

import argparse
import contextlib
import datetime
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import commopt
from commopt.hooks.agreement import nodes as hosts
from commopt.hooks.traffic import Traffic
from commopt.tuning.probe import timed

from . import launch, link, wrong
from .exchange import Ours, Plain, matrix
from .steps import cell, kernels_in_use, link_of

SPECS = "plain,none,bf16,int8,int4,topk:ratio=0.01,powersgd:rank=4"
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ("gloo", "nccl")
COUNTED_FROM = 256 << 10  # bytes that a rank sends, from which on headers and the bench's own talk are a small part of what is counted
HEADERS = 0.05
LARGEST = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", default=SPECS, help="specs, separated by blanks or by commas before a name, and plain, which is always run")
    parser.add_argument("-b", "--minbytes", type=nbytes, default=64 << 10, metavar="SIZE", help="least size of the gradient, such as 8, 64K, 1M; default 64K")
    parser.add_argument("-e", "--maxbytes", type=nbytes, metavar="SIZE", help="greatest size; default 16M, or -b where that is more")
    parser.add_argument("-f", "--stepfactor", type=float, default=4.0, metavar="FACTOR", help="from one size to the next")
    parser.add_argument("-n", "--iters", type=int, default=20, help="timed exchanges of each spec and size")
    parser.add_argument("-w", "--warmup_iters", type=int, default=5, help="exchanges before these, not timed")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the gradient")
    parser.add_argument("--backend", choices=BACKENDS, help="default: gloo; under torchrun nccl where each rank has a GPU")
    parser.add_argument("--emulate", metavar="RATE[,LATENCY]", help=link.EMULATE)
    parser.add_argument("--world", type=int, help="number of ranks that are started; default 2")
    parser.add_argument("--timeout", type=float, help="seconds for everything; default: by the sizes and the rate")


def main(args: argparse.Namespace) -> tuple[dict, str] | None:
    """The result and the table that shows it. None on a rank of torchrun's that has nothing to show."""
    specs = list(dict.fromkeys(["plain", *launch.split_specs(args.spec)]))
    for spec in specs[1:]:
        commopt.parse(spec)
    joins = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)
    if joins and (args.emulate or args.world):
        raise ValueError("--emulate and --world are for ranks that this bench starts itself: torchrun has started "
                         f"{os.environ['WORLD_SIZE']} of them, on the network that there is")
    if args.emulate and args.backend == "nccl":
        raise ValueError("--emulate shapes what gloo sends: --backend must be gloo, got nccl")
    all_sizes = sizes(args.minbytes, max(args.minbytes, LARGEST) if args.maxbytes is None else args.maxbytes, args.stepfactor, DTYPES[args.dtype].itemsize)
    world = int(os.environ["WORLD_SIZE"]) if joins else 2 if args.world is None else args.world
    if world < 2 or args.iters < 1 or args.warmup_iters < 0:
        raise ValueError(f"a bench needs at least 2 ranks and 1 iteration, got --world {world} --iters {args.iters} --warmup_iters {args.warmup_iters}")
    network = None if joins else link_of(world, args.emulate)
    timeout = args.timeout or time_limit(all_sizes, len(specs) * (args.iters + args.warmup_iters + 2), args.emulate)
    arguments = {"specs": specs, "sizes": all_sizes, "dtype": args.dtype, "iters": args.iters, "warmup": args.warmup_iters, "rate": args.emulate,
                 "backend": args.backend or ("nccl" if joins and gpu_for_each_rank() else "gloo"), "timeout": timeout, "joined": joins}
    if joins:
        result = measure(arguments)
        return (result, table(result)) if os.environ["RANK"] == "0" else None
    result = launch.run("commopt.bench.bandwidth", arguments, world, timeout=timeout, link=network)
    if "wrong" in result:
        raise RuntimeError(result["wrong"])
    if args.emulate:
        check_counted(result)
    return result, table(result)


def nbytes(text: str) -> int:
    """"64K" -> 65536."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(float(text[:-1]) * unit) if unit else int(text)


def sizes(least: int, most: int, factor: float, itemsize: int) -> list[int]:
    """In bytes, whole elements."""
    if least < itemsize or most < least or factor <= 1:
        raise ValueError(f"sizes must be from one element up and grow, got --minbytes {least} --maxbytes {most} --stepfactor {factor}")
    found, size = [], float(least)
    while size <= most:
        found.append(int(size) // itemsize * itemsize)
        size *= factor
    return list(dict.fromkeys(found))


def time_limit(all_sizes: list[int], exchanges: int, emulate: str | None) -> float:
    """Seconds, if each of as many exchanges of every size took twice what an all-reduce among many does."""
    rate = link.bits_per_second(emulate) / 8 if emulate else 100e6
    return 120 + exchanges * sum(0.1 + 4 * size / rate for size in all_sizes)


def gpu_for_each_rank() -> bool:
    return dist.is_nccl_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 0


def check_counted(result: dict) -> None:
    """RuntimeError unless what the interfaces count is what the collectives say."""
    for row in result["rows"]:
        if row["wire_bytes"] >= COUNTED_FROM and not abs(row["counted_bytes"] / row["wire_bytes"] - 1) <= HEADERS:
            raise RuntimeError(f"{table(result)}\n{row['spec']}, {row['size_bytes']} bytes: {row['wire_bytes']} bytes should leave a rank in an exchange, "
                               f"and its interface has counted {row['counted_bytes']}, more than {100 * HEADERS:.0f} % off")


def table(result: dict) -> str:
    spec, collective = (max(len(row[key]) for row in result["rows"]) + 2 for key in ("spec", "collective"))
    lines = [f"{'size':>12}{'count':>12}  {'type':9}{'redop':7}{'spec':{spec}}{'collective':{collective}}{'time':>10}{'algbw':>9}{'busbw':>9}{'#wrong':>8}{'effbw':>9}"
             f"{'min':>10}{'wire':>12}{'counted':>12}{'floor':>10}{'encode':>10}{'comm':>10}{'decode':>10}",
             f"{'(B)':>12}{'(elements)':>12}{'':18}{'':{spec}}{'':{collective}}{'(us)':>10}{'(GB/s)':>9}{'(GB/s)':>9}{'':>8}{'(GB/s)':>9}"
             f"{'(us)':>10}{'(B)':>12}{'(B)':>12}{'(us)':>10}{'(us)':>10}{'(us)':>10}{'(us)':>10}"]
    for row in result["rows"]:
        lines.append(f"{row['size_bytes']:>12}{row['count']:>12}  {row['dtype']:9}{row['redop']:7}{row['spec']:{spec}}{row['collective']:{collective}}{row['time_us']:>10.1f}"
                     f"{row['algbw_gbps']:>9.4f}{row['busbw_gbps']:>9.4f}{row['wrong']:>8}{row['effbw_gbps']:>9.4f}{row['min_us']:>10.1f}{row['wire_bytes']:>12}"
                     + cell(row["counted_bytes"], 12, 0) + "".join(cell(row[key], 10, 1) for key in ("floor_us", "encode_us", "comm_us", "decode_us")))
    what = result["what"]
    lines.append(f"{what['world']} ranks of {what['threads']} threads, {what['backend']} on {what['device']}, {what['iters']} iterations after {what['warmup_iters']}, "
                 f"link {what['link']}, kernels {what['kernels']}, torch {what['torch']}, commopt {what['commopt']}")
    return "\n".join(lines)


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank of a group that is made here and ended: the result, the same on all. WrongMean before anything wrong is timed."""
    cuda = arguments["backend"] == "nccl"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(arguments["backend"], timeout=datetime.timedelta(seconds=arguments["timeout"]))
    talk = dist.new_group(backend="gloo")
    traffic = Traffic(None, lambda error, where: traffic.alarm.post(error, where, 0))
    try:
        rows = [row for size in arguments["sizes"] for row in one_size(size, arguments, device, traffic, talk)]
        dist.barrier(talk)
    finally:
        traffic.stop()
        dist.destroy_process_group()
    what = {"world": traffic.world, "backend": arguments["backend"], "device": torch.cuda.get_device_name() if cuda else "cpu", "threads": torch.get_num_threads(),
            "iters": arguments["iters"], "warmup_iters": arguments["warmup"], "link": arguments["rate"] or ("as it is" if arguments["joined"] else "loopback"),
            "kernels": kernels_in_use(device.type), "torch": torch.__version__, "commopt": commopt.__version__}
    return {"what": what, "rows": rows}


def one_size(size: int, arguments: dict[str, Any], device: torch.device, traffic: Traffic, talk: dist.ProcessGroup) -> list[dict]:
    """A row for each spec: verified at full speed, then timed in turns."""
    dtype, rate = DTYPES[arguments["dtype"]], arguments["rate"]
    count = size // dtype.itemsize
    shape, nodes = matrix(count), hosts(traffic.control)

    def gradient(rank: int, step: int) -> torch.Tensor:
        return torch.randn(count, generator=torch.Generator().manual_seed(1000 * step + rank)).to(dtype)

    with link.unshaped(rate) if rate else contextlib.nullcontext():
        candidates = []
        for spec in arguments["specs"]:
            launch.progress(f"{size} bytes, {spec}: verifying")
            candidates.append(Plain(count, dtype) if spec == "plain" else Ours(spec, shape, dtype, device, traffic, nodes))
            wrong.check(candidates[-1], wrong.Gradients(gradient, device, shape, nodes, talk))
        dist.barrier(talk)
    dist.barrier(talk)
    times = in_turns(candidates, gradient(traffic.rank, 0).to(device), arguments, (lambda: link.counters()[0]) if rate else None, talk)
    rows = [row(c, times[c.spec], size, arguments, talk) for c in candidates]
    traffic.free()
    return rows


def in_turns(
    candidates: list[Ours | Plain], gradient: torch.Tensor, arguments: dict[str, Any], counted: Callable[[], int] | None, talk: dist.ProcessGroup
) -> dict[str, list[list[float]]]:
    """Spec -> of each timed exchange on this rank: seconds, bytes counted, and seconds of encode, comm and decode."""
    times: dict[str, list[list[float]]] = {c.spec: [] for c in candidates}
    for turn in range(-arguments["warmup"], arguments["iters"]):
        launch.progress(f"{gradient.nbytes} bytes: iteration {turn + 1}/{arguments['iters']}")
        for c in candidates:
            x = gradient.roll(turn)

            def exchange() -> None:
                c.exchange(x)
                if x.is_cuda:
                    torch.cuda.synchronize()

            before = counted() if counted else 0
            took = timed(exchange, talk)
            dist.barrier(talk)  # what the others wait for has left this rank's socket
            sent = counted() - before if counted else 0
            if turn >= 0:
                times[c.spec].append([took, sent, *(c.split() or (0.0, 0.0, 0.0))])
            if turn == arguments["iters"] - 1:
                wrong.check_same(c.spec, x.cpu(), talk)
    return times


def row(c: Ours | Plain, mine: list[list[float]], size: int, arguments: dict[str, Any], talk: dist.ProcessGroup) -> dict[str, Any]:
    """What all ranks together found: of each time the slowest rank's, of bytes those of the rank that sends most."""
    most = torch.tensor(mine, dtype=torch.float64)  # [iterations, 5]
    bytes_ = torch.tensor([c.sent, float(most[:, 1].min())], dtype=torch.float64)  # TCP now and then sends again what was only late
    dist.all_reduce(most, dist.ReduceOp.MAX, talk)
    dist.all_reduce(bytes_, dist.ReduceOp.MAX, talk)
    world, dtype, rate = dist.get_world_size(), DTYPES[arguments["dtype"]], arguments["rate"]
    seconds, _, *split = (statistics.median(column) for column in most.T.tolist())
    wire, counted = map(int, bytes_.tolist())
    around = 2 * (world - 1) / world  # what an all-reduce sends of each byte, at least
    micro = [1e6 * part for part in split] if c.split() else [None] * 3
    return {
        "size_bytes": size, "count": size // dtype.itemsize, "dtype": arguments["dtype"], "redop": "avg", "spec": c.spec, "collective": c.collective,
        "time_us": 1e6 * seconds, "algbw_gbps": wire / around / seconds / 1e9, "busbw_gbps": wire / seconds / 1e9, "wrong": 0,
        "effbw_gbps": size / seconds / 1e9, "min_us": 1e6 * float(most[:, 0].min()), "wire_bytes": wire, "counted_bytes": counted if rate else None,
        "floor_us": 8e6 * wire / link.bits_per_second(rate) if rate else None, "encode_us": micro[0], "comm_us": micro[1], "decode_us": micro[2],
        "times_us": (1e6 * most[:, 0]).tolist(),
    }


def worker() -> None:
    try:
        result = measure(launch.worker_arguments())
    except wrong.WrongMean as error:
        result = {"wrong": str(error)}
    launch.finish(result)


if __name__ == "__main__":
    worker()
