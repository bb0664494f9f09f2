"""Results of benches and a log of a training run with known numbers, for the tests of the report."""

import json
import math
import pathlib

from commopt.bench import rivals, step

LONG = "topk:ratio=0.01,scope=threshold,values=int4,index=coded,momentum=0.9,warmup=0,collective=sparse_two_shot"
SPECS = ("plain", "torch:fp16", "int8", LONG, "powersgd:rank=16,values=int8", "intra=none,inter=int4:block=64")
VERSIONS = {"torch": "2.9.0", "commopt": "0.1.0"}
STEPS_WHAT = {"parameters": 2629130, "buckets": [1071144, 6293504], "world": 2, "threads": 1, "rounds": 6, "link": "1gbit", "kernels": "cpu (avx512)", **VERSIONS}


def named(bench: str, result: dict) -> dict:
    return {"bench": bench, "command": f"python -m commopt bench {bench} --spec '{SPECS[3]}'", "date": "2024-05-17T09:30:00+00:00", **result}


def learnt(specs=SPECS, seeds: int = 3, steps: int = 8, task: str = "gpt", loss=lambda k: 5 / (1 + k) + 2) -> dict:
    """One task of bench accuracy. The loss of spec i's seed s at step k is loss(k) + 0.01 s + 0.05 i; step k is at k (i + 1) / 4 s
    and 4e6 k / 10^i bytes."""
    runs = {}
    for i, spec in enumerate(specs):
        curve = lambda s: [{"step": 50 * k, "loss": loss(k) + 0.01 * s + 0.05 * i, "seconds": k * (i + 1) / 4, "bytes": 4e6 * k / 10**i} for k in range(1, steps + 1)]
        runs[spec] = [{"curve": curve(s), "lr": 1e-3 * 2**i, "seconds": steps * (i + 1) / 4, "seconds_per_step": (i + 1) / 200, "bytes_per_step": 8e4 / 10**i} for s in range(seeds)]
    what = {"task": task, "parameters": 1068288, "world": 2, "steps": 50 * steps, "seeds": seeds, "tuned": "tuned for each spec", "schedule": "pipelined", "accumulate": 1, "bucket_mb": 1.0,
            "width": 128, "layers": 5, "batch": 8, "link": "loopback", **VERSIONS}
    return {"what": what, "runs": runs}


def accuracy(*args, **other) -> dict:
    return {"results": [learnt(*args, **other)]}


def steep(k: int) -> float:
    """From 300 to 0.1 in eight evaluations, as batch normalization's statistics settle."""
    return 300 * (0.1 / 300) ** ((k - 1) / 7)


def added(specs=SPECS) -> list[dict]:
    """Rows of steps.compare: spec i adds 80 / 2^i ms."""
    return [{"spec": spec, "step_ms": 40 + 80 / 2**i, "added_ms": 80 / 2**i, "sent": 1e7 / 4**i, "counted": 1.02e7 / 4**i, "error": 1e-3, "of_plain": 1 / 2**i,
             "floor_ms": 60 / 2**i, "stats": {"encode_ms": 1.0, "comm_ms": 2.0, "decode_ms": 3.0, "exposed_ms": 4.0} if i > 1 else {}} for i, spec in enumerate(specs)]


def steps(specs=SPECS[2:]) -> dict:
    rows = []
    for i, (spec, schedule) in enumerate([("no_sync", None), ("plain", None), *((s, f"{d}") for s in specs for d in ("pipelined", "decoupled"))]):
        length = 20.0 + 7 * i
        events = [("forward", length - 8, length), ("backward", 0.0, length - 10), ("optimizer", length - 10, length - 8)]
        events += [("comm", 2.0, 6.0), ("comm", 5.0, 9.5), ("encode", 1.5, 2.5), ("decode", 9.5, 10.25)] if schedule else [("comm", 2.0, 9.0)] if i else []
        rows.append({"spec": spec, "schedule": schedule, "p50_ms": length, "p75_ms": length + 1.5, "p90_ms": length + 6, "sent": 5e5 * i, "exposed_ms": 1.25 * i if schedule else None,
                     "grown": 3_500_000 * i or None, "predicted_ms": length - 3 if schedule == "decoupled" else None, "period_ms": length,
                     "events": [{"lane": lane, "start_ms": start, "stop_ms": stop} for lane, start, stop in events]})
    return step.compared({"what": STEPS_WHAT | {"model": "mlp", "width": 512, "layers": 4, "batch": 32, "bucket_mb": 1.0, "optimizer": "sgd"}, "rows": rows}, 1e9)


def kernels(specs=SPECS[2:]) -> dict:
    row = lambda i, spec, what, isa: {"spec": spec, "what": what, "backend": "cpu", "isa": isa, "threads": 1, "dtype": "float32", "n": 1 << 24, "bytes": 1 << 26, "ns_per_value": 0.3 + i,
                                      "gb_per_s": 30.0, "axpy_ns": 0.25, "of_axpy": 0.9 / (1 + i), "median": 0.8, "of_zero": None, "vs_torch": None, "vs_compile": 1.7, "worst": 1.2}
    rows = [row(i, spec, what, isa) for isa in ("avx2", "avx512") for i, spec in enumerate(specs) for what in ("encode", "decode 2", "decode 8")]
    return {"what": {**VERSIONS, "device": "cpu", "machine": "x86_64"}, "rows": rows}


