"""What the hook itself costs: the host's time for a bucket, kernels launched for it, and what a backward loses that is bound
by matrix products, on one rank, where nothing travels.

    python -m commopt bench hook --device cuda --spec int8,int4,topk:ratio=0.01

The model is a stack of linear layers, each a bucket. Candidates take turns, of one backward each, after 20 that are not timed;
medians over the turns.

    host      µs in the hook, for a bucket: what backward's thread does before it goes on
    launches  kernels, copies and memory sets that a GPU is given for a bucket: those of a backward less those of one under no_sync
    device    µs of these
    backward  ms of a backward; of a GPU its own time
    slower    backward / the same under no_sync: one rank sends nothing, so that this is encoding, decoding and their getting in the way
    waits     whether the host waited for the GPU, in a backward of the steady state
    own       with --profile, µs for a bucket in a function itself, of the functions where the host's time goes, and their calls;
              watching them makes them slower

"""

import argparse
import cProfile
import pstats
import statistics
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commopt
from commopt.compressors import STEADY

from . import launch
from .steps import cell, kernels_in_use

NO_SYNC = "no_sync"
WARMUP = 20
FUNCTIONS = 16  # of a profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", default="none,int8,int4,sign,topk:ratio=0.01,powersgd:rank=4", help="specs, separated by blanks or by commas before a name")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--width", type=int, default=2048, help="of a layer: a bucket has its square of parameters")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4096, help="rows: how long a backward takes")
    parser.add_argument("--rounds", type=int, default=30, help="turns of every candidate")
    parser.add_argument("--profile", action="store_true", help="say where the host's time goes")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for everything")


def main(args: argparse.Namespace) -> tuple[dict, str]:
    """The result, and the table that shows it."""
    specs = launch.split_specs(args.spec)
    for spec in specs:
        commopt.parse(spec)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    if min(args.width, args.layers, args.batch, args.rounds) < 1:
        raise ValueError(f"sizes must be 1 or more, got --width {args.width} --layers {args.layers} --batch {args.batch} --rounds {args.rounds}")
    settings = {key: getattr(args, key) for key in ("device", "width", "layers", "batch", "rounds", "profile")} | {"specs": [NO_SYNC, *dict.fromkeys(specs)]}
    result = launch.run("commopt.bench.hook", settings, 1, timeout=args.timeout)
    return result, table(result)


def table(result: dict) -> str:
    rows, what = result["rows"], result["what"]
    width = max(len(row["spec"]) for row in rows) + 2
    lines = [f"{'spec':{width}}{'host µs':>9}{'launches':>10}{'device µs':>11}{'backward ms':>13}{'slower':>8}{'waits':>7}"]
    for row in rows:
        waits = "-" if row["waits"] is None else "yes" if row["waits"] else "no"
        lines.append(f"{row['spec']:{width}}" + cell(row["host_us"], 9, 1) + cell(row["launches"], 10, 1) + cell(row["device_us"], 11, 1)
                     + f"{row['backward_ms']:>13.2f}{row['slower']:>8.3f}{waits:>7}")
    lines.append(f"{what['layers']} buckets of {what['width'] ** 2 / 1e6:.1f}M float32, batch {what['batch']}, {what['rounds']} rounds, on {what['machine']}, kernels {what['kernels']}, "
                 f"torch {what['torch']}, commopt {what['commopt']}")
    for row in rows:
        if row["functions"]:
            lines += ["", f"{row['spec']:{width}}{'own µs':>9}{'calls':>10}"]
            lines += [f"{'':{width}}{f['own_us']:>9.1f}{f['calls']:>10.1f}  {f['name']}" for f in row["functions"]]
    return "\n".join(lines)


@dataclass
class Candidate:
    """One row. host: seconds in the hook, of each bucket. backward: of each turn. profile: of the hook, while there is one."""

    spec: str
    ddp: DistributedDataParallel
    handle: commopt.State | None
    host: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    profile: cProfile.Profile | None = None

    def timed_hook(self, state: commopt.State, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        begin = time.perf_counter()
        future = self.profile.runcall(commopt.hook, state, bucket) if self.profile else commopt.hook(state, bucket)
        self.host.append(time.perf_counter() - begin)
        return future

    def run(self, x: torch.Tensor) -> float:
        """Seconds of a backward, by the device's clock where it has one."""
        self.ddp.zero_grad()
        if self.spec == NO_SYNC:
            with self.ddp.no_sync():
                return _timed(self.ddp(x).square().mean())
        return _timed(self.ddp(x).square().mean())


def _timed(loss: torch.Tensor) -> float:
    if loss.device.type == "cpu":
        begin = time.perf_counter()
        loss.backward()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    loss.backward()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * begin.elapsed_time(end)


def candidate(spec: str, settings: dict[str, Any]) -> Candidate:
    torch.manual_seed(0)
    width, device = settings["width"], settings["device"]
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(settings["layers"]))).to(device)
    made = Candidate(spec, DistributedDataParallel(model, bucket_cap_mb=width * width * 4 / (1 << 20)), None)
    if spec != NO_SYNC:
        made.handle = commopt.State(made.ddp, commopt.parse(spec).at(STEADY))
        made.ddp.register_comm_hook(made.handle, made.timed_hook)
    return made


