"""How fast the CPU kernels are: against the memory (axpy, r += g) and against the same op written in torch.

    python -m commopt bench kernels [--n 16777216] [--dtype float32] [--ops int8,topk@1%] [--isas avx512] [--threads 1] [--json]

Every candidate is first compared with the reference, bit for bit. Then all run in turns on the same buffers, each turn
with another gradient. axpy reads a float32 gradient and reads and writes a residual, the least that error feedback can do.
of_axpy = t_axpy / t_op, from the best times of each and, in `median`, from the median of the turns. With one thread the
times are CPU times, which other processes hardly disturb; with more they are wall times. vs_torch = t_torch / t_op.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GRADIENTS = 4  # different ones, so that what top-k carries from step to step is put to work
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Op:
    """One row of the table. encode: with error feedback; decode: the mean of two rows."""

    method: str  # dense, half, quant, topk
    decode: bool = False
    bits: int = 8
    block: int = 256
    stochastic: bool = False
    share: float = 0.01


OPS = {
    "bf16": Op("dense"),
    "half": Op("half"),
    "int8": Op("quant"),
    "int4": Op("quant", bits=4),
    "int8 stochastic": Op("quant", stochastic=True),
    "int4 stochastic": Op("quant", bits=4, stochastic=True),
    "topk 1%": Op("topk"),
    "topk 0.1%": Op("topk", share=0.001),
    "bf16 decode": Op("dense", decode=True),
    "half decode": Op("half", decode=True),
    "int8 decode": Op("quant", decode=True),
    "int4 decode": Op("quant", decode=True, bits=4),
    "topk 1% decode": Op("topk", decode=True),
}


def gradients(n: int, dtype: torch.dtype, count: int, seed: int = 0) -> list[Tensor]:
    """Normal values whose scale changes from tile to tile, as it does from layer to layer."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(-(-n // 65536), generator=g)).repeat_interleave(65536)[:n]
    return [(torch.randn(n, generator=g) * scale).to(dtype) for _ in range(count)]


