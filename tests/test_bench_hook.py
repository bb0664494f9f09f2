"""`python -m commopt bench hook`: that it verifies and times what it says."""

import json
import pathlib
import statistics
import subprocess
import sys

import pytest
import torch

from commopt.__main__ import main

TINY = ["--width", "64", "--layers", "3", "--batch", "8", "--rounds", "3"]


def test_it_times_every_candidate(tmp_path, capfd):
    specs = ["none", "int8", "topk:ratio=0.1", "powersgd:rank=2"]
    assert main(["bench", "hook", *TINY, "--spec", ",".join(specs), "--json", str(tmp_path / "hook.json")]) == 0
    result = json.loads((tmp_path / "hook.json").read_text())
    assert result["bench"] == "hook" and [row["spec"] for row in result["rows"]] == ["no_sync", *specs]
    alone = result["rows"][0]
    for row in result["rows"]:
        assert len(row["times_ms"]) == 3 and row["backward_ms"] == pytest.approx(statistics.median(row["times_ms"]))
        assert row["slower"] == pytest.approx(row["backward_ms"] / alone["backward_ms"])
        assert row["launches"] is row["device_us"] is row["waits"] is None  # of a GPU
        assert row["host_us"] is None if row is alone else 0 < row["host_us"] < 1e3 * max(row["times_ms"])
    assert capfd.readouterr().out.splitlines()[1].split()[:2] == ["no_sync", "-"]


def test_it_says_where_the_time_goes(tmp_path, capfd):
    assert main(["bench", "hook", *TINY, "--spec", "int8", "--profile", "--json", str(tmp_path / "hook.json")]) == 0
    alone, row = json.loads((tmp_path / "hook.json").read_text())["rows"]
    own = [f["own_us"] for f in row["functions"]]
    assert alone["functions"] == [] and len(own) > 5 and own == sorted(own, reverse=True)
    once = next(f for f in row["functions"] if "traffic.py" in f["name"] and f["name"].endswith(" exchange"))
    assert once["calls"] == 1.0 and sum(own) > 10
    assert "exchange" in capfd.readouterr().out


@pytest.mark.parametrize("argv, words", [(["--spec", "int9"], ["int9", "int4"]), (["--layers", "0"], ["1 or more", "--layers 0"])])
def test_mistakes_are_named(argv, words, capfd):
    assert main(["bench", "hook", *argv]) == 2
    said = capfd.readouterr().err
    assert all(word in said for word in words), said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benches_of_a_gpu_refuse_to_run_without_one(tmp_path, capfd):
    assert main(["bench", "hook", "--device", "cuda"]) == 2 and "no GPU" in capfd.readouterr().err
    script = pathlib.Path(__file__).parent.parent / "bench/gpu.sh"
    done = subprocess.run([str(script), str(tmp_path / "results"), sys.executable], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no torch that sees a GPU" in done.stderr and not (tmp_path / "results").exists()
