"""What communication costs in time: a DDP step over a slow link, with each spec, beside plain DDP and PyTorch's hooks.

    python -m commopt bench bandwidth --spec plain,int8,topk:ratio=0.01 --emulate 1gbit

A step is the forward and backward pass of a stack of linear layers on a small batch, another one each time.

"""

import argparse
from functools import partial

import torch
from torch import Tensor, nn

from . import launch, steps
from .candidates import EXTERNAL, check
from .steps import cell

__doc__ += steps.__doc__

BATCH = 8  # rows of input: few, so that a step is mostly communication


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", default="plain,torch:fp16,torch:powersgd1,none,int8,topk:ratio=0.01",
                        help=f"specs, separated by blanks or by commas before a name; beside ours: {', '.join(EXTERNAL)}; plain is always run")
    parser.add_argument("--emulate", metavar="RATE", help="over a link shaped to RATE per rank, such as 1gbit; needs root. Default: the loopback")
    parser.add_argument("--world", type=int, default=2, help="number of ranks")
    parser.add_argument("--size", type=_count, default=25_000_000, help="number of parameters, about; 25M")
    parser.add_argument("--width", type=int, default=1280, help="of a layer; 1280 makes four layers one bucket of 25 MiB")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every candidate")
    parser.add_argument("--timeout", type=float, help="seconds for everything; default: what plain DDP would take, and some more")


def main(args: argparse.Namespace) -> tuple[dict, str]:
    """The result, and the table that shows it."""
    specs = list(dict.fromkeys(["plain", *launch.split_specs(args.spec)]))
    check(specs)
    if args.world < 2 or args.rounds < 1 or args.size < 4096 or args.width < 64:
        raise ValueError(f"a bench needs at least 2 ranks, 1 round, 4096 parameters and layers 64 wide, got --world {args.world} "
                         f"--rounds {args.rounds} --size {args.size} --width {args.width}")
    arguments = {"specs": specs, "size": args.size, "width": args.width, "rounds": args.rounds, "rate": args.emulate,
                 "world": args.world, "timeout": args.timeout}
    result = steps.compare("commopt.bench.bandwidth", arguments, args.size, steps.link_of(args.world, args.emulate))
    return result, table(result)


def table(result: dict) -> str:
    width = max(len(row["spec"]) for row in result["rows"]) + 1
    lines = [f"{'spec':{width}}{'step ms':>9}{'added ms':>10}{'of plain':>10}{'floor ms':>10}{'sent MB':>9}{'counted MB':>12}"
             f"{'encode':>9}{'comm':>9}{'decode':>9}{'exposed ms':>12}{'error':>10}"]
    for row in result["rows"]:
        stats = "".join(cell(row["stats"].get(f"{key}_ms"), w, 1) for key, w in (("encode", 9), ("comm", 9), ("decode", 9), ("exposed", 12)))
        lines.append(f"{row['spec']:{width}}{row['step_ms']:>9.1f}{row['added_ms']:>10.1f}" + cell(row["of_plain"], 10, 3) + cell(row["floor_ms"], 10, 1)
                     + cell(row["sent"] / 1e6, 9, 3) + cell(row["counted"] and row["counted"] / 1e6, 12, 3) + stats + f"{row['error']:>10.1e}")
    return "\n".join([*lines, steps.circumstances(result["what"])])


def _count(text: str) -> int:
    """"25M" -> 25000000."""
    unit = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].upper())
    return int(float(text[:-1]) * unit) if unit else int(text)


class Stack(nn.Module):
    """Linear layers with tanh and a path around each, so that gradients have one scale at any depth."""

    def __init__(self, size: int, width: int):
        super().__init__()
        width = min(width, max(64, int((size / 8) ** 0.5)))  # a small model has eight layers too
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(max(1, round(size / (width * width + width)))))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.3 * torch.tanh(layer(x))
        return x.square().mean()


def work(size: int, width: int) -> steps.Work:
    model = partial(Stack, size, width)
    inputs = model().layers[0].in_features

    def batch(rank: int, number: int) -> Tensor:
        return torch.randn(BATCH, inputs, generator=torch.Generator().manual_seed(1000 * number + rank))

    return steps.Work(model, lambda ddp, x: ddp(x), batch)


def worker() -> None:
    arguments = launch.worker_arguments()
    steps.serve(work(arguments["size"], arguments["width"]), arguments)


if __name__ == "__main__":
    worker()
