"""The C++ kernels against the reference, bit for bit: every op, dtype, awkward size, kind of values and instruction set."""

import itertools
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from op_cases import DTYPES, LARGE, SIZES, VALUES, difference, message_rows, run, values_of, variants

_C = pytest.importorskip("commopt._C", reason="the native kernels are not built")
from commopt.backends import cpu, reference  # noqa: E402

ISAS = _C.cpu.isas()
OPS = ("dense", "half", "quant", "shared", "ternary", "sign", "hadamard", "topk", "threshold", "blocktopk", "randomk")


@pytest.fixture(autouse=True)
def _restored():
    isa, threads = _C.cpu.isa(), torch.get_num_threads()
    yield
    _C.cpu.use_isa(isa)
    torch.set_num_threads(threads)


class Inside:
    """The ops of a backend with something set while one runs, and only then."""

    def __init__(self, kernels, enter, leave):
        self.kernels, self.enter, self.leave = kernels, enter, leave

    def __getattr__(self, name):
        def call(*args):
            self.enter()
            try:
                return getattr(self.kernels, name)(*args)
            finally:
                self.leave()

        return call


def with_threads(count: int) -> Inside:
    return Inside(cpu, lambda: torch.set_num_threads(count), lambda: torch.set_num_threads(1))


def same(op, n, kind, dtype, threads=(1,), **options) -> None:
    torch.set_num_threads(1)
    want = run(reference, op, n, kind, dtype, **options)
    for isa, count in itertools.product(ISAS, threads):
        _C.cpu.use_isa(isa)
        wrong = difference(want, run(with_threads(count) if count > 1 else cpu, op, n, kind, dtype, **options))
        assert not wrong, f"{op} n={n} {kind} {dtype} {options} {isa} {count} threads: {wrong}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_small(op, dtype):
    """Every size, option and kind of values; the other settings take turns, in cycles that share no factor."""
    offsets, scales, residuals = itertools.cycle((0, 1, 3)), itertools.cycle((1.0, 1024.0, 3.0, 1.0, 0.0078125)), itertools.cycle([True] * 6 + [False])
    for n in SIZES:
        for i, (options, kind) in enumerate(itertools.product(variants(op, n), VALUES)):
            if n > 257 and i % 3:
                continue
            same(op, n, kind, dtype, residual=next(residuals), offset=next(offsets), loss_scale=next(scales), **options)