class Run:
    """One op with its tensors on one backend."""

    def __init__(self, kernels, op: Op, grads: list[Tensor], residual: Tensor, out: Tensor, rows: int = 2):
        self.kernels, self.op, self.grads, self.residual, self.out = kernels, op, grads, residual, out
        self.scale = torch.ones(1)
        n, blocks = out.numel(), -(-out.numel() // op.block)
        if op.method == "dense":
            shapes, self.extra = ((n, torch.bfloat16),), ()
        elif op.method == "half":
            shapes, self.extra = ((n, torch.float16), (blocks, torch.float32)), (op.block,)
        elif op.method == "quant":
            codes = (n, torch.int8) if op.bits == 8 else (-(-n // 2), torch.uint8)
            shapes, self.extra = (codes, (blocks, torch.float32)), (op.bits, op.block)
        else:
            k = max(1, int(n * op.share))
            shapes, self.extra = ((k, torch.float32), (k, torch.int16), (-(-n // 65536), torch.int64)), ()
            self.workspace = torch.zeros(kernels.topk_workspace(n, k), dtype=torch.uint8)
        sizes = [-(-count * dtype.itemsize // 64) * 64 for count, dtype in shapes]
        message = torch.zeros(rows, sum(sizes), dtype=torch.uint8)
        self.fields = [
            message[:, sum(sizes[:i]) :][:, : count * dtype.itemsize].view(dtype) for i, (count, dtype) in enumerate(shapes)
        ]

    def encode(self, turn: int, row: int = 0) -> None:
        x, fields = self.grads[turn % len(self.grads)], [field[row] for field in self.fields]
        if self.op.method == "quant":
            extra = (*self.extra, self.op.stochastic, (1, turn, row))
        else:
            extra = (self.workspace,) if self.op.method == "topk" else self.extra
        getattr(self.kernels, f"{self.op.method}_encode")(x, self.residual, self.scale, *fields, *extra)

    def decode(self) -> None:
        getattr(self.kernels, f"{self.op.method}_decode_sum")(self.out, 0.5, *self.fields, *self.extra)

    def __call__(self, turn: int) -> None:
        self.decode() if self.op.decode else self.encode(turn)


def verify(kernels, op: Op, dtype: torch.dtype, n: int = 200_003) -> None:
    """AssertionError unless three steps and a decode give the bits of the reference."""
    from commopt.backends import reference

    grads, results = gradients(n, dtype, 3), []
    for backend in (reference, kernels):
        run = Run(backend, op, grads, torch.zeros(n), torch.zeros(n, dtype=dtype))
        for turn in range(3):
            run.encode(turn, row=turn % 2)
        run.decode()
        results.append([run.residual, run.out, *run.fields])
    for want, got in zip(*results):
        assert torch.equal(want.contiguous().view(torch.uint8), got.contiguous().view(torch.uint8)), f"{op} differs from the reference"


def in_torch(op: Op, residual: Tensor, out: Tensor, run: Run) -> Callable[[Tensor], None] | None:
    """The same work as somebody writes it with torch, or None where there is no usual way."""
    if op.method == "topk" and not op.decode:
        k = run.fields[0].shape[1]

        def topk(x: Tensor) -> None:
            residual.add_(x)
            index = residual.abs().topk(k, sorted=False).indices
            residual[index]  # the values to send
            residual[index] = 0.0

        return topk
    if op.method == "quant" and not op.decode and not op.stochastic and out.numel() % op.block == 0:
        levels = 127.0 if op.bits == 8 else 7.0

        def quant(x: Tensor) -> None:
            residual.add_(x)
            blocks = residual.view(-1, op.block)
            scale = blocks.abs().amax(1, keepdim=True).div_(levels).clamp_min_(1e-30)
            q = blocks.div(scale).round_().clamp_(-levels, levels)
            codes = q.to(torch.int8)
            if op.bits == 4:
                codes[:, 0::2] + 8 | codes[:, 1::2] + 8 << 4
            blocks.sub_(q.mul_(scale))

        return quant
    if op.method == "topk":
        values, (_, index, starts) = run.fields[0], run.fields
        tiles = torch.arange(starts.shape[1]) * 65536
        counts = [torch.diff(s, append=torch.tensor([index.shape[1]])) for s in starts]
        places = [(i.to(torch.int64) & 0xFFFF) + tiles.repeat_interleave(c) for i, c in zip(index, counts)]

        def scatter(x: Tensor) -> None:
            out.zero_()
            for v, p in zip(values, places):
                out.index_add_(0, p, v.to(out.dtype))
            out.mul_(0.5)

        return scatter
    return None


def measure(ops=tuple(OPS), n: int = 1 << 24, dtype: torch.dtype = torch.float32, isas=None, threads=(1,), turns: int = 15,
            compare: bool = True) -> list[dict]:
    """One row per op, instruction set and thread count: a dict of what was run and what it took."""
    from commopt import _C
    from commopt.backends import cpu

    isas, before = isas or _C.cpu.isas()[-1:], (_C.cpu.isa(), torch.get_num_threads())
    rows = []
    try:
        for isa in isas:
            _C.cpu.use_isa(isa)
            for name in ops:
                verify(cpu, OPS[name], dtype)
        grads, residual, out = gradients(n, dtype, GRADIENTS), torch.zeros(n), torch.zeros(n, dtype=dtype)
        axpy_in = grads[0].float()
        for count in threads:
            torch.set_num_threads(count)
            clock = time.process_time if count == 1 else time.perf_counter
            for name in ops:
                run = Run(cpu, OPS[name], grads, residual, out)
                residual.zero_()
                for turn in range(32):  # fills both rows; top-k finds its threshold
                    run.encode(turn, row=turn % 2)
                candidates: dict[str, Callable[[int], None]] = {
                    "axpy": lambda turn: _C.cpu.axpy(residual.data_ptr(), axpy_in.data_ptr(), n, count)
                }
                for isa in isas:
                    candidates[isa] = run
                plain = in_torch(OPS[name], residual, out, run) if compare else None
                times: dict[str, list[float]] = {key: [] for key in candidates} | {"torch": []}
                for turn in range(turns):
                    for key, candidate in candidates.items():
                        if key == "axpy":
                            kept = residual.abs().max()  # noqa: F841  both find the residual in the same state of the caches
                        else:
                            _C.cpu.use_isa(key)
                        start = clock()
                        candidate(turn)
                        times[key].append(clock() - start)
                        if key == "axpy" and not OPS[name].decode:
                            residual.sub_(axpy_in)
                    if plain and turn % 5 == 0:
                        saved = residual.clone()
                        start = clock()
                        plain(grads[turn % GRADIENTS])
                        times["torch"].append(clock() - start)
                        residual.copy_(saved)
                for isa in isas:
                    best, axpy = min(times[isa]), min(times["axpy"])
                    ratios = [a / b for a, b in zip(times["axpy"], times[isa])]
                    rows.append({
                        "op": name, "n": n, "dtype": str(dtype)[6:], "isa": isa, "threads": count, "ns_per_value": best / n * 1e9,
                        "axpy_ns": axpy / n * 1e9, "of_axpy": axpy / best, "median": statistics.median(ratios),
                        "vs_torch": min(times["torch"]) / best if times["torch"] else None,
                        "spread": statistics.median(times[isa]) / best,
                    })
    finally:
        _C.cpu.use_isa(before[0])
        torch.set_num_threads(before[1])
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'op':<16}{'isa':<8}{'thr':>4}{'ns/value':>10}{'axpy':>8}{'of axpy':>9}{'median':>8}{'x torch':>9}{'spread':>8}"]
    for r in rows:
        torch_ratio = f"{r['vs_torch']:.1f}" if r["vs_torch"] else "-"
        lines.append(f"{r['op']:<16}{r['isa']:<8}{r['threads']:>4}{r['ns_per_value']:>10.3f}{r['axpy_ns']:>8.3f}{r['of_axpy']:>9.2f}"
                     f"{r['median']:>8.2f}{torch_ratio:>9}{r['spread']:>8.2f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="commopt bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1 << 24)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--ops", default=",".join(OPS), help="separated by commas: " + ", ".join(OPS))
    parser.add_argument("--isas", help="default: the best this machine has")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--no-torch", action="store_true", help="leave torch's own sequence out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    ops = args.ops.split(",")
    if unknown := [op for op in ops if op not in OPS]:
        parser.error(f"unknown op {unknown[0]!r}; known are {', '.join(OPS)}")
    isas = args.isas.split(",") if args.isas else None
    rows = measure(ops, args.n, DTYPES[args.dtype], isas, [int(t) for t in args.threads.split(",")], args.turns, not args.no_torch)
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
