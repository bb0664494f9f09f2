"""Starts the worker processes of a bench, one per rank, and brings home what rank 0 found.

A worker is a module that is run as `python -m MODULE --worker JOB`, with the environment that torchrun would give it:

    if __name__ == "__main__":
        arguments = launch.worker_arguments()
        ...
        launch.finish(result)  # rank 0's is what `run` returns
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .link import Link, sigterm_raises

_GRACE = 3.0  # seconds that the other ranks have to say what went wrong when one has failed


def run(module: str, arguments: dict[str, Any], world: int, *, timeout: float, link: Link | None = None, machine: int | None = None) -> dict[str, Any]:
    """Runs `module` as `world` processes and returns rank 0's result. Arguments and result travel as JSON.

    Rank 0's output goes to stderr as it comes: progress. That of the others is kept and shown when they fail.
    link: the emulated network they run on, made for this call unless the caller has entered it; by default the loopback.
    machine: how many ranks are to believe that they share one; by default those of the link, or all on the loopback.
    RuntimeError when a rank fails or `timeout` seconds are over; no process outlives the call.
    """
    with contextlib.ExitStack() as exits:
        directory = exits.enter_context(tempfile.TemporaryDirectory(prefix="commopt-"))
        exits.enter_context(sigterm_raises())
        if link and not link.entered:
            exits.enter_context(link)
        job = Path(directory, "job.json")
        job.write_text(json.dumps({"arguments": arguments, "result": str(Path(directory, "result.json"))}))
        network = link.environment() if link else _loopback()
        machine = machine or (link.machine if link else world)
        workers, outputs = [], [Path(directory, f"output-{rank}") for rank in range(world)]
        try:
            for rank in range(world):
                command = [sys.executable, "-m", module, "--worker", str(job)]
                environment = os.environ | network | {
                    "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % machine), "LOCAL_WORLD_SIZE": str(machine)}
                with outputs[rank].open("wb") as kept:
                    workers.append(subprocess.Popen(
                        link.command(rank, command) if link else command, env=environment, stdin=subprocess.DEVNULL,
                        stdout=2 if rank == 0 else kept, stderr=2 if rank == 0 else kept, start_new_session=True,
                    ))
            _watch(workers, outputs, module, timeout)
        finally:
            progress_ends()
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        result = Path(directory, "result.json")
        if not result.exists():
            raise RuntimeError(f"{module}: rank 0 ended without calling launch.finish")
        return json.loads(result.read_text())


def _watch(workers: list[subprocess.Popen], outputs: list[Path], module: str, timeout: float) -> None:
    """Returns when all workers have ended well."""
    deadline, failing = time.monotonic() + timeout, False
    while None in (statuses := [worker.poll() for worker in workers]) and time.monotonic() < deadline:
        if not failing and any(statuses):
            failing, deadline = True, time.monotonic() + _GRACE
        time.sleep(0.05)
    running = [rank for rank, worker in enumerate(workers) if worker.poll() is None]
    failed = [rank for rank, worker in enumerate(workers) if worker.returncode]
    if failed:
        said = "".join(f"\n--- rank {rank}, exit status {workers[rank].returncode} ---\n{_tail(outputs[rank])}" for rank in failed)
        raise RuntimeError(f"{module}: {len(failed)} of {len(workers)} ranks failed{said}")
    if running:
        said = "".join(f"\n--- rank {rank} ---\n{_tail(outputs[rank])}" for rank in running)
        raise RuntimeError(f"{module}: ranks {running} were still running after {timeout:.0f} s{said}")


def _tail(output: Path) -> str:
    return output.read_text(errors="replace")[-2000:].strip() or "(its output is above)"


def _loopback() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | ({"GLOO_SOCKET_IFNAME": name} if name else {})


def worker_arguments() -> dict[str, Any]:
    """In a worker: the arguments that `run` was called with. Divides the cores among the ranks."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not even a killed launcher leaves workers behind
    torch.set_num_threads(max(1, _cores() // int(os.environ["WORLD_SIZE"])))
    return _job()["arguments"]


def finish(result: Any) -> None:
    """In a worker: its result. Ranks other than 0 may call it with anything."""
    if os.environ["RANK"] == "0":
        path = Path(_job()["result"])
        path.with_suffix(".part").write_text(json.dumps(result))
        path.with_suffix(".part").rename(path)


def split_specs(text: str) -> list[str]:
    """"none,int4:block=64,ef=false topk" -> three specs. Blanks separate them, and commas unless a key follows; `intra=` begins one."""
    specs: list[str] = []
    for some in text.split():
        begins = True
        for item in filter(None, some.split(",")):
            key = item.split(":")[0].partition("=")  # of "inter=int4:block=64" too
            if not begins and key[1] and key[0] != "intra":
                specs[-1] += "," + item
            else:
                specs.append(item)
            begins = False
    if not specs:
        raise ValueError(f"at least one spec is needed, got {text!r}")
    return specs


def progress(text: str) -> None:
    """Shows what is going on, on stderr: in place on a terminal, elsewhere as a line. Rank 0 speaks, or a process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\r\033[K{text}" if sys.stderr.isatty() else text, end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def progress_ends() -> None:
    """What is printed next begins on a line of its own."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _job() -> dict[str, Any]:
    return json.loads(Path(sys.argv[sys.argv.index("--worker") + 1]).read_text())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