def collectives(specs=SPECS[2:]) -> dict:
    rows = [{"spec": spec, "collective": "sparse_two_shot", "sent": 4e7 / 3**i, "counted": 4.1e7 / 3**i, "rounds": 2, "passes": 12.5, "work_ms": 1.0, "predicted_ms": 330 / 3**i,
             "measured_ms": 355 / 3**i, "floor_ms": 314 / 3**i, "of_plain": 1 / 3**i} for i, spec in enumerate(["none", *specs])]
    what = {"elements": 6553600, "world": 4, "machine": 2, "threads": 1, "rounds": 7, "link": "1gbit", "latency": 2.5e-4, "rate": 1.2e8, "kernels": "cpu (avx512)", **VERSIONS}
    return {"what": what, "rows": rows}


def bandwidth(specs=("none", *SPECS[2:]), sizes=tuple(1 << k for k in range(10, 29, 2))) -> dict:
    """An exchange of n bytes by spec i takes n / 4^i / 125 MB/s and 100 us, the first of them being its floor."""
    rows = []
    for n in sizes:
        for i, spec in enumerate(specs):
            floor = n / 4**i / 125
            time = floor + 100
            rows.append({"size_bytes": n, "count": n // 4, "dtype": "float32", "redop": "avg", "spec": spec, "collective": "sum" if i == 0 else "two_shot", "time_us": time, "floor_us": floor,
                         "algbw_gbps": n / time / 1e3, "busbw_gbps": n / 4**i / time / 1e3, "effbw_gbps": n / time / 1e3, "wrong": 0, "encode_us": 3.0, "comm_us": time - 5, "decode_us": 2.0})
    return {"what": {"world": 2, "link": "1gbit", **VERSIONS}, "rows": rows}


def hook(specs=SPECS[2:]) -> dict:
    """Backwards of 10, 11, 12, ... ms; on a GPU, where the second spec has the host wait."""
    rows = [{"spec": spec, "host_us": 40.0 + i if i else None, "launches": 3.0 + i if i else None, "device_us": 55.0 * i if i else None, "backward_ms": 10.0 + i, "slower": 1 + i / 10,
             "waits": i == 2 if i else None, "times_ms": [10.0 + i]} for i, spec in enumerate(["no_sync", *specs])]
    return {"what": {"device": "cuda", "width": 2048, "layers": 8, "batch": 4096, "rounds": 30, "machine": "a GPU", "kernels": "cuda", **VERSIONS}, "rows": rows}


def stats(steps: int, **other) -> dict:
    """As handle.stats() gives it after so many steps, each of 1 MB of gradients sent as 250 kB, waiting 2 ms and sending for 6."""
    return {"steps": steps, "bytes_raw": 1_000_000 * steps, "bytes_wire": 250_000 * steps, "ratio": 4.0, "encode_ms": 0.5, "comm_ms": 6.0, "decode_ms": 0.25, "exposed_ms": 2.0, "predicted_ms": None,
            "deferred_steps": 0, "early_steps": 0, "residual_norm": 0.01 * steps, "nonfinite_steps": 0, "spec": {"0": ["int8"], "1": ["int8", "none"]}} | other


def log(count: int = 40, every: int = 50) -> str:
    head = {"log": {**VERSIONS, "ranks": 4, "command": "python train.py", "date": "2024-05-17T09:30:00+00:00"}}
    return "".join(json.dumps(line) + "\n" for line in [head, *({"step": every * i, **stats(every * i + 1)} for i in range(count))])


def all_files(folder: pathlib.Path) -> list[str]:
    """One of each kind, and some that are awkward."""
    diverged = accuracy(SPECS[:3], 1)
    diverged["results"][0]["runs"]["int8"][0]["curve"][-2:] = [{"step": 350, "loss": math.nan, "seconds": 1.0, "bytes": 1e6}, {"step": 400, "loss": math.inf, "seconds": 2.0, "bytes": 2e6}]
    files = {
        "accuracy": accuracy(), "step": steps(), "kernels": kernels(), "collectives": collectives(), "bandwidth": bandwidth(),
        "hook": hook(), "rivals": rivals.judged({"what": STEPS_WHAT, "rows": added()}, learnt(), 0.07),
        "bandwidth of one size": bandwidth(sizes=(1 << 20,)), "bandwidth of steps": {"what": STEPS_WHAT, "rows": added()},
        "accuracy of one seed": diverged, "step of few": steps(()), "accuracy of many": accuracy([f"int4:block={16 * i}" for i in range(1, 22)], 1, 60),
        "accuracy of tasks": {"results": [learnt(task="recommender"), learnt(SPECS[:3], task="resnet", loss=steep)]},
    }
    for name, result in files.items():
        (folder / f"{name}.json").write_text(json.dumps(named(name.split()[0], result)))
    (folder / "run.jsonl").write_text(log())
    (folder / "short.jsonl").write_text(log(1))
    return [str(folder / f"{name}.json") for name in files] + [str(folder / "run.jsonl"), str(folder / "short.jsonl")]
