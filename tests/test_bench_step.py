"""`python -m commopt bench step`: what its numbers are, what its charts show, and that it refuses what is not equal."""

import json
import os
import pathlib
import queue
import threading
import time

import pytest
import torch

from commopt.__main__ import main
from commopt.bench import launch, resident, step, timeline, training, works

HERE = pathlib.Path(__file__).parent
WHAT = {"model": "gpt", "width": 8, "layers": 1, "batch": 2, "optimizer": "sgd", "accumulate": 1, "parameters": 1000, "buckets": [4000], "world": 2, "threads": 1,
        "rounds": 3, "link": "8mbit", "kernels": "cpu", "torch": "2", "commopt": "0"}


def row(spec: str, schedule: str | None = None, p50: float = 100.0, **other) -> dict:
    return {"spec": spec, "schedule": schedule, "p50_ms": p50, "p75_ms": p50 + 1, "p90_ms": p50 + 2, "sent": 5e4, "exposed_ms": None, "grown": None,
            "predicted_ms": None, "events": [], "period_ms": p50} | other


# --- numbers ---


def test_a_step_is_from_one_backward_to_the_next_and_the_first_two_are_dropped():
    assert training.durations([[0.0, 8.0, 9.0, 9.25, 9.75], [19.0, 20.0, 21.0, 22.0, 24.0]]) == [250.0, 500.0, 1000.0, 2000.0]


def test_percentiles_are_linear_between_values():
    values = [40.0, 10.0, 30.0, 20.0]
    assert [training.percentile(values, p) for p in (0, 50, 75, 90, 100)] == pytest.approx([10.0, 25.0, 32.5, 37.0, 40.0])
    assert training.percentile([7.0], 90) == 7.0


def test_what_follows_from_several_rows():
    rows = [row("no_sync", p50=80.0, sent=0.0), row("plain"), row("int8", "decoupled", 90.0, predicted_ms=81.0)]
    found = step.compared({"rows": rows}, 8e6)["rows"]
    assert [r["of_plain"] for r in found] == [0.8, 1.0, 0.9] and [r["added_ms"] for r in found] == [0.0, 20.0, 10.0]
    assert [r["floor_ms"] for r in found] == [0.0, 50.0, 50.0] and [r["of_p50"] for r in found] == [None, None, 0.9]
    assert [r["floor_ms"] for r in step.compared({"rows": rows}, None)["rows"]] == [None] * 3


def test_ours_run_under_every_schedule_and_others_once():
    assert step.list_candidates(["plain", "torch:fp16", "int8"], ["pipelined", "plain"]) == [
        ("no_sync", None), ("plain", None), ("torch:fp16", None), ("int8", "pipelined"), ("int8", "plain")]


# --- text ---


def test_table():
    rows = [row("no_sync", p50=80.0, sent=0.0), row("plain", grown=3_500_000),
            row("int8", "decoupled", 90.0, exposed_ms=4.0, predicted_ms=81.0, grown=4_000_000)]
    lines = step.table(step.compared({"what": WHAT, "rows": rows}, 8e6)).splitlines()
    assert lines[:4] == [
        "spec     schedule     p50 ms     p75     p90  of plain  added ms  exposed ms  sent MB  floor ms  predicted  of p50  memory MB",
        "no_sync  -              80.0    81.0    82.0     0.800       0.0           -    0.000       0.0          -       -          -",
        "plain    -             100.0   101.0   102.0     1.000      20.0           -    0.050      50.0          -       -        3.5",
        "int8     decoupled      90.0    91.0    92.0     0.900      10.0         4.0    0.050      50.0       81.0   0.900        4.0"]
    assert len(lines) == 5 and lines[4].startswith("gpt of width 8, 1 layers, batch 2, 1 pass(es) a step, sgd, 4 steps a round: ") and "3 rounds" in lines[4]


