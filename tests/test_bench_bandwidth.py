"""`python -m commopt bench bandwidth`: its numbers from outside, that no wrong mean is timed, and that it runs under torchrun."""

import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import commopt
from commopt.__main__ import main
from commopt.bench import bandwidth, exchange, launch, link, wrong
from commopt.hooks.traffic import Traffic

HERE = pathlib.Path(__file__).parent
SPECS = ["plain", "none", "int8", "topk:ratio=0.01,collective=gather", "powersgd:rank=2"]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """Workers find this file."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")])))


def measured(tmp_path, *options: str) -> dict:
    file = tmp_path / "out.json"
    assert main(["bench", "bandwidth", "-n", "3", "-w", "1", "--timeout", "50", "--json", str(file), *options]) == 0
    return json.loads(file.read_text())


def check_numbers(row: dict, world: int) -> None:
    """The formulas of bench/README.md."""
    seconds, around = 1e-6 * row["time_us"], 2 * (world - 1) / world
    assert row["time_us"] == pytest.approx(statistics.median(row["times_us"])) and row["min_us"] == pytest.approx(min(row["times_us"]))
    assert row["busbw_gbps"] == pytest.approx(row["wire_bytes"] / seconds / 1e9) == pytest.approx(row["algbw_gbps"] * around)
    assert row["effbw_gbps"] == pytest.approx(row["size_bytes"] / seconds / 1e9) and row["wrong"] == 0
    if row["spec"] in ("plain", "none"):
        assert row["algbw_gbps"] == pytest.approx(row["effbw_gbps"], rel=3e-3) and row["wire_bytes"] == pytest.approx(around * row["size_bytes"], abs=1)


def test_every_row_follows_from_its_time_and_bytes(tmp_path, capfd):
    result = measured(tmp_path, "--world", "3", "-b", "500", "-e", "1M", "-f", "33", "--dtype", "bf16", "--spec", " ".join(SPECS))
    rows = result["rows"]
    assert [(r["size_bytes"], r["spec"]) for r in rows] == [(size, spec) for size in (500, 16500, 544500) for spec in SPECS]
    for row in rows:
        check_numbers(row, 3)
        assert row["count"] == row["size_bytes"] // 2 and len(row["times_us"]) == 3 and row["floor_us"] is row["counted_bytes"] is None
        split = [row[key] for key in ("encode_us", "comm_us", "decode_us")]
        assert split == [None] * 3 if row["spec"] == "plain" else all(part > 0 for part in split), row
    large = {row["spec"]: row for row in rows[-5:]}
    assert [row["collective"] for row in rows[:5]] == ["all_reduce"] + ["sum"] * 4  # too small to compress
    assert [row["collective"] for row in large.values()] == ["all_reduce", "sum", "two_shot", "gather", "rounds"]
    assert large[SPECS[3]]["wire_bytes"] == 2 * commopt.wire_bytes("topk:ratio=0.01", 544500 // 2)
    assert large["int8"]["wire_bytes"] == pytest.approx(4 / 3 * commopt.wire_bytes("int8", 544500 // 2), rel=0.01)
    lines = capfd.readouterr().out.splitlines()
    assert [len(line.split()) for line in lines[2:-1]] == [18] * 15 and "3 ranks" in lines[-1] and "loopback" in lines[-1]
    assert lines[-4].split()[:6] == ["544500", "272250", "bf16", "avg", "int8", "two_shot"]


@pytest.mark.skipif(link.missing() is not None, reason=f"no emulated network here: {link.missing()}")
def test_an_emulated_link_carries_what_is_said(tmp_path):
    result = measured(tmp_path, "-b", "16K", "-e", "512K", "-f", "32", "--emulate", "100mbit", "--spec", "none,int4")
    for row in result["rows"]:
        check_numbers(row, 2)
        assert row["floor_us"] == pytest.approx(8 * row["wire_bytes"] / 100)
        assert row["wire_bytes"] < row["counted_bytes"] < 1.05 * row["wire_bytes"] + 4000
        if row["size_bytes"] > 16384:
            assert row["time_us"] > 0.7 * row["floor_us"]  # 16 KiB may leave at once


def test_counted_bytes_that_differ_are_an_error():
    row = dict.fromkeys(("time_us", "algbw_gbps", "busbw_gbps", "effbw_gbps", "min_us", "floor_us", "encode_us", "comm_us", "decode_us"), 1.0)
    row |= {"size_bytes": 2**20, "count": 2**18, "dtype": "float32", "redop": "avg", "spec": "none", "collective": "sum", "wrong": 0}
    what = dict.fromkeys(("world", "threads", "backend", "device", "iters", "warmup_iters", "link", "kernels", "torch", "commopt"), "?")
    for wire, counted, fine in ((2**20, 1.04 * 2**20, True), (2**20, 1.06 * 2**20, False), (2**20, 0.94 * 2**20, False), (2**16, 2**17, True)):
        result = {"what": what, "rows": [row | {"wire_bytes": wire, "counted_bytes": counted}]}
        if fine:
            bandwidth.check_counted(result)
        else:
            with pytest.raises(RuntimeError, match="(?s)1048576 .* none .*\nnone, 1048576 bytes: 1048576 bytes should leave a rank .* more than 5 % off"):
                bandwidth.check_counted(result)


def test_one_wrong_element_of_one_rank_ends_the_run(monkeypatch, capfd):
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda module, *arguments, **more: run("test_bench_bandwidth", *arguments, **more))
    monkeypatch.setenv("SPOIL", "int8 1")
    assert main(["bench", "bandwidth", "-b", "4K", "-e", "64K", "-f", "16", "-n", "1", "--timeout", "50", "--spec", "none,int8"]) == 1
    said = capfd.readouterr()
    assert said.out == "" and "65536 bytes: iteration" not in said.err and "4096 bytes, int8: verifying" in said.err
    assert "int8, 4096 bytes: rank 1: #wrong 1 of 1024 elements, the first at 7: " in said.err and "rank 0: #wrong" not in said.err


def test_what_is_wrong_on_all_ranks_alike_is_found_too():
    """Each kind of row has a check of its own; the last of these is a spec whose right mean is far from the exact one. And what
    is right but for its last bit is wrong where it differs between ranks."""
    said = launch.run("test_bench_bandwidth", {"judge": True}, 2, timeout=50)
    kinds = ("plain", "none", "int8", "topk:ratio=0.01", "ternary", "sign:ef=false")
    assert list(said) == [*(f"{kind} {how}" for kind in kinds for how in ("right", "off")), "int4 unlike"]
    assert re.fullmatch(r"int4, 40000 bytes: rank 1: #wrong 1 of 10000 elements, the first at 7: \S+ where rank 0 has \S+", said["int4 unlike"])
    for kind in kinds:
        assert said[f"{kind} right"] is None
        assert said[f"{kind} off"].startswith(f"{kind}, 40000 bytes: rank 0: #wrong 1 of 10000 elements, the first at 7: ")
        assert "; rank 1: #wrong 1 of 10000" in said[f"{kind} off"]


def test_torchrun_is_joined(tmp_path):
    file = tmp_path / "out.json"
    done = torchrun("-m", "commopt", "bench", "bandwidth", "-b", "8K", "-e", "64K", "-f", "8", "-n", "2", "-w", "1", "--backend", "gloo",
                    "--spec", "int8", "--timeout", "40", "--json", str(file))
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert [(r["size_bytes"], r["spec"]) for r in result["rows"]] == [(s, spec) for s in (8192, 65536) for spec in ("plain", "int8")]
    for row in result["rows"]:
        check_numbers(row, 2)
    assert len(done.stdout.splitlines()) == 7 and done.stdout.count("#wrong") == 1 and done.stdout.endswith("\n") and "as it is" in done.stdout


def test_a_wrong_element_ends_torchrun():
    done = torchrun(str(HERE / "test_bench_bandwidth.py"), "bench", "bandwidth", "-b", "4K", "-e", "4K", "-n", "1", "--backend", "gloo", "--spec", "int8",
                    "--timeout", "40", SPOIL="int8 0")
    assert done.returncode != 0 and done.stdout == "" and "int8, 4096 bytes: rank 0: #wrong 1 of 1024 elements, the first at 7: " in done.stderr


def torchrun(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """At its end none of its processes is left."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *command]
    process = subprocess.Popen(command, env=os.environ | environment, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it ends its ranks
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("options, words", [
    (["--emulate", "1gbit"], ["--emulate", "torchrun has started 2"]),
    (["--world", "2"], ["--world", "torchrun has started 2"]),
])
def test_under_torchrun_ranks_and_network_are_given(options, words, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", "bandwidth", *options]) == 2
    assert all(word in capsys.readouterr().err for word in words[:1]) and options


@pytest.mark.parametrize("options, words", [
    (["-b", "2"], ["one element", "--minbytes 2"]),
    (["-b", "64K", "-e", "1K"], ["--maxbytes 1024"]),
    (["-f", "1"], ["--stepfactor 1"]),
    (["-n", "0"], ["--iters 0"]),
    (["--emulate", "1gbit", "--backend", "nccl"], ["gloo", "nccl"]),
    (["--spec", "torch:fp16"], ["torch", "int8"]),
])
def test_mistakes_are_named(options, words, capsys):
    assert main(["bench", "bandwidth", *options]) == 2
    said = capsys.readouterr()
    assert all(word in said.err for word in words) and said.out == "", said.err


def test_sizes():
    assert [bandwidth.nbytes(text) for text in ("8", "64K", "1M", "32m", "1.5G")] == [8, 65536, 2**20, 2**25, 3 * 2**29]
    assert bandwidth.sizes(8, 100, 2.0, 4) == [8, 16, 32, 64] and bandwidth.sizes(10, 10, 2.0, 4) == [8]
    assert bandwidth.sizes(4, 10, 1.5, 4) == [4, 8] and bandwidth.sizes(2**20, 2**22, 4.0, 2) == [2**20, 2**22]
    assert [exchange.matrix(n) for n in (1, 6, 1024, 2**21, 10007, 3 * 2**10)] == [(1, 1), (2, 3), (32, 32), (1024, 2048), (1, 10007), (48, 64)]


def off(value: torch.Tensor) -> torch.Tensor:
    return value + 1e-3


def next_to(value: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(value, torch.tensor(9.0))


def spoil(kind: type, spec: str, rank: int | None, change=off) -> None:
    """From here on one element of what an exchange by the spec gives is wrong, on one rank or on all."""
    right = kind.exchange

    def exchange(self, x) -> None:
        right(self, x)
        if self.spec == spec and rank in (None, dist.get_rank()):
            x[7] = change(x[7])

    kind.exchange = exchange


def judge() -> dict[str, str | None]:
    dist.init_process_group("gloo")
    talk, traffic = dist.new_group(backend="gloo"), Traffic(None, lambda error, where: None)
    shape, cpu = exchange.matrix(10000), torch.device("cpu")
    make = lambda rank, step: torch.randn(10000, generator=torch.Generator().manual_seed(10 * step + rank))
    gradients, said = wrong.Gradients(make, cpu, shape, ((0, 1),), talk), {}
    for spec in ("plain", "none", "int8", "topk:ratio=0.01", "ternary", "sign:ef=false", "int4"):
        for how in ("right", "off") if spec != "int4" else ("unlike",):
            c = exchange.Plain(10000, torch.float32) if spec == "plain" else exchange.Ours(spec, shape, torch.float32, cpu, traffic, ((0, 1),))
            if how != "right":
                spoil(type(c), spec, *((None, off) if how == "off" else (1, next_to)))
            said[f"{spec} {how}"] = None
            try:
                wrong.check(c, gradients)
            except wrong.WrongMean as error:
                said[f"{spec} {how}"] = str(error)
    dist.barrier()
    traffic.stop()
    dist.destroy_process_group()
    return said


if __name__ == "__main__":
    if "SPOIL" in os.environ:
        spec, rank = os.environ["SPOIL"].split()
        spoil(exchange.Ours, spec, int(rank))
    if "--worker" not in sys.argv:  # under torchrun
        sys.exit(main(sys.argv[1:]))
    if launch.worker_arguments().get("judge"):
        launch.finish(judge())
    else:
        bandwidth.worker()
