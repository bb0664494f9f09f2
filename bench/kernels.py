"""How fast the kernels are: against the memory (axpy, r += g), against the same work in torch, and in torch.compile.

    python -m commopt bench kernels --spec int8,topk:ratio=0.01 --isas avx2,avx512
    python -m commopt bench kernels --device cuda

A row is a spec, what is done with it, and who does it:

    encode    a gradient to a message, as a plan does it: with error feedback where the spec has `ef=true`
    rising    the same in the first steps, on gradients that resemble each other, whose k-th largest magnitude grows from step
              to step, so that the last one does not foretell the next: here `worst` shows whether top-k had to begin again. Of
              each step the best of three sequences counts
    decode N  the mean of N messages
    resum N   what the owner of a shard does in a two_shot: the sum of N messages, encoded again, without a residual

Without --spec it is every registered method that has messages, by the specs of `python -m commopt wire`, and some more.
What has error feedback off by default has a second row for `encode`, with it. powersgd works in rounds of torch's own matrix
products and has no row: `bench bandwidth` times it. Where no op of ours is used the backend is called torch.

Every row's kernels are first compared with the reference, bit for bit: three steps, a decode and a resum of 200,003 elements.
Then all candidates run in turns on the same buffers, each turn with another gradient, after 32 steps that are not timed and
each time after other memory of a gradient's size was read, so that all find the caches alike. On a GPU the times are its own; on
the CPU, with one thread, CPU times, which other processes disturb little; else wall times. glibc is told to keep what torch
frees, whose times would else be those of the kernel's fresh pages.

    ns/value  the best turn, in nanoseconds per element of the gradient
    GB/s      the bytes that must be moved over the best turn. encode: gradient read, message written, and with error feedback
              the float32 residual read and written; decode N: N messages read, gradient written; resum N: N messages read,
              one written
    of axpy   the best turn of r += g as a fraction of the best turn. It reads a float32 gradient and reads and writes a
              residual: the least that error feedback can do. On the CPU it prefetches too, from the distance that serves it best
    median    the same of the turns, each with its own axpy
    of zero_  of a decode, the best turn of out.zero_(), which only writes, as a fraction of the best turn
    x torch   the best turn of the work as one writes it in torch, over the best turn; - where there is no usual form
    x compile the same of torch.compile of that. ATEN_CPU_CAPABILITY=avx2 in the environment holds both to AVX2
    worst     the slowest turn over the median turn
"""

import argparse
import dataclasses
import os
import platform
from typing import Any

import torch

from .. import __version__, backends
from ..compressors import overview, parse
from . import in_torch, launch
from .kernel_rows import Rivals, Variant, measure
from .kernel_runs import What

MORE = ["int4:rounding=stochastic", "int2:rounding=stochastic", "fp8:rounding=stochastic", "ternary:rounding=nearest", "topk:ratio=0.001",
        "topk:ratio=0.01,values=int8"]