EVENTS = [("backward", 0.0, 12.0), ("forward", 13.0, 20.0), ("optimizer", 12.0, 12.5), ("comm", 2.5, 6.0), ("comm", 3.0, 4.0), ("comm", 5.0, 8.2), ("comm", 15.0, 15.8)]


def test_chart():
    assert timeline.chart(EVENTS, 20.0, 1.0, timeline.ASCII) == [
        "ms         0         10        20",
        "forward   |             #######|     7.0",
        "backward  |############        |    12.0",
        "optimizer |            +       |     0.5",
        "comm      |  +#####.      #    |     6.5"]


def test_chart_in_columns_of_another_width():
    assert timeline.chart([("backward", 0.0, 0.25), ("encode", 0.125, 0.25)], 0.3, 0.025, timeline.BLOCKS) == [
        "ms         0       0.2",
        "backward  |██████████  |     0.2",
        "encode    |     █████  |     0.1"]


def test_a_chart_is_drawn_with_what_the_terminal_can_write():
    assert step.marks_for("utf-8") == timeline.BLOCKS != timeline.ASCII == step.marks_for("ascii") == step.marks_for(None) == step.marks_for("latin-1")


def test_charts_share_a_scale():
    rows = [row("plain", p50=100.0, events=[{"lane": "forward", "start_ms": 0.0, "stop_ms": 100.0}]),
            row("int8", "decoupled", 50.0, events=[{"lane": "forward", "start_ms": 0.0, "stop_ms": 50.0}])]
    lines = step.charts({"rows": rows}, timeline.ASCII).splitlines()
    assert lines[1] == "plain: 100.0 ms from one backward to the next, rank 0" and lines[5].startswith("int8 decoupled: 50.0 ms")
    assert lines[3].count("#") == 100 and lines[7].count("#") == 50


# --- ranges ---


def test_a_period_is_cut_out_of_what_was_recorded():
    events = [("backward", 0.0, 5.0), ("backward", 10.0, 15.0), ("backward", 20.0, 25.0), ("comm", 8.0, 12.0), ("comm", 14.0, 21.0), ("comm", 3.0, 9.0),
              ("forward", 17.0, 20.0), ("comm", 22.0, 23.0)]
    assert timeline.period(events, 1) == (
        [("forward", 7.0, 10.0), ("backward", 0.0, 5.0), ("comm", 0.0, 2.0), ("comm", 4.0, 10.0)], 10.0)
    assert timeline.period([*events, ("backward", 30.0, 35.0)], 2) == (
        [("forward", 17.0, 20.0), ("backward", 0.0, 5.0), ("backward", 10.0, 15.0), ("comm", 3.0, 9.0), ("comm", 8.0, 12.0), ("comm", 14.0, 20.0)], 20.0)


def test_ranges_of_threads_that_ran_before_are_recorded():
    jobs, done = queue.SimpleQueue(), queue.SimpleQueue()

    def serve() -> None:
        while (job := jobs.get()) is not None:
            with torch.autograd.profiler.record_function("commopt::comm"):
                job()
            done.put(None)

    thread = threading.Thread(target=serve)
    thread.start()

    def three_steps() -> None:
        for _ in range(3):
            with torch.autograd.profiler.record_function("backward"):
                jobs.put(lambda: torch.ones(1000).sum())
                done.get()

    try:
        events, period = timeline.record(three_steps, 1)
    finally:
        jobs.put(None)
        thread.join()
    assert [lane for lane, _, _ in events] == ["backward", "comm"] and period > 0
    (_, begin, end), (_, start, stop) = events
    assert 0.0 == begin < start < stop <= end <= period


def test_memory_that_was_held_for_a_while_counts():
    growth = resident.growth()
    held = torch.ones(8 << 20)
    del held
    kept = torch.ones(2 << 20)
    assert len(kept) and (growth() is None or 31 << 20 <= growth() < 56 << 20)


# --- models ---


