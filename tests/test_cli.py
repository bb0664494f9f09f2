"""`python -m commopt`: what it prints, what it returns, and that a bench of it is not fooled by a wrong mean."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

import commopt
from commopt import backends
from commopt.__main__ import DTYPES, main
from commopt.bench import launch, steps, works

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def workers(monkeypatch):
    """This file can be started as a worker."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")])))


def output(capsys, *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def refused(capsys, *argv: str) -> str:
    """What is said on stderr, and nothing else, about a mistake of the caller."""
    try:
        status = main(list(argv))
    except SystemExit as ended:  # argparse
        status = ended.code
    said = capsys.readouterr()
    assert status == 2 and said.out == "" and "Traceback" not in said.err
    return said.err


def test_info_tells_what_is_built(capsys):
    text, found = output(capsys, "info"), json.loads(output(capsys, "info", "--json", "-"))
    assert found["commopt"] == commopt.__version__ and found["torch"] == torch.__version__ and found["gloo"]
    assert set(found["ops"]["cpu"]) == set(backends.OPS) == set(found["ops"]["cuda"])
    assert found["ops"]["cpu"] == backends.owners("cpu")
    assert found["cpu"]["isa"] in found["cpu"]["isas"] and found["cpu"]["isa"] in text
    assert ("CPU-only build" in text and "nvcc" in text) == (found["cuda"] is None)
    for op in backends.OPS:
        assert f"\n{op}" in text


def test_info_shows_what_the_reference_serves(capsys, monkeypatch):
    monkeypatch.setenv("COMMOPT_BACKEND", "reference")
    found = json.loads(output(capsys, "info", "--json", "-"))
    assert set(found["ops"]["cpu"].values()) == {"reference"}
    assert any("COMMOPT_BACKEND=reference" in w for w in found["warnings"])
    assert any("the reference" in w and "topk_encode" in w for w in found["warnings"])


def test_info_as_a_process_names_a_wrong_override():
    done = subprocess.run([sys.executable, "-m", "commopt", "info"], env=os.environ | {"COMMOPT_ISA": "mmx"}, cwd=HERE.parent,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "mmx" in done.stdout and "avx2" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [*commopt.compressors(), "int8:block=64", "topk:ratio=0.001,values=int8", "topk:ratio=1.0"])
def test_wire_shows_every_byte(spec, dtype, capsys):
    for n in (0, 1, 300, 70_000):
        layout = json.loads(output(capsys, "wire", spec, str(n), "--dtype", dtype, "--json", "-"))
        assert layout["total"] == commopt.wire_bytes(spec, n, DTYPES[dtype])
        ends = [f["offset"] + f["bytes"] for f in layout["fields"]]
        following = [f["offset"] for f in layout["fields"][1:]] + [layout["total"]]
        assert all(0 <= start - end < 16 for end, start in zip(ends, following))
        assert all(f["bytes"] == f["count"] * getattr(torch, f["dtype"]).itemsize for f in layout["fields"])
        assert layout["ratio"] == (pytest.approx(4 * n / layout["total"]) if n else 1.0)


def test_wire_of_the_example_in_wire_py(capsys, tmp_path):
    text = output(capsys, "wire", "int8", "300", "--json", str(tmp_path / "layout.json"))
    layout = json.loads((tmp_path / "layout.json").read_text())
    assert [(f["name"], f["offset"], f["bytes"]) for f in layout["fields"]] == [("codes", 0, 300), ("scales", 304, 8)]
    assert layout["total"] == 320 and layout["ratio"] == 3.75
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["codes", "int8", "300", "0", "300"], ["scales", "float32", "2", "304", "8"], ["total", "320"]]


def test_wire_without_a_spec_shows_all(capsys):
    rows = json.loads(output(capsys, "wire", "--json", "-"))["specs"]
    assert {commopt.parse(row["spec"]).name for row in rows} == set(commopt.compressors())
    assert [row["bits"] for row in rows] == sorted((8 * commopt.wire_bytes(row["spec"], 2**24) / 2**24 for row in rows), reverse=True)
    bias = {row["spec"]: row["bias"] for row in rows}
    assert (bias["none"], bias["bf16"], bias["int8:rounding=stochastic"], bias["int4"]) == ("none", "rounding", "none", "error feedback")
    text = output(capsys, "wire")
    assert all(row["spec"] in text and row["when"] in text for row in rows)
    ours = [row for row in rows if type(commopt.parse(row["spec"])).__module__.startswith("commopt.")]
    assert len(ours) > 6 and all(row["when"] for row in ours), "a compressor that does not say when to use it"


def test_wire_says_when_the_gradient_itself_is_sent(capsys):
    assert "the gradient itself is sent" in output(capsys, "wire", "topk:ratio=1.0", "1000")
    assert "the gradient itself is sent" not in output(capsys, "wire", "none", "1000")