@pytest.mark.parametrize("n", LARGE)
@pytest.mark.parametrize("op", OPS)
def test_large(op, n):
    """Sizes around a tile and such that several threads take part."""
    kinds, dtypes, scales = itertools.cycle(VALUES), itertools.cycle(DTYPES), itertools.cycle((1.0, 3.0))
    for options in variants(op, n):
        if options.get("block") in (64, 1024):
            continue
        for _ in range(4 if op == "topk" else 2):
            same(op, n, next(kinds), next(dtypes), threads=(1, 2, 3), loss_scale=next(scales), offset=1, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", (1, 3))
def test_rows(op, rows):
    for options in variants(op, 1000):
        same(op, 1000, "heavy", torch.float32, rows=rows, **options)


@pytest.mark.parametrize("block", (8, 24, 200, 2048, 65536))
def test_any_multiple_of_eight_is_a_block(block):
    for n in (1, 7, 199, 4096, 70_001):
        for bits, stochastic in itertools.product((8, 4, 2), (False, True)):
            same("quant", n, "heavy", torch.float32, threads=(1, 3), bits=bits, block=block, stochastic=stochastic)
        same("shared", n, "heavy", torch.float32, threads=(1, 3), levels=7, block=block, stochastic=n % 2 == 0)
        same("sign", n, "heavy", torch.float32, threads=(1, 3), block=block)
        same("half", n, "heavy", torch.float32, threads=(1, 3), block=block)


def topk_step(kernels, x, residual, k, workspace, loss_scale):
    values, index, starts = torch.zeros(k), torch.zeros(k, dtype=torch.int16), torch.zeros(-(-x.numel() // 65536), dtype=torch.int64)
    kernels.topk_encode(x, residual, torch.tensor([loss_scale]), values, index, starts, workspace)
    return {"residual": residual.clone(), "values": values, "index": index, "starts": starts}


# What the guess carried from step to step meets: steady, growing, shrinking and leaping gradients, zeros, and others.
COURSES = {
    "steady": [1.0] * 6,
    "growing": [1.0, 2.0, 8.0, 1e3, 1e9],
    "shrinking": [1.0, 0.5, 0.01, 1e-6, 1e-20, 1e-36],
    "leaping": [1.0, 1e-30, 1e30, 0.0, 1.0, 1e-40, 1.0],
}


@pytest.mark.parametrize("loss_scale", (1.0, 1024.0, 2.0**-20, 3.0, -4.0))
@pytest.mark.parametrize("course", COURSES)
def test_topk_does_not_depend_on_what_it_carries(course, loss_scale):
    n, k, kinds = 140_001, 1400, ("heavy", "few", "nan", "denormal", "mixed")
    for isa, threads, garbage, kind in zip(itertools.cycle(ISAS), (1, 3, 1, 2, 3), (0, 0, 255, 63, 1), kinds):
        _C.cpu.use_isa(isa)
        residuals = [torch.zeros(n), torch.zeros(n)]
        workspaces = [torch.zeros(0, dtype=torch.uint8), torch.full((cpu.topk_workspace(n, k),), garbage, dtype=torch.uint8)]
        for step, factor in enumerate(COURSES[course]):
            x = values_of(kind if step % 3 == 2 else "heavy", n, step) * factor
            want, got = (topk_step(m, x, r, k, w, loss_scale) for m, r, w in zip((reference, with_threads(threads)), residuals, workspaces))
            wrong = difference(want, got)
            assert not wrong, f"step {step} {isa} {threads} threads {kind}: {wrong}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_topk_decode_past_the_caches(isa, dtype):
    """An output so large that it is written past the caches, on and off the alignment that this needs; and entries out of order."""
    n, k, rows = 2**22 + 4_321, 30_000, 3
    _C.cpu.use_isa(isa)
    g = torch.Generator().manual_seed(5)
    values = torch.randn(rows, k, generator=g)
    index = torch.stack([torch.randperm(n, generator=g)[:k].sort().values for _ in range(rows)])
    starts = torch.stack([torch.searchsorted(i, torch.arange(0, n, 65536)) for i in index])
    index = (index & 0xFFFF).to(torch.int32).to(torch.int16)
    index[1, 5000:5200] = index[1, 5000:5200].flip(0)
    fields = {"values": values, "index": index, "starts": starts}
    message = message_rows(rows, {name: (field.shape[1], field.dtype) for name, field in fields.items()}, "cpu")
    for name, field in fields.items():
        message[name].copy_(field)
    for offset in (0, 1):
        want, got = (torch.empty(n + 1, dtype=dtype)[offset:][:n] for _ in range(2))
        for kernels, out in ((reference, want), (cpu, got)):
            kernels.topk_decode_sum(out, 1 / 3, *message.values())
        wrong = difference({"out": want}, {"out": got})
        assert not wrong, f"{isa}, offset {offset}: {wrong}"


def test_flushed_denormals_change_nothing():
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    torch.set_flush_denormal(False)

    def leave() -> None:
        restored = (torch.tensor([1e-40]) * 0.5).item() == 0.0
        torch.set_flush_denormal(False)
        assert restored, "the caller's setting was not restored"

    n = 150_000
    for op in OPS:
        options = next(iter(variants(op, n))) | ({"k": 1500} if op == "topk" else {}) | {"residual": False}  # it would swamp them
        want = run(reference, op, n, "denormal", torch.float32, **options)
        for isa, threads in itertools.product(ISAS, (1, 3)):
            _C.cpu.use_isa(isa)
            got = run(Inside(with_threads(threads), lambda: torch.set_flush_denormal(True), leave), op, n, "denormal", torch.float32, **options)
            wrong = difference(want, got)
            assert not wrong, f"{op} {isa} {threads} threads: {wrong}"


def test_callers_share_the_pool():
    """Four Python threads at once: one has the pool, the others work alone, and all get the same bits."""
    n, options = 400_000, {"bits": 8, "block": 256, "stochastic": True}
    want, wrong = run(reference, "quant", n, "heavy", torch.float32, **options), []

    def work() -> None:
        for _ in range(10):
            wrong.append(difference(want, run(with_threads(3), "quant", n, "heavy", torch.float32, **options)))

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert wrong == [""] * 40


FORKED = """
import os, signal, torch
import commopt._C as _C
n = 1 << 20
r, g = torch.zeros(n), torch.ones(n)
_C.cpu.axpy(r.data_ptr(), g.data_ptr(), n, 4)
child = os.fork()
if child == 0:
    signal.alarm(20)
    for _ in range(3):
        _C.cpu.axpy(r.data_ptr(), g.data_ptr(), n, 4)
    alone = len(os.listdir("/proc/self/task")) == 1
    os._exit(2 if alone else 0 if (r.numpy() == 4).all() else 1)
_, status = os.waitpid(child, 0)
_C.cpu.axpy(r.data_ptr(), g.data_ptr(), n, 4)
assert (r.numpy() == 2).all()
raise SystemExit(0 if status == 0 else f"the child ended with status {status}")
"""


def test_a_forked_child_has_threads_of_its_own():
    done = subprocess.run([os.sys.executable, "-c", FORKED], timeout=90, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", ("avx2", "avx512"))
def test_no_symbol_of_a_newer_instruction_set_is_shared(isa):
    """The linker keeps one copy of a weak symbol for everybody, perhaps the one that this machine cannot run."""
    path = Path(__file__).parents[1] / f"build/ninja/obj/kernels_{isa}.o"
    if not path.exists() or not shutil.which("nm"):
        pytest.skip(f"no {path.name} to look into")
    symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = {line.split()[-1]: line.split()[-2] for line in symbols}
    assert not {name for name, kind in kinds.items() if kind in "WwVvu"}
    assert [name for name, kind in kinds.items() if kind.isupper() and kind != "U"] == [f"_ZN7commopt3cpu{len(isa) + 6}table_{isa}E"]


def test_use_isa_names_the_known():
    with pytest.raises(ValueError, match="base"):
        _C.cpu.use_isa("neon")
    for isa in ISAS:
        _C.cpu.use_isa(isa)
        assert _C.cpu.isa() == isa