@pytest.mark.parametrize("name", works.KINDS)
def test_a_model_learns_from_batches_of_its_own_on_every_rank(name):
    kind = works.kind(name)
    width, layers = (16, 1) if name != "sleeping" else (2, 1)
    work = works.work(name, width, layers, 4)
    torch.manual_seed(0)
    model = work.model()
    assert sum(p.numel() for p in model.parameters()) == works.parameters(name, width, layers)
    flat = lambda batch: torch.cat([x.flatten().double() for x in (batch if isinstance(batch, tuple) else (batch,))])
    assert torch.equal(flat(work.batch(1, 2)), flat(work.batch(1, 2)))
    assert not torch.equal(flat(work.batch(1, 2)), flat(work.batch(0, 2))) and not torch.equal(flat(work.batch(1, 2)), flat(work.batch(1, 3)))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), []
    for _ in range(8):
        loss = work.loss(model, work.batch(0, 0))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name, width, layers", [("gpt", 640, 5), ("mlp", 1280, 13)])
def test_there_are_models_of_25m_parameters(name, width, layers):
    assert works.parameters(name, width, layers) == pytest.approx(25e6, rel=0.05)


def test_the_sleeping_model_takes_its_time_without_a_processor():
    work = works.work("sleeping", 512, 8, 1)
    model, batch = work.model(), work.batch(0, 0)
    assert [p.numel() for p in model.parameters()] == [163_840] * 8  # 0.625 MiB each
    worked, began = time.thread_time(), time.perf_counter()
    loss = work.loss(model, batch)
    between = time.perf_counter()
    loss.backward()
    assert between - began >= 0.160 and time.perf_counter() - between >= 0.240
    assert time.thread_time() - worked < 0.2


# --- what is refused ---


@pytest.mark.parametrize("argv, words", [
    (["--model", "gtp"], ["gtp", "gpt", "sleeping"]),
    (["--spec", "int9"], ["int9", "int4"]),
    (["--schedule", "pipelined,late"], ["late", "pipelined"]),
    (["--emulate", "fast"], ["fast", "100mbit"]),
    (["--world", "1"], ["2 ranks", "--world 1"]),
    (["--rounds", "0"], ["1 round", "--rounds 0"]),
    (["--bucket-mb", "0"], ["--bucket-mb 0"]),
])
def test_mistakes_are_named(argv, words, capfd):
    assert main(["bench", "step", *argv]) == 2
    said = capfd.readouterr()
    assert said.out == "" and all(word in said.err for word in words) and "warming" not in said.err, said.err


