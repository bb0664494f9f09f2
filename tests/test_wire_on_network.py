"""The bytes that a rank says it sends are those that leave its interface, counted by the kernel from outside, in network
namespaces of their own. Needs root, `ip` and `tc`."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

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
        before = network.counters(0)[0]
        seconds = transfer(network, 0, 1, 4_000_000)
        assert 4_000_000 <= network.counters(0)[0] - before < 4_200_000  # packets are counted as TCP makes them, larger than they travel
    assert 0.4 < seconds < 1.0  # 32 Mbit and headers, less what may be sent at once


@pytest.mark.parametrize("emulate, machine, milliseconds, megabytes", [("100mbit,1ms", 1, 1, 3), ("1gbit,5ms", 1, 5, 0), ("100mbit,1ms", 2, 1, 0)])
def test_a_latency_holds_both_ways(emulate, machine, milliseconds, megabytes):
    """The rate too, within 10 % of what is left by headers. Ranks of one machine are near each other."""
    with link.Link(2 * machine, emulate, machine) as network:
        assert 2 * milliseconds <= 1e3 * round_trip(network, 0, machine) < 2 * milliseconds + 1.0
        if machine > 1:
            assert 1e3 * round_trip(network, 0, 1) < milliseconds
        if megabytes:
            seconds = transfer(network, 0, 1, int(1e6 * megabytes))
            assert 0.86 < 8 * megabytes / seconds / 100 < 1.02, f"{8 * megabytes / seconds:.1f} Mbit/s"


SINK = """import socket, time
s = socket.create_server(("", 5000)); print(flush=True); c, _ = s.accept(); c.setsockopt(6, 1, 1); t = time.monotonic()
while d := c.recv(1 << 16):
    if len(d) == 1: c.send(d)
print(time.monotonic() - t)"""
SEND = "import socket; s = socket.create_connection((%r, 5000)); s.sendall(bytes(%d)); s.shutdown(1); s.recv(1)"
ASK = """import socket, time
s, least = socket.create_connection((%r, 5000)), []; s.setsockopt(6, 1, 1)
for _ in range(30): t = time.perf_counter(); s.send(b"x"); s.recv(1); least.append(time.perf_counter() - t)
print(min(least))"""


def transfer(network, source: int, target: int, nbytes: int) -> float:
    """Seconds from the first connection to the last byte."""
    return float(talk(network, source, target, SEND % (link._address(target), nbytes))[0])


def round_trip(network, source: int, target: int) -> float:
    """The least of 30 by TCP, in seconds: how long a busy machine takes to wake a process is not the network's."""
    return float(talk(network, source, target, ASK % link._address(target))[1])


def talk(network, source: int, target: int, code: str) -> tuple[str, str]:
    """What the sink prints, and the other."""
    with subprocess.Popen(network.command(target, [sys.executable, "-c", SINK]), stdout=subprocess.PIPE, text=True) as receiver:
        try:
            receiver.stdout.readline()
            said = subprocess.run(network.command(source, [sys.executable, "-c", code]), check=True, timeout=30, stdout=subprocess.PIPE, text=True).stdout
            return receiver.stdout.readline(), said
        finally:
            receiver.kill()


@pytest.mark.parametrize("text, rate, late", [("100mbit", 1e8, 0.0), ("1gbit,1ms", 1e9, 1e-3), (" .5 Gbit/s , 250us", 5e8, 2.5e-4), ("10kbit,2s", 1e4, 2.0)])
def test_links_are_read(text, rate, late):
    assert (link.bits_per_second(text), link.latency(text)) == (pytest.approx(rate), pytest.approx(late))


@pytest.mark.parametrize("text", ["fast", "1gbit,", "1gbit,1", "1gbit,-1ms", "1gbit,ms", "1ms", "0mbit", "1gbit,1ms,2ms", ""])
def test_a_wrong_link_is_told_the_right_form(text):
    with pytest.raises(ValueError, match="RATE,LATENCY: .*like 100mbit or 1gbit,1ms, got"):
        link.Link(2, text)


def test_what_a_switch_in_user_space_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(link, "_has_netem", lambda namespace: False)
    with pytest.raises(RuntimeError, match="with a latency it keeps up with 2gbit, got 10gbit,1ms.*sch_netem"):
        link.Link(2, "10gbit,1ms").__enter__()
    monkeypatch.setattr(link.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the switch that adds a latency failed.*/dev/net/tun"):
        link.Link(2, "1gbit,1ms").__enter__()
    assert f"commopt-{os.getpid()}-" not in names()


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


@pytest.mark.parametrize("emulate", ["1gbit", "1gbit,1ms"])
def test_nothing_is_left_behind(emulate, monkeypatch):
    """Neither after an error nor after SIGTERM; what SIGKILL leaves, the next network removes. No process stays in any case."""
    monkeypatch.setattr(link, "_has_netem", lambda namespace: False)
    with pytest.raises(ZeroDivisionError):
        with link.Link(2, emulate) as network:
            assert all(name in names() for name in network.namespaces)
            assert len(switches(os.getpid())) == (2 if "," in emulate else 0)
            1 / 0
    assert not any(name in names() for name in network.namespaces)
    code = f"import time; from commopt.bench.link import Link\nwith Link(2, {emulate!r}): print(flush=True); time.sleep(60)"
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
            holder.stdout.readline()
            assert f"commopt-{holder.pid}-0-1" in names()
            holder.send_signal(number)
        assert (f"commopt-{holder.pid}-" in names()) == (number == signal.SIGKILL)
        deadline = time.monotonic() + 10
        while switches(holder.pid) or switches(os.getpid()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with link.Link(2, None):
        assert f"commopt-{holder.pid}-" not in names()


def switches(parent: int) -> list[str]:
    """The processes of switches that a process has made."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if f"switch.py {parent} " in line]


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
