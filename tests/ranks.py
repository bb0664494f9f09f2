"""Runs a test body on several ranks: real processes, real gloo, each test in fresh ones.

The processes are forked from a server that has imported torch once, so that a group costs a fraction of a second. A test
has a time limit; when it is over, or a rank fails, the others are ended and the ranks that failed tell where.
"""

import contextlib
import datetime
import faulthandler
import gc
import importlib
import inspect
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

HERE = pathlib.Path(__file__).parent
for path in (str(HERE), str(HERE.parent)):  # for the fork server and for scripts
    if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = path + os.pathsep + os.environ.get("PYTHONPATH", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # large tensors go back to the system when freed: resident memory is what is held

_context = multiprocessing.get_context("forkserver")
_SLOW_TO_IMPORT = ["torch", "torch.distributed", "torch._dynamo", "torch._inductor", "torch.onnx", "pytest", "numpy"]
_context.set_forkserver_preload(_SLOW_TO_IMPORT)


def each_rank(*worlds: int, seconds: float = 60, timeout: float = 30):
    """Decorates body(rank, world, ...), which becomes a test that runs on all ranks of each world size.

    seconds: its time limit. timeout: the process group's."""

    def decorate(body):
        def test(world, **given):
            run(world, test, seconds=seconds, timeout=timeout, **given)

        signature = inspect.signature(body)
        test.__signature__ = signature.replace(parameters=[p for n, p in signature.parameters.items() if n != "rank"])
        test.__name__, test.__qualname__, test.__module__, test.__doc__ = body.__name__, body.__qualname__, body.__module__, body.__doc__
        test.body = body
        return pytest.mark.parametrize("world", worlds)(test)

    return decorate


def run(world: int, test, *, seconds: float = 60, timeout: float = 30, lost: tuple[int, ...] = (), **given) -> list:
    """What test.body (or test itself) returned on each rank. AssertionError with the tracebacks of those where it failed.

    lost: the ranks that will not answer, because the test ends or stops them."""
    port, deadline = free_port(), time.monotonic() + seconds
    ranks, stacks = [], tempfile.TemporaryDirectory()
    for rank in range(world):
        ours, theirs = _context.Pipe()
        arguments = (rank, world, port, timeout, test, given, theirs, f"{stacks.name}/{rank}")
        process = _context.Process(target=_work, args=arguments)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    answers: dict[int, tuple[bool, object]] = {}
    try:
        silent = _collect(ranks, answers, [rank for rank in range(world) if rank not in lost], deadline)
    finally:
        for process, pipe in ranks:
            pipe.close()
            process.kill()
            process.join(10)
    failed = [f"--- rank {rank} of {world}:\n{said}" for rank, (fine, said) in answers.items() if not fine]
    for rank in silent:
        stack = pathlib.Path(f"{stacks.name}/{rank}")
        failed.append(f"--- rank {rank} of {world} had not ended after {seconds} s, or 3 s after another failed:\n"
                      + (stack.read_text() if stack.exists() else ""))
    if failed:
        raise AssertionError("\n".join(failed))
    return [answers[rank][1] for rank in range(world) if rank in answers]


def _collect(ranks: list, answers: dict[int, tuple[bool, object]], expected: list[int], deadline: float) -> list[int]:
    """Fills answers in; returns the ranks that gave none, which have written their stacks to their files."""
    while len(answers) < len(expected) and time.monotonic() < deadline:
        waiting = {ranks[rank][1]: rank for rank in expected if rank not in answers}
        for pipe in multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic())):
            try:
                answers[waiting[pipe]] = pipe.recv()
            except EOFError:
                ranks[waiting[pipe]][0].join(5)
                answers[waiting[pipe]] = (False, f"ended with exit code {ranks[waiting[pipe]][0].exitcode}")
            if not answers[waiting[pipe]][0]:
                deadline = min(deadline, time.monotonic() + 3)  # the others may wait for it in vain
    silent = [rank for rank in expected if rank not in answers]
    for rank in silent:
        os.kill(ranks[rank][0].pid, signal.SIGUSR1)
    if silent:
        time.sleep(0.3)
    return silent


