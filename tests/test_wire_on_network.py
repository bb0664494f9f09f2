"""The bytes that a rank says it sends are those that leave its interface, counted by the kernel from outside, in network
namespaces of their own. Needs root, `ip` and `tc`."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commopt
from commopt.__main__ import main
from commopt.bench import launch, link

HERE = pathlib.Path(__file__).parent
ROWS, COLUMNS = 1024, 1024  # of the one weight: one bucket, whose halves and thirds begin where a part may
SPECS = ("none", "bf16", "fp16", "int8", "int4", "topk:ratio=0.01,warmup=0", "topk:ratio=0.001,values=int8,warmup=0")
STEPS = 4
HEADERS = 0.05  # TCP, IP and Ethernet, and the acknowledgements of what arrives
MESSAGES = 3000  # bytes a step: what gloo says about each message before it is sent, and the barrier

pytestmark = pytest.mark.skipif(link.missing() is not None, reason=f"no emulated network here: {link.missing()}")


@pytest.fixture(scope="module", params=[2, 3])
def measured(request):
    """world, and spec -> what each of its ranks said and what was counted, per step."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), before]))
    try:
        with link.Link(request.param, None) as network:
            return request.param, launch.run("test_wire_on_network", {}, request.param, timeout=90, link=network)
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.mark.parametrize("spec", SPECS)
def test_counted_bytes_are_those_of_stats(measured, spec):
    world, results = measured
    for rank, (said, counted) in enumerate(results[spec]):
        assert said <= counted <= said * (1 + HEADERS) + MESSAGES, f"rank {rank} of {world}: {said} said, {counted} counted"


@pytest.mark.parametrize("spec", SPECS)
def test_stats_are_what_wire_bytes_foretold(measured, spec):
    world, results = measured
    n, message = ROWS * COLUMNS, commopt.wire_bytes(spec, ROWS * COLUMNS)
    for said, _ in results[spec]:
        if spec.startswith("topk"):
            assert said == (world - 1) * message
        elif world == 2:
            assert said == message  # half of it to sum and half that was summed, or an all-reduce of n values
        else:
            assert said == pytest.approx(2 * (world - 1) / world * message, rel=0.01)
    assert results["int8"][0][0] * 3.9 < results["none"][0][0] < 4.001 * 2 * (world - 1) / world * n


def test_a_rate_holds():
    with link.Link(2, "80mbit") as network:
        sender = ["python3", "-c", "import socket; s = socket.create_connection(('10.77.0.2', 5000)); s.sendall(bytes(4_000_000)); s.shutdown(1); s.recv(1)"]
        sink = ("import socket, time; s = socket.create_server(('', 5000)); print(flush=True); c, _ = s.accept(); t = time.monotonic()\n"
                "while c.recv(1 << 16): pass\nprint(time.monotonic() - t)")
        with subprocess.Popen(network.command(1, [sys.executable, "-c", sink]), stdout=subprocess.PIPE, text=True) as receiver:
            receiver.stdout.readline()
            before = network.counters(0)[0]
            sender[0] = sys.executable
            subprocess.run(network.command(0, sender), check=True, timeout=30)
            seconds = float(receiver.stdout.readline())
        assert 4_000_000 <= network.counters(0)[0] - before < 4_400_000
        assert 0.4 < seconds < 1.0  # 32 Mbit and headers, less what may be sent at once


def test_between_machines_travels_what_is_compressed_once(tmp_path):
    """Two machines of two ranks, counted where they leave their machine: less by the number of ranks in a machine than what
    all ranks exchange with all, and less by the compressor's ratio."""
    file, specs = tmp_path / "out.json", ["bf16", "intra=none,inter=bf16", "intra=none,inter=int4"]
    assert main(["bench", "collectives", "--world", "4", "--machine", "2", "--emulate", "1gbit", "--rows", "512", "--rounds", "2", "--spec", " ".join(specs), "--json", str(file)]) == 0
    flat, half, quarter = (next(r["counted"] for r in json.loads(file.read_text())["rows"] if r["spec"] == spec) for spec in specs)
    n = 512 * 2560
    assert flat == pytest.approx(2 * (2 + 2) * n / 4 * 2, rel=0.02)  # each of 2 ranks: two shares across and its own sum twice, in bf16
    assert half == pytest.approx(flat / 2, rel=0.02)
    assert quarter == pytest.approx(flat / 2 * commopt.wire_bytes("int4", n) / (2 * n), rel=0.03)


def names() -> str:
    return subprocess.run([link._path("ip"), "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_nothing_is_left_behind():
    """Neither after an error nor after SIGTERM; what SIGKILL leaves, the next network removes."""
    with pytest.raises(ZeroDivisionError):
        with link.Link(2, "1gbit") as network:
            assert all(name in names() for name in network.namespaces)
            1 / 0
    assert not any(name in names() for name in network.namespaces)
    code = "import time; from commopt.bench.link import Link\nwith Link(2, None): print(flush=True); time.sleep(60)"
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
            holder.stdout.readline()
            assert f"commopt-{holder.pid}-0-1" in names()
            holder.send_signal(number)
        assert (f"commopt-{holder.pid}-" in names()) == (number == signal.SIGKILL)
    with link.Link(2, None):
        assert f"commopt-{holder.pid}-" not in names()


def count(spec: str) -> tuple[float, float]:
    """Bytes per step of this rank: what its handle says, and what has left its interface."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(nn.Linear(COLUMNS, ROWS, bias=False))
    handle = commopt.attach(ddp, spec, start_step=0)
    x = torch.randn(4, COLUMNS)
    for _ in range(2):  # DDP rebuilds its buckets after the first
        ddp(x).square().mean().backward()
    handle.reset_stats()
    counted = []
    for _ in range(STEPS):
        dist.barrier()
        before = link.counters()[0]
        ddp(x).square().mean().backward()
        dist.barrier()  # everything has been received, so everything has been sent
        counted.append(link.counters()[0] - before)
    # The least of the steps: on a busy machine TCP now and then sends again what was only late.
    return handle.stats()["bytes_wire"] / STEPS, min(counted)


if __name__ == "__main__":
    launch.worker_arguments()
    dist.init_process_group("gloo")
    results = {}
    for spec in SPECS:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, count(spec))
        results[spec] = everyone
    launch.finish(results)
    dist.barrier()
    dist.destroy_process_group()