@pytest.mark.parametrize("argv, words", [
    (["wire", "int9", "10"], ["int9", "int4", "topk"]),
    (["wire", "int8:blok=3", "10"], ["blok=3", "block=256 (int)", "rounding"]),
    (["wire", "topk:ratio=2", "10"], ["ratio", "2.0"]),
    (["wire", "int8", "-1"], ["-1"]),
    (["wire", "int8", "many"], ["many"]),
    (["wire", "int8", "10", "--dtype", "int64"], ["int64", "bf16"]),
    (["nothing"], ["nothing", "info", "wire", "bench"]),
    ([], ["COMMAND"]),
    (["bench"], ["NAME"]),
    (["bench", "speed"], ["speed", "kernels", "bandwidth", "accuracy", "rivals"]),
    (["bench", "bandwidth", "--spec", "none,int9"], ["int9", "int4"]),
    (["bench", "bandwidth", "--emulate", "fast"], ["fast", "100mbit"]),
    (["bench", "bandwidth", "--world", "1"], ["2 ranks", "--world 1"]),
    (["bench", "bandwidth", "--json", "/nowhere/at/all.json"], ["/nowhere/at"]),
])
def test_mistakes_are_named(argv, words, capsys):
    said = refused(capsys, *argv)
    assert all(word in said for word in words), said


def test_specs_are_split_before_names():
    assert launch.split_specs("none,int4:block=64,ef=false topk:ratio=0.1") == ["none", "int4:block=64,ef=false", "topk:ratio=0.1"]
    assert launch.split_specs("int8,intra=none,inter=int4:block=64,ef=true,none") == ["int8", "intra=none,inter=int4:block=64,ef=true", "none"]
    with pytest.raises(ValueError, match="at least one spec"):
        launch.split_specs(" , ")


def test_steps_with_a_wrong_mean_are_not_timed(workers):
    assert launch.run("test_cli", {"do": "verify"}, 2, timeout=60) == [
        "right: none", "right: int8", "right: topk:ratio=0.01",
        "int8: the ranks hold different gradients",
        "none: the mean should be the exact mean within 1e-06 of its norm",
        "int8: the mean should be the exact mean within 2e-02 of its norm",
        "topk:ratio=0.01: what was sent and what was kept should be the exact mean within 1e-05 of its norm",
    ]


def test_launch_tells_which_rank_failed_and_ends_the_others(workers):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="(?s)1 of 2 ranks failed.*rank 1, exit status 1.*ValueError: on purpose"):
        launch.run("test_cli", {"do": "fail", "rank": 1}, 2, timeout=60)
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] were still running after 1 s"):
        launch.run("test_cli", {"do": "sleep"}, 2, timeout=1)
    assert time.monotonic() - start < 30


def test_launch_stopped_by_a_signal_leaves_nobody(workers, tmp_path):
    """SIGTERM is cleaned up after; of SIGKILL the kernel tells the workers."""
    launchers = {}
    for number in (signal.SIGTERM, signal.SIGKILL):
        pids = tmp_path / f"pids-{number}"
        pids.mkdir()
        code = f"from commopt.bench import launch; launch.run('test_cli', {{'do': 'sleep', 'pids': {str(pids)!r}}}, 2, timeout=60)"
        launchers[pids] = number, subprocess.Popen([sys.executable, "-c", code])
    for pids, (number, launcher) in launchers.items():
        within(30, lambda: len(list(pids.iterdir())) == 2)
        launcher.send_signal(number)
        launcher.wait(30)
        within(10, lambda: not any(pathlib.Path("/proc", pid.name).exists() for pid in pids.iterdir()))


def within(seconds: float, true) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def verdicts(rank: int) -> list[str]:
    """What `verify` says of right results, and of results that are wrong on one rank or on all."""
    said, shared, work = [], [], works.work("stack", 64, 5, 8)

    def judge(spec: str, spoil=lambda mean: mean) -> None:
        c = steps.candidate(spec, work, shared)
        exact = steps.exact_mean(c)
        for _ in range(2):
            c.backward(work.batch(rank, 0))
        plain = c.gradient()
        c.gradient = lambda: spoil(plain)
        try:
            steps.verify(c, exact, plain)
            said.append(f"right: {spec}")
        except RuntimeError as error:
            said.append(str(error).split(", but is")[0])

    for spec in ("none", "int8", "topk:ratio=0.01"):
        judge(spec)
    judge("int8", lambda mean: mean + rank)
    for spec, by in (("none", 1.001), ("int8", 1.1), ("topk:ratio=0.01", 1.001)):
        judge(spec, lambda mean: mean * by)
    return said


if __name__ == "__main__":
    arguments = launch.worker_arguments()
    if arguments["do"] == "sleep":
        if "pids" in arguments:
            pathlib.Path(arguments["pids"], str(os.getpid())).touch()
        time.sleep(120)
    if arguments["do"] == "fail":
        if int(os.environ["RANK"]) == arguments["rank"]:
            raise ValueError("on purpose")
        time.sleep(120)
    torch.distributed.init_process_group("gloo")
    launch.finish(verdicts(torch.distributed.get_rank()))
    torch.distributed.destroy_process_group()