def _work(rank: int, world: int, port: int, timeout: float, test, given: dict, pipe, stack: str) -> None:
    gc.freeze()  # of everything imported: what looks through all objects need not look at these
    log = open(stack, "w")
    faulthandler.register(signal.SIGUSR1, file=log)
    torch.set_num_threads(1)
    try:
        start(rank, world, port, timeout)
        answer = (True, getattr(test, "body", test)(rank, world, **given))
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        pipe.send(answer)
        pipe.recv()  # stays until all have answered: a rank that leaves breaks the connections of the others
    except EOFError:
        pass
    os._exit(0)


def start(rank: int, world: int, port: int, timeout: float = 30) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
                            timeout=datetime.timedelta(seconds=timeout))


def free_port() -> int:
    """A port that nobody uses, below those that the system hands out: of these, one could be taken before it is listened at."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


# --- how processes end ---


class Ending(NamedTuple):
    """Of a process: its exit code, its seconds, and what it said."""

    code: int
    seconds: float
    said: str


def endings(module: str, ways: list[str], seconds: float = 120) -> list[dict[str, Ending]]:
    """On each of two ranks: a way to end -> what became of a process whose script is module.train_and_exit(rank, 2, port, way). Each is
    forked from one that has imported what takes long, and ends as an interpreter does."""
    ports = {way: free_port() for way in ways}
    code = f"import ranks; ranks._fork_each({module!r}, RANK, {ports!r})"
    running = [subprocess.Popen([sys.executable, "-c", code.replace("RANK", str(rank))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        answers = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in running), answers
    return [{way: Ending(*ended) for way, ended in json.loads(out.splitlines()[-1]).items()} for out, _ in answers]


def _fork_each(module: str, rank: int, ports: dict[str, int]) -> None:
    for name in _SLOW_TO_IMPORT:
        importlib.import_module(name)
    script, ended = importlib.import_module(module).train_and_exit, {}
    for way, port in ports.items():
        begin = time.monotonic()
        with tempfile.TemporaryFile("w+") as said:
            if (child := os.fork()) == 0:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                return script(rank, 2, port, way)
            _, status = os.waitpid(child, 0)
            said.seek(0)
            ended[way] = Ending(os.waitstatus_to_exitcode(status), time.monotonic() - begin, said.read())
    print(json.dumps(ended), flush=True)


# --- what the bodies check with ---


def same(got: Tensor, want: Tensor, what: str = "") -> None:
    """Bit for bit."""
    assert got.shape == want.shape and got.dtype == want.dtype, f"{what}: {got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}"
    got, want = got.detach().contiguous().view(-1), want.detach().contiguous().view(-1)
    different = (got.view(torch.uint8) != want.view(torch.uint8)).view(got.numel(), got.element_size()).any(1).nonzero()
    if different.numel():
        i = int(different[0])
        bits = [t[i : i + 1].view(torch.uint8).flip(0).numpy().tobytes().hex() for t in (got, want)]
        raise AssertionError(f"{what}: {different.numel()} of {got.numel()} differ, first at {i}: "
                             f"{got[i].item()!r} ({bits[0]}), not {want[i].item()!r} ({bits[1]})")


def close(got: Tensor, want: Tensor, bound: Tensor | float, what: str = "") -> None:
    """|got - want| <= bound everywhere, in float64."""
    error = (got.detach().double() - want.detach().double()).abs().view(-1)
    bound = torch.as_tensor(bound, dtype=torch.float64).expand_as(got).reshape(-1)
    wrong = (~(error <= bound)).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        raise AssertionError(f"{what}: {wrong.numel()} of {error.numel()} differ by more than the bound, first at {i}: {got.reshape(-1)[i].item()!r} "
                             f"not {want.reshape(-1)[i].item()!r} within {bound[i].item():.3g}; largest error {error.max().item():.3g}")


def flat(tensors) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def same_everywhere(tensors, what: str = "") -> None:
    """All ranks hold the same bits; one all-gather of everything."""
    mine = torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    for rank, other in enumerate(everyone):
        assert torch.equal(other, mine), f"{what}: {int((other != mine).sum())} bytes differ between rank {rank} and this one"


def total(tensors) -> Tensor:
    """The sum over ranks, float64, of all values in a row."""
    mine = flat(t.double() for t in tensors)
    dist.all_reduce(mine)
    return mine


class Given(nn.Module):
    """A model whose gradient is what it is given: grad of parameter i = given[i], to the last bit."""

    def __init__(self, *shapes, dtype: torch.dtype | list = torch.float32):
        super().__init__()
        dtypes = dtype if isinstance(dtype, list) else [dtype] * len(shapes)
        self.w = nn.ParameterList(nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(shapes, dtypes))

    def forward(self, given):
        return sum((p * g).sum().double() for p, g in zip(self.w, given) if g is not None)

    def random(self, rank: int, step: int, scale: float = 1.0) -> list[Tensor]:
        """Gradients of that rank and step."""
        g = torch.Generator().manual_seed(7919 * step + rank)
        return [(scale * torch.randn(p.shape, generator=g)).to(p.dtype) for p in self.w]


class Mixed(nn.Module):
    """All kinds of parameters: convolution, embedding, norm, prime sizes, one element, none, no dimension, a frozen one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(53, 31)
        self.norm = nn.LayerNorm(31)
        self.conv = nn.Conv2d(1, 41, (5, 7))
        self.fc1 = nn.Linear(41, 131)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.one = nn.Parameter(torch.ones(1, 1))
        self.frozen = nn.Linear(131, 131)
        self.frozen.requires_grad_(False)
        self.fc2 = nn.Linear(131, 37)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens))  # [batch, 12, 31]
        x = self.conv(x.unsqueeze(1)).amax((2, 3))
        x = self.frozen(torch.relu(self.fc1(x))) * self.scale + self.one
        return self.fc2(torch.tanh(x)) + self.empty.sum()


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, 53, (6, 12), generator=g), torch.randint(0, 37, (6,), generator=g)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    tokens, targets = batch(rank, step)
    return nn.functional.cross_entropy(model(tokens), targets)