def test_parameters_that_differ_are_refused(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")])))
    assert launch.run("test_bench_step", {}, 2, timeout=60) == [
        "right", "right",
        "int8 plain: the ranks hold different parameters",
        "right",
        "none pipelined: after 3 steps 1 of 4 parameters differ from those of plain",
        "int8 plain: after 3 steps 4 of 4 parameters differ from those of int8 pipelined",
        "plain: parameters are not finite after 3 steps, so nothing can be told from their bits",
    ]


def verdicts(rank: int) -> list[str]:
    """What `check` says of candidates with given parameters."""
    class Given(training.Candidate):
        def __init__(self, spec: str, schedule: str | None, values: list[float]):
            super().__init__(spec, schedule, None, None, None, None, 1)
            self.steps, self.values = 3, torch.tensor(values)

        def parameters(self) -> torch.Tensor:
            return self.values

    def said(*given: Given) -> str:
        try:
            training.check(list(given))
            return "right"
        except RuntimeError as error:
            return str(error)

    a, b = [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]
    no_sync, plain, int8 = Given("no_sync", None, [rank, 0.0]), Given("plain", None, a), Given("int8", "pipelined", b)
    return [
        said(no_sync, plain, Given("none", "pipelined", a), int8, Given("int8", "plain", b)),
        said(plain, Given("torch:fp16", None, b), int8, Given("int8", "delayed", a)),
        said(plain, int8, Given("int8", "plain", [2.0 + rank, 3.0, 4.0, 5.0])),
        said(Given("int8", "delayed", a), int8),
        said(plain, Given("none", "pipelined", [1.0, 2.0, 3.0, 4.5])),
        said(plain, int8, Given("int8", "plain", a)),
        said(Given("plain", None, [1.0, float("nan")])),
    ]


# --- all of it ---


def test_it_measures_every_candidate(tmp_path, capfd):
    argv = ["--model", "mlp", "--width", "32", "--layers", "1", "--batch", "2", "--rounds", "2", "--spec", "torch:fp16,none,int8", "--schedule", "pipelined,decoupled"]
    assert main(["bench", "step", *argv, "--json", str(tmp_path / "step.json")]) == 0
    result, said = json.loads((tmp_path / "step.json").read_text()), capfd.readouterr()
    rows = {(r["spec"], r["schedule"]): r for r in result["rows"]}
    assert list(rows) == [("no_sync", None), ("plain", None), ("torch:fp16", None),
                          ("none", "pipelined"), ("none", "decoupled"), ("int8", "pipelined"), ("int8", "decoupled")]
    sent = {spec: r["sent"] for (spec, _), r in rows.items()}
    parameters = result["what"]["parameters"]
    assert parameters == works.parameters("mlp", 32, 1) and sent["no_sync"] == 0
    assert sent["plain"] == sent["none"] == 2 * sent["torch:fp16"] == 4 * parameters > 3 * sent["int8"] > 0
    for r in rows.values():
        assert len(r["times_ms"]) == 2 * training.STEPS and 0 < min(r["times_ms"]) <= r["p50_ms"] <= r["p75_ms"] <= r["p90_ms"] <= max(r["times_ms"])
        assert all(0 <= e["start_ms"] <= e["stop_ms"] <= r["period_ms"] for e in r["events"])
        assert {"forward", "backward", "optimizer"} | ({"comm"} if r["spec"] != "no_sync" else set()) <= {e["lane"] for e in r["events"]}
    for (spec, schedule), r in rows.items():
        assert (r["exposed_ms"] is None) == (r["predicted_ms"] is None and schedule != "pipelined") == (schedule is None)
        assert schedule is None or r["exposed_ms"] > 0 and {"encode", "comm", "decode"} <= {e["lane"] for e in r["events"]}
        assert schedule != "decoupled" or r["predicted_ms"] > 0
    assert said.out.splitlines()[0].split()[:3] == ["spec", "schedule", "p50"] and "none pipelined: " in said.out and "\noptimizer |" in said.out
    assert "round 2/2: int8 pipelined" in said.err
    assert main(["report", str(tmp_path / "step.json"), "-o", "-"]) == 0
    page = capfd.readouterr().out
    assert all(f'aria-label="{r["spec"]} {r["schedule"]}: {r["period_ms"]:.1f} ms' in page for r in rows.values() if r["schedule"])


def test_steps_of_several_passes(tmp_path):
    argv = ["--model", "mlp", "--width", "32", "--layers", "1", "--batch", "2", "--rounds", "1", "--spec", "none", "--schedule", "pipelined,delayed", "--accumulate", "2"]
    assert main(["bench", "step", *argv, "--json", str(tmp_path / "step.json")]) == 0
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["what"]["accumulate"] == 2 and [r["schedule"] for r in result["rows"]] == [None, None, "pipelined", "delayed"]
    for r in result["rows"]:
        lanes = [e["lane"] for e in r["events"]]
        assert (lanes.count("backward"), lanes.count("forward")) in ((2, 2), (2, 3), (3, 2), (3, 3)) and len(r["times_ms"]) == training.STEPS
    _, plain, pipelined, delayed = result["rows"]
    assert plain["sent"] == pipelined["sent"] == delayed["sent"] / 2  # both halves travel


if __name__ == "__main__":
    launch.worker_arguments()
    torch.distributed.init_process_group("gloo")
    launch.finish(verdicts(torch.distributed.get_rank()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
