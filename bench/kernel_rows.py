"""Verifies and times a list of rows of the bench of kernels: bench/kernels.py says what the columns are."""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from . import gradients, in_torch, launch
from .kernel_runs import Run, Tensors, What, verify
from .turns import in_turns

GRADIENTS = 4  # different ones, so that what top-k carries from step to step is put to work
STEPS_BEFORE = 32  # after which top-k has found its threshold


class Variant(NamedTuple):
    """Who does the work: `backend` is the one asked for, `owner` the one that does it, "torch" where no op of ours is used."""

    backend: str
    isa: str | None
    owner: str = ""

    def use(self) -> None:
        if self.isa:
            _cpu().use_isa(self.isa)


class Rivals(NamedTuple):
    """What to compare with, beside the memory."""

    torch: bool = True
    compile: bool = True


def measure(
    plan: dict[str, list[What]], variants: list[Variant], device: str, threads: list[int], sizes: list[int], dtypes: list[torch.dtype],
    turns: int, rivals: Rivals = Rivals(),
) -> Iterator[dict[str, Any]]:
    """The rows of the table, for each spec of the plan what is done with it. First all are verified."""
    with _settings():
        able = {spec: list(_able(spec, variants, device, dtypes)) for spec in plan}
        for n in sizes:
            for dtype in dtypes:
                grads = gradients.layered(n, dtype, GRADIENTS, device)
                for count in threads:
                    torch.set_num_threads(count)
                    for spec, whats in plan.items():
                        if able[spec]:
                            yield from _time_spec(spec, whats, able[spec], grads, count, turns, rivals)


@contextmanager
def _settings() -> Iterator[None]:
    """Leaves the thread count and the instruction set as they were."""
    before = torch.get_num_threads(), _cpu().isa() if backends.built("cpu") else None
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        if before[1]:
            _cpu().use_isa(before[1])


def _cpu():
    from .. import _C

    return _C.cpu


def _able(spec: str, variants: list[Variant], device: str, dtypes: list[torch.dtype]) -> Iterator[Variant]:
    """The variants that can do it, verified."""
    for variant in variants:
        variant.use()
        launch.progress(f"verifying {spec} on {variant.backend}" + (f", {variant.isa}" if variant.isa else ""))
        for dtype in dtypes:
            owners = verify(variant.backend, spec, dtype, device)
        lacking = [op for op, owner in owners.items() if owner != variant.backend]
        if lacking:
            print(f"{spec}: left out, {variant.backend} does not have {', '.join(lacking)}", file=sys.stderr)
        elif owners:
            yield variant._replace(owner=variant.backend)
        else:
            yield Variant(variant.backend, None, "torch")
            return


def _time_spec(spec: str, whats: list[What], variants: list[Variant], grads: list[Tensor], threads: int, turns: int, rivals: Rivals) -> Iterator[dict]:
    count = max(what.rows for what in whats)
    tensors = Tensors(spec, grads, count)
    runs = {variant: Run(variant.backend, tensors) for variant in variants}
    for variant, run in runs.items():
        variant.use()
        learns = variant.owner not in ("reference", "torch")  # these are slow too
        for turn in range(max(count, STEPS_BEFORE) if learns else count):
            run.encode(turn, row=turn % count)
    device, dtype = grads[0].device.type, str(grads[0].dtype)[6:]
    for what in sorted(whats, key=lambda what: what.action == "rising"):  # which forgets the steps before
        label = f"{spec} {what}, {tensors.n} elements of {dtype}" + (f", {threads} threads" if device == "cpu" else "")
        launch.progress(label)
        times = _rising(runs, what, threads, turns) if what.action == "rising" else _steady(runs, what, threads, turns, rivals, label)
        for variant in variants:
            yield {
                "spec": spec, "what": str(what), "backend": variant.owner, "isa": variant.isa,
                "threads": threads if device == "cpu" else None, "dtype": dtype, "n": tensors.n,
            } | _columns(times, variant, tensors.n, tensors.moved(what))


def _steady(runs: dict[Variant, Run], what: What, threads: int, turns: int, rivals: Rivals, label: str) -> dict:
    tensors = next(iter(runs.values())).tensors
    candidates = _yardsticks(tensors, what, threads) | {variant: partial(run, what) for variant, run in runs.items()}
    spare = tensors.residual.clone()  # torch's own, so that ours stays what our steps left
    if rivals.torch and (body := in_torch.work(tensors, what, spare)):
        bodies = {"torch": body, "compile": in_torch.compiled(body, tensors.grads[0], label) if rivals.compile else None}
        candidates |= {name: _on_gradients(body, tensors.grads) for name, body in bodies.items() if body}
    for body in candidates.values():
        body(0)  # what a first call does once: memory, Triton's compiler
    return in_turns(candidates, turns, tensors.out.device.type, threads, _before(tensors.total))


def _rising(runs: dict[Variant, Run], what: What, threads: int, turns: int) -> dict:
    """The first steps; of each the best of three sequences."""
    tensors = next(iter(runs.values())).tensors
    grads = gradients.alike(tensors.n, tensors.out.dtype, GRADIENTS, tensors.out.device)
    best: dict[Any, dict[int, float]] = {}
    before = _before(tensors.total)
    for variant, run in list(runs.items()) * 3:
        run.grads = grads
        run.restart()
        candidates = _yardsticks(tensors, what, threads) | {variant: partial(run, what)}
        for name, found in in_turns(candidates, turns, tensors.out.device.type, threads, before).items():
            best[name] = {turn: min(seconds, best.get(name, {}).get(turn, seconds)) for turn, seconds in found.items()}
    return best


def _before(like: Tensor) -> Callable[[Any], None]:
    """What is done ahead of each call: its instruction set is chosen, and other memory is read, so that all find the caches alike."""
    other = torch.ones_like(like)

    def before(name: Any) -> None:
        if isinstance(name, Variant):
            name.use()
        other.sum()

    return before


def _yardsticks(tensors: Tensors, what: What, threads: int) -> dict[Any, Callable[[int], object]]:
    total, out, added = tensors.total, tensors.out, [g.float() for g in tensors.grads]
    ours = total.device.type == "cpu" and backends.built("cpu")

    def axpy(turn: int) -> None:
        g = added[(turn + 2) % len(added)]  # not the one that is read next
        _cpu().axpy(total.data_ptr(), g.data_ptr(), g.numel(), threads) if ours else total.add_(g)

    return {"axpy": axpy} | ({"zero_": lambda turn: out.zero_()} if what.action == "decode" else {})


def _on_gradients(body: Callable[[Tensor], Any], grads: list[Tensor]) -> Callable[[int], Any]:
    return lambda turn: body(grads[turn % len(grads)])


def _columns(times: dict, variant: Variant, n: int, moved: int) -> dict[str, Any]:
    mine, axpy = times[variant], times["axpy"]
    best = min(mine.values())
    over = lambda name: min(times[name].values()) / best if name in times else None
    return {
        "bytes": moved, "ns_per_value": best / n * 1e9, "gb_per_s": moved / best / 1e9, "axpy_ns": min(axpy.values()) / n * 1e9,
        "of_axpy": over("axpy"), "median": statistics.median(axpy[turn] / mine[turn] for turn in mine), "of_zero": over("zero_"),
        "vs_torch": over("torch"), "vs_compile": over("compile"), "worst": max(mine.values()) / statistics.median(mine.values()),
    }