def conserved(handle, parameters: list[tuple[str, Tensor]], means: list[Tensor], before: dict[str, Tensor], what: str = "") -> dict[str, Tensor]:
    """Sent plus kept is what there was, for each parameter: averaged gradient + mean residual = mean gradient + mean
    residual before. Up to float32's rounding, and to that of the gradient's dtype. Returns the mean residual now."""
    now = handle.state_dict()["residual"]
    for (name, p), mean in zip(parameters, means):
        r0, r1 = (r.get(name, torch.zeros(p.numel())).double().view(p.shape) for r in (before, now))
        unit = {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-15}[p.dtype]
        size = mean.abs().max() + r0.abs().max() if p.numel() else torch.tensor(0.0)
        close(p.grad.double() + r1, mean.double() + r0, unit * p.grad.abs().double() + 1e-6 * size, f"{what} {name}")
    return now


def raised(function, *args) -> Exception | None:
    try:
        function(*args)
    except Exception as error:
        return error
    return None


def slow(seconds: float = 0.002) -> None:
    """From now on whatever this process waits for on the network comes that much later, and nothing travels together: no
    exchange is over by the end of the backward that began it."""
    from commopt.collectives.run import Clock
    from commopt.hooks import traffic

    traffic.WORTH, wait = 0, Clock.wait

    def wait_longer(self, pending):
        time.sleep(seconds)
        return wait(self, pending)

    Clock.wait = wait_longer