BY_SPEC = {"int8": [What("decode", 8)], "topk": [What("rising")]}  # in the shortest form
BY_COLLECTIVE = {"gather": [What("decode", 4)], "two_shot": [What("resum", 8)]}
ACTIONS = {"encode": 1, "rising": 1, "decode": 2, "resum": 8}  # and of how many rows when it is not said
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SERVING = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}  # device -> the backends for it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", help="specs, separated by blanks or by commas before a name; default: all")
    parser.add_argument("--what", help="of encode, rising, decode N, resum N, separated by commas; default: what fits the spec")
    parser.add_argument("--device", choices=SERVING, default="cpu")
    parser.add_argument("--backends", help="of cpu, cuda, triton, reference, separated by commas; default: what this machine has for the device")
    parser.add_argument("--isas", help="instruction sets of the CPU, separated by commas; default: the best this machine has")
    parser.add_argument("--threads", default="1", help="thread counts on the CPU, separated by commas; 1")
    parser.add_argument("--n", default="16777216", help="elements of the gradient, sizes separated by commas; 16777216")
    parser.add_argument("--dtype", default="float32", help=f"of the gradient: {', '.join(DTYPES)}, separated by commas; float32")
    parser.add_argument("--turns", type=int, default=15, help="of every candidate; 15")
    parser.add_argument("--no-torch", action="store_true", help="compare neither with torch's own sequence nor with torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="do not compare with torch.compile")


def main(args: argparse.Namespace) -> tuple[dict, str]:
    """The result, and the table that shows it."""
    plan = _plan(args.spec, args.what)
    dtypes = [_known("--dtype", name, DTYPES) for name in args.dtype.split(",")]
    sizes, threads = _counts("--n", args.n), _counts("--threads", args.threads)
    if args.turns < 1:
        raise ValueError(f"--turns must be at least 1, got {args.turns}")
    variants = _variants(args.device, args.backends, args.isas)
    if args.device == "cuda":
        threads = threads[:1]  # of no meaning there
    else:
        in_torch.keep_memory()
    rivals = Rivals(not args.no_torch, not args.no_compile)
    rows = list(measure(plan, variants, args.device, threads, sizes, [DTYPES[name] for name in dtypes], args.turns, rivals))
    launch.progress_ends()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    what = {"commopt": __version__, "torch": torch.__version__, "device": args.device, "machine": machine}
    return {"what": what, "rows": rows}, table(rows)


def table(rows: list[dict]) -> str:
    texts = [("spec", "spec", max([len(row["spec"]) for row in rows] + [4]) + 2), ("what", "what", 10), ("backend", "backend", 11),
             ("isa", "isa", 8), ("dtype", "dtype", 10)]
    counts = [("threads", "threads", 7), ("n", "n", 11)]
    figures = [("ns_per_value", "ns/value", 10, 3), ("gb_per_s", "GB/s", 8, 1), ("of_axpy", "of axpy", 9, 2), ("median", "median", 8, 2),
               ("of_zero", "of zero_", 10, 2), ("vs_torch", "x torch", 9, 1), ("vs_compile", "x compile", 11, 2), ("worst", "worst", 7, 2)]
    lines = ["".join(f"{title:<{w}}" for _, title, w in texts) + "".join(f"{title:>{w}}" for _, title, w, *_ in counts + figures)]
    for row in rows:
        lines.append("".join(f"{row[key] or '-':<{w}}" for key, _, w in texts) + "".join(f"{row[key] or '-':>{w}}" for key, _, w in counts)
                     + "".join(f"{'-' if row[key] is None else format(row[key], f'.{digits}f'):>{w}}" for key, _, w, digits in figures))
    return "\n".join(lines)


def _plan(specs: str | None, whats: str | None) -> dict[str, list[What]]:
    """Spec -> what is done with it."""
    asked = [_what(text) for text in whats.split(",")] if whats else None
    plan: dict[str, list[What]] = {}
    for spec in launch.split_specs(specs) if specs else [*(row["spec"] for row in overview()), *MORE]:
        compressor = parse(spec)
        if compressor.collective in ("sum", "rounds"):
            if specs:
                raise ValueError(f"--spec: {spec} has no messages to encode: " + (
                    "it works in rounds of torch's own matrix products, see `bench bandwidth`" if compressor.collective == "rounds"
                    else "it sends the gradient itself"))
            continue
        fitting = [What("encode"), What("decode", 2), *BY_SPEC.get(str(compressor), []), *BY_COLLECTIVE.get(compressor.collective, BY_COLLECTIVE["gather"])]
        chosen = fitting if asked is None else [w for w in asked if w.action != "resum" or compressor.collective == "two_shot"]
        if chosen:
            plan[spec] = chosen
        takes_ef = any(field.name == "ef" for field in dataclasses.fields(compressor))
        if not specs and takes_ef and not compressor.ef and What("encode") in chosen:
            plan[str(dataclasses.replace(compressor, ef=True))] = [What("encode")]
    if not plan:
        raise ValueError(f"--what {whats}: there is nothing to time, of these specs none is resent in a two_shot")
    return plan


def _what(text: str) -> What:
    action, _, rows = text.strip().partition(" ")
    _known("--what", action, ACTIONS)
    if rows and (action in ("encode", "rising") or not rows.strip().isdecimal() or int(rows) < 1):
        raise ValueError(f"--what: {text.strip()!r} should be {action}" + (" and a number of rows" if action in ("decode", "resum") else ""))
    return What(action, int(rows or ACTIONS[action]))


def _variants(device: str, names: str | None, isas: str | None) -> list[Variant]:
    """Who is to do the work: backends, the one for the CPU with each of the instruction sets."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    native = [name for name in SERVING[device] if name != "reference" and backends.built(name)]
    chosen = names.split(",") if names else native or ["reference"]
    for name in chosen:
        _known("--backends", name, backends.NAMES)
        if name == "triton" and (device == "cpu" or os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError("--backends: triton on the CPU is its interpreter, whose time says nothing about the kernels; "
                             "it is timed with --device cuda, without TRITON_INTERPRET")
        if name not in SERVING[device]:
            raise ValueError(f"--backends: {name} does not serve --device {device}; {', '.join(SERVING[device])} do")
        if not backends.built(name):
            raise ValueError(f"--backends: {name} is not part of this installation; see `python -m commopt info`")
    if isas and "cpu" not in chosen:
        raise ValueError(f"--isas is for the backend cpu, which is not among {', '.join(chosen)}")
    return [Variant(name, isa) for name in chosen for isa in (_isas(isas) if name == "cpu" else [None])]


def _isas(names: str | None) -> list[str]:
    from .. import _C

    return [_known("--isas", name, _C.cpu.isas()) for name in names.split(",")] if names else _C.cpu.isas()[-1:]


def _known(option: str, name: str, names: Any) -> str:
    if name not in names:
        raise ValueError(f"{option}: unknown {name!r}; known are {', '.join(names)}")
    return name


def _counts(option: str, text: str) -> list[int]:
    try:
        counts = [int(item) for item in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise ValueError(f"{option} must be whole numbers from 1 on, separated by commas, got {text!r}")
    return counts
