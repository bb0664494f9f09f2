"""How fast the CPU kernels are: against the memory (axpy, r += g) and against the same op written in torch.

    python -m commopt bench kernels --ops "int8,topk 1%" --isas avx2,avx512

Every candidate is first compared with the reference, bit for bit. Then all run in turns on the same buffers, each turn
with another gradient, after 32 turns that are not timed. With one thread the times are CPU times, which other processes
disturb little; with more they are wall times.

    ns/value  the best turn
    axpy      the same of r += g, which reads a float32 gradient and reads and writes a residual: the least that error feedback
              can do. It prefetches too, from the distance that serves it best
    of axpy   the best axpy as a fraction of the best turn
    median    the same of the turns, each with its own axpy
    x torch   the best time of the op as one writes it in torch, over the best turn
    worst     the slowest turn over the median turn

`topk rising` times the first steps of error feedback on gradients that resemble each other, whose k-th largest magnitude
grows from step to step, so that the last one does not foretell the next: here `worst` shows whether one had to begin again.
Of each step the best of three sequences counts.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import commopt

GRADIENTS = 4  # different ones, so that what top-k carries from step to step is put to work
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Op:
    """One row of the table. encode: with error feedback; decode: the mean of `rows` rows."""

    method: str  # dense, half, float, quant, ternary, sign, hadamard, topk, blocktopk, randomk
    decode: bool = False
    bits: int = 8
    block: int = 256
    stochastic: bool = False
    share: float = 0.01
    rows: int = 2  # of a decode
    rising: bool = False  # from the first step on, on gradients that resemble each other
    element: str = "e4m3"
    scaling: str = "float32"


OPS = {
    "bf16": Op("dense"),
    "half": Op("half"),
    "fp8": Op("float"),
    "fp8 stochastic": Op("float", stochastic=True),
    "mxfp8": Op("float", scaling="e8m0", block=32),
    "mxfp4": Op("float", element="e2m1", scaling="e8m0", block=32),
    "nvfp4": Op("float", element="e2m1", scaling="e4m3", block=16),
    "natural": Op("float", element="power", scaling="e8m0", stochastic=True),
    "int8": Op("quant"),
    "int4": Op("quant", bits=4),
    "int8 stochastic": Op("quant", stochastic=True),
    "int4 stochastic": Op("quant", bits=4, stochastic=True),
    "int2": Op("quant", bits=2, block=64),
    "int2 stochastic": Op("quant", bits=2, block=64, stochastic=True),
    "ternary": Op("ternary", block=320, stochastic=True),
    "ternary nearest": Op("ternary", block=320),
    "sign": Op("sign", block=1024),
    "hadamard": Op("hadamard", rows=1),
    "topk 1%": Op("topk"),
    "topk 0.1%": Op("topk", share=0.001),
    "topk rising": Op("topk", rising=True),
    "blocktopk 1%": Op("blocktopk"),
    "randomk 1%": Op("randomk"),
    "bf16 decode": Op("dense", decode=True),
    "half decode": Op("half", decode=True),
    "fp8 decode": Op("float", decode=True),
    "mxfp8 decode": Op("float", decode=True, scaling="e8m0", block=32),
    "mxfp4 decode": Op("float", decode=True, element="e2m1", scaling="e8m0", block=32),
    "nvfp4 decode": Op("float", decode=True, element="e2m1", scaling="e4m3", block=16),
    "natural decode": Op("float", decode=True, element="power", scaling="e8m0"),
    "int8 decode": Op("quant", decode=True),
    "int4 decode": Op("quant", decode=True, bits=4),
    "int2 decode": Op("quant", decode=True, bits=2, block=64),
    "ternary decode": Op("ternary", decode=True, block=320),
    "sign decode": Op("sign", decode=True, block=1024),
    "hadamard decode": Op("hadamard", decode=True, rows=1),
    "topk 1% decode": Op("topk", decode=True),
    "topk 1% of 4": Op("topk", decode=True, rows=4),
    "blocktopk of 4": Op("blocktopk", decode=True, rows=4),
    "randomk of 4": Op("randomk", decode=True, rows=4),
}


def gradients(n: int, dtype: torch.dtype, count: int, seed: int = 0) -> list[Tensor]:
    """Normal values whose scale changes from tile to tile, as it does from layer to layer."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(-(-n // 65536), generator=g)).repeat_interleave(65536)[:n]
    return [(torch.randn(n, generator=g) * scale).to(dtype) for _ in range(count)]