def verify(c: Candidate, alone: list[torch.Tensor]) -> None:
    """RuntimeError unless what the one rank gets, and what it keeps, is its own gradient."""
    kept = c.handle.state_dict()["residual"]
    for (name, p), gradient in zip(c.ddp.module.named_parameters(), alone):
        back = p.grad.cpu().double() + (kept[name].view(p.shape).double() if name in kept else 0.0)
        off = float((back - gradient.double()).norm() / gradient.double().norm())
        limit = 1e-5 if commopt.parse(c.spec).ef or c.spec == "none" else 0.3
        if not off <= limit:
            raise RuntimeError(f"{c.spec}: what {name} gets and what is kept should be its gradient within {limit:.0e} of its norm, but is {off:.1e} away")


def launched(c: Candidate, x: torch.Tensor) -> tuple[int, float]:
    """Of a backward: what the GPU was given, and its seconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profiler:
        c.run(x)
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
    return len(events), 1e-6 * sum(event.device_time for event in events)


def functions(c: Candidate, x: torch.Tensor, turns: int) -> list[dict[str, Any]]:
    """Where the hook spends the host's time, for a bucket: the functions that take most of it themselves."""
    c.profile, before = cProfile.Profile(), len(c.host)
    for _ in range(turns):
        c.run(x)
    (profile, c.profile), buckets = (c.profile, None), len(c.host) - before
    found = [{"name": f"{file.split('site-packages/')[-1]}:{line} {name}" if line else name, "own_us": 1e6 * own / buckets, "calls": calls / buckets}
             for (file, line, name), (_, calls, own, _, _) in pstats.Stats(profile).stats.items()]
    return sorted(found, key=lambda f: -f["own_us"])[:FUNCTIONS]


def waits(c: Candidate, x: torch.Tensor) -> bool:
    """Whether the host waited for the GPU in a backward."""
    c.ddp.zero_grad()
    loss = c.ddp(x).square().mean()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return any("synchroniz" in str(warning.message) for warning in heard)


def serve(settings: dict[str, Any]) -> None:
    """In the worker: measures, and hands over what `main` shows."""
    on_gpu = settings["device"] == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    x = torch.randn(settings["batch"], settings["width"], generator=torch.Generator().manual_seed(1)).to(settings["device"])
    candidates, alone = [], []
    for spec in settings["specs"]:
        launch.progress(f"{spec}: verifying")
        c = candidate(spec, settings)
        candidates.append(c)
        c.run(x)
        if spec == NO_SYNC:
            alone = [p.grad.cpu() for p in c.ddp.parameters()]
            continue
        c.run(x)  # the first compressed one, with residuals of zero
        verify(c, alone)
        for _ in range(WARMUP):
            c.run(x)
        c.host.clear()
    for turn in range(settings["rounds"]):
        launch.progress(f"round {turn + 1}/{settings['rounds']}")
        for c in candidates:
            c.backward.append(c.run(x))
    rows, plain, base = [], statistics.median(candidates[0].backward), launched(candidates[0], x) if on_gpu else (0, 0.0)
    for c in candidates:
        count, seconds = launched(c, x) if on_gpu and c.handle else base
        per_bucket = lambda value, scale: scale * value / settings["layers"] if on_gpu and c.handle else None
        rows.append({"spec": c.spec, "host_us": 1e6 * statistics.median(c.host) if c.host else None, "launches": per_bucket(count - base[0], 1.0),
                     "device_us": per_bucket(seconds - base[1], 1e6), "backward_ms": 1e3 * statistics.median(c.backward),
                     "slower": statistics.median(c.backward) / plain, "waits": waits(c, x) if on_gpu else None,
                     "functions": functions(c, x, settings["rounds"]) if settings["profile"] and c.handle else [], "times_ms": [1e3 * t for t in c.backward]})
    launch.finish({"what": {key: settings[key] for key in ("device", "width", "layers", "batch", "rounds")} | {
        "machine": torch.cuda.get_device_name() if on_gpu else f"a CPU, {torch.get_num_threads()} threads", "kernels": kernels_in_use(settings["device"]),
        "torch": torch.__version__, "commopt": commopt.__version__}, "rows": rows})
    dist.destroy_process_group()


if __name__ == "__main__":
    serve(launch.worker_arguments())