def alike(n: int, dtype: torch.dtype, count: int, seed: int = 0) -> list[Tensor]:
    """Normal values of one scale, each two of the gradients with a correlation of 0.9."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, generator=g).mul_(0.9**0.5)
    return [torch.randn(n, generator=g).mul_(0.1**0.5).add_(shared).to(dtype) for _ in range(count)]


class Run:
    """One op with its tensors on one backend."""

    def __init__(self, kernels, op: Op, grads: list[Tensor], residual: Tensor, out: Tensor):
        self.kernels, self.op, self.grads, self.residual, self.out = kernels, op, grads, residual, out
        self.scale = torch.ones(1)
        n, blocks = out.numel(), -(-out.numel() // op.block)
        if op.method == "dense":
            shapes, self.extra = ((n, torch.bfloat16),), ()
        elif op.method == "half":
            shapes, self.extra = ((n, torch.float16), (blocks, torch.float32)), (op.block,)
        elif op.method == "float":
            codes = (-(-n // 2) if op.element == "e2m1" else n, torch.uint8)
            shapes = (codes, (blocks, torch.float32 if op.scaling == "float32" else torch.uint8))
            self.extra = (None, op.element, op.scaling, op.block)
            if op.scaling == "e4m3":  # under one scale for all
                shapes, self.extra = (*shapes, (1, torch.float32)), self.extra[1:]
        elif op.method == "quant":
            codes = (n, torch.int8) if op.bits == 8 else (-(-n * op.bits // 8), torch.uint8)
            shapes, self.extra = (codes, (blocks, torch.float32)), (op.bits, op.block)
        elif op.method == "ternary":
            shapes, self.extra = ((blocks * (op.block // 5), torch.uint8), (blocks, torch.float32)), (op.block,)
        elif op.method == "sign":
            shapes, self.extra = ((-(-n // 8), torch.uint8), (blocks, torch.float32)), (op.block,)
        elif op.method == "hadamard":  # its output is no message: one of it is enough
            shapes, self.extra = ((n, torch.float32),), ()
        elif op.method == "blocktopk":
            k = round(1024 * op.share)
            count = n // 1024 * k + -(-(n % 1024) * k // 1024)
            shapes, self.extra = ((count, torch.float32), (count, torch.int16)), (k,)
        elif op.method == "randomk":
            shapes, self.extra = ((max(1, int(n * op.share)), torch.float32),), ((1, 2, 3),)
        else:
            k = max(1, int(n * op.share))
            shapes, self.extra = ((k, torch.float32), (k, torch.int16), (-(-n // 65536), torch.int64)), ()
            self.workspace = torch.zeros(kernels.topk_workspace(n, k), dtype=torch.uint8)
        sizes = [-(-count * dtype.itemsize // 64) * 64 for count, dtype in shapes]
        message = torch.zeros(op.rows, sum(sizes), dtype=torch.uint8)
        self.fields = [
            message[:, sum(sizes[:i]) :][:, : count * dtype.itemsize].view(dtype) for i, (count, dtype) in enumerate(shapes)
        ]

    def restart(self) -> None:
        """Forgets all earlier steps."""
        self.residual.zero_()
        if self.op.method == "topk":
            self.workspace.zero_()

    def encode(self, turn: int, row: int = 0) -> None:
        x, fields = self.grads[turn % len(self.grads)], [field[row] for field in self.fields]
        if self.op.scaling == "e4m3":
            self.kernels.absmax(x, self.residual, self.scale, fields[-1], 448.0 * 6.0)
        if self.op.method in ("quant", "ternary", "float"):
            extra = (*self.extra, self.op.stochastic, (1, turn, row))
        elif self.op.method == "randomk":
            extra = (False, *self.extra)
        else:
            extra = (self.workspace,) if self.op.method == "topk" else self.extra
        getattr(self.kernels, f"{self.op.method}_encode")(x, self.residual, self.scale, *fields, *extra)

    def decode(self) -> None:
        if self.op.method == "hadamard":
            return self.kernels.hadamard_decode(self.out, 0.5, self.fields[0][0])
        getattr(self.kernels, f"{self.op.method}_decode_sum")(self.out, 1 / self.op.rows, *self.fields, *self.extra)

    def __call__(self, turn: int) -> None:
        self.decode() if self.op.decode else self.encode(turn)


def verify(kernels, op: Op, dtype: torch.dtype, n: int = 200_003) -> None:
    """AssertionError unless three steps and a decode give the bits of the reference."""
    from commopt.backends import reference

    grads, results = gradients(n, dtype, 3), []
    for backend in (reference, kernels):
        run = Run(backend, op, grads, torch.zeros(n), torch.zeros(n, dtype=dtype))
        for turn in range(3):
            run.encode(turn, row=turn % op.rows)
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
            out.mul_(1 / run.op.rows)

        return scatter
    return None


def time_turns(run: Run, isas: list[str], threads: int, turns: int, plain: Callable[[Tensor], None] | None) -> dict[str, list[float]]:
    """Seconds of every turn of axpy, of the op with each instruction set and of torch's way, which is slow and runs in every fifth."""
    from commopt import _C

    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {key: [] for key in ("axpy", *isas, "torch")}

    def timed(key: str, body: Callable[[], None]) -> None:
        start = clock()
        body()
        times[key].append(clock() - start)

    residual, grads = run.residual, run.grads
    for turn in range(turns):
        added = grads[(turn + 2) % len(grads)].float()  # not the one that the op is about to read from memory
        residual.abs().max()  # all find the residual in the same state of the caches
        timed("axpy", lambda: _C.cpu.axpy(residual.data_ptr(), added.data_ptr(), residual.numel(), threads))
        residual.sub_(added)
        for isa in isas:
            _C.cpu.use_isa(isa)
            timed(isa, lambda: run(turn))
        if plain and turn % 5 == 0:
            saved = residual.clone()
            timed("torch", lambda: plain(grads[turn % len(grads)]))
            residual.copy_(saved)
    return times


def time_op(run: Run, isas: list[str], threads: int, turns: int, compare: bool) -> dict[str, list[float]]:
    """As time_turns: of the steady state or, for a rising op, of the first steps."""
    if not run.op.rising:
        run.restart()
        for turn in range(32):  # fills all rows; top-k finds its threshold
            run.encode(turn, row=turn % run.op.rows)
        return time_turns(run, isas, threads, turns, in_torch(run.op, run.residual, run.out, run) if compare else None)
    best: dict[str, list[float]] = {"torch": []}
    for isa in isas * 3:
        run.restart()
        for key, found in time_turns(run, [isa], threads, turns, None).items():
            best[key] = [min(pair) for pair in zip(best.get(key, found), found)]
    return best


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
        residual, out = torch.zeros(n), torch.zeros(n, dtype=dtype)
        inputs = {rising: (alike if rising else gradients)(n, dtype, GRADIENTS) for rising in {OPS[name].rising for name in ops}}
        for count in threads:
            torch.set_num_threads(count)
            for name in ops:
                times = time_op(Run(cpu, OPS[name], inputs[OPS[name].rising], residual, out), isas, count, turns, compare)
                for isa in isas:
                    best, axpy, median = min(times[isa]), min(times["axpy"]), statistics.median(times[isa])
                    rows.append({
                        "op": name, "n": n, "dtype": str(dtype)[6:], "isa": isa, "threads": count, "ns_per_value": best / n * 1e9,
                        "axpy_ns": axpy / n * 1e9, "of_axpy": axpy / best,
                        "median": statistics.median(a / b for a, b in zip(times["axpy"], times[isa])),
                        "vs_torch": min(times["torch"]) / best if times["torch"] else None, "worst": max(times[isa]) / median,
                    })
    finally:
        _C.cpu.use_isa(before[0])
        torch.set_num_threads(before[1])
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"{'op':<16}{'isa':<8}{'threads':>8}{'ns/value':>10}{'axpy':>8}{'of axpy':>9}{'median':>8}{'x torch':>9}{'worst':>8}"]
    for r in rows:
        torch_ratio = f"{r['vs_torch']:.1f}" if r["vs_torch"] else "-"
        lines.append(f"{r['op']:<16}{r['isa']:<8}{r['threads']:>8}{r['ns_per_value']:>10.3f}{r['axpy_ns']:>8.3f}{r['of_axpy']:>9.2f}"
                     f"{r['median']:>8.2f}{torch_ratio:>9}{r['worst']:>8.2f}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=1 << 24, help="elements of the gradient; 16777216")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the gradient")
    parser.add_argument("--ops", default=",".join(OPS), help="separated by commas: " + ", ".join(OPS).replace("%", "%%"))
    parser.add_argument("--isas", help="instruction sets, separated by commas; default: the best this machine has")
    parser.add_argument("--threads", default="1", help="thread counts, separated by commas")
    parser.add_argument("--turns", type=int, default=15, help="of every op")
    parser.add_argument("--no-torch", action="store_true", help="leave torch's own way out")


def main(args: argparse.Namespace) -> tuple[dict, str]:
    """The result, and the table that shows it."""
    ops, threads = args.ops.split(","), [int(t) for t in args.threads.split(",")]
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"--ops: unknown op {unknown[0]!r}; known are {', '.join(OPS)}")
    if args.n < 1 or args.turns < 1 or min(threads) < 1:
        raise ValueError(f"a bench needs at least 1 element, 1 turn and 1 thread, got --n {args.n} --turns {args.turns} --threads {args.threads}")
    rows = measure(ops, args.n, DTYPES[args.dtype], args.isas.split(",") if args.isas else None, threads, args.turns, not args.no_torch)
    what = {"torch": torch.__version__, "commopt": commopt.__version__, "machine": platform.machine()}
    return {"what": what, "rows": rows}, table(rows)
