"""The command line: `python -m commopt info | wire | bench | report`. Exit status: 0, 1 for the machine's errors, 2 for the caller's."""

import argparse
import importlib
import json
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends
from .compressors import never_larger, overview, parse, wire_bytes
from .installation import HOW_TO_BUILD, HOW_TO_CUDA, info
from .wire import Layout

BENCHES = {
    "kernels": "speed of the kernels, against the memory, torch and torch.compile",
    "collectives": "what an exchange costs by each collective, predicted and measured",
    "bandwidth": "of exchanges of every size, as nccl-tests shows it, by each spec",
    "step": "what a training step takes under each schedule, and when its parts are at work",
    "hook": "what the hook itself costs: host, kernels launched, and what backward loses",
    "accuracy": "loss of four tasks on what they have not seen, against bytes and seconds",
    "rivals": "ours against PyTorch's own hooks and other peers: communication of the best that keep the loss",
}
JSON_HELP = "write JSON to FILE; - is standard output"
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _info_text(found: dict[str, Any]) -> str:
    cpu, cuda = found["cpu"], found["cuda"]
    rows = [
        ("commopt", f"{found['commopt']}, Python {found['python']}, torch {found['torch']}"),
        ("commopt._C", "built" if cpu else f"not built; {HOW_TO_BUILD}"),
        ("CPU kernels", f"{cpu['isa']} in use, of {', '.join(cpu['isas'])}; {cpu['threads']} threads" if cpu else "none"),
        ("CUDA kernels", f"sm_{', sm_'.join(cuda['archs'])} and PTX; CUDA runtime {cuda['runtime']}" if cuda
         else f"none: this is a CPU-only build. For CUDA, {HOW_TO_CUDA}"),
        ("Triton", found["triton"] or "not installed"),
        ("GPU", ", ".join(f"{gpu['name']} (sm_{gpu['arch']})" for gpu in found["gpus"]) or "none seen by torch"),
        ("networks", f"gloo {'available' if found['gloo'] else 'missing'}, NCCL {found['nccl'] or 'not in this torch'}"),
    ]
    lines = [f"{name:<14}{value}" for name, value in rows]
    lines += ["", f"{'op':<20}" + "".join(f"{'on ' + device:<12}" for device in found["ops"])]
    lines += [f"{op:<20}" + "".join(f"{owners[op]:<12}" for owners in found["ops"].values()) for op in backends.OPS]
    for kind in ("warnings", "errors"):
        lines += ["", *(f"{kind[:-1]}: {text}" for text in found[kind])] if found[kind] else []
    return "\n".join(lines)


def wire(spec: str, n: int, dtype: str) -> dict[str, Any]:
    """The layout of one message for a gradient of n elements."""
    total = wire_bytes(spec, n, DTYPES[dtype])
    compressor = parse(spec)
    sent = never_larger(compressor, n, DTYPES[dtype])
    if sent.name == "none":
        layout = Layout([("gradient", DTYPES[dtype], n)])
    else:
        layout = Layout(sent.fields(n))
    fields = [
        {"name": name, "dtype": str(kind)[6:], "count": count, "offset": offset, "bytes": count * kind.itemsize}
        for (name, kind, count), offset in zip(layout.fields, layout.offsets)
    ]
    return {
        "spec": str(compressor), "sent_as": str(sent), "n": n, "dtype": str(DTYPES[dtype])[6:], "fields": fields, "total": total,
        "ratio": 4 * n / total if total else 1.0,
    }


def _wire_text(layout: dict[str, Any]) -> str:
    lines = [f"{'field':<12}{'dtype':<12}{'count':>14}{'offset':>14}{'bytes':>14}"]
    lines += [f"{f['name']:<12}{f['dtype']:<12}{f['count']:>14}{f['offset']:>14}{f['bytes']:>14}" for f in layout["fields"]]
    lines.append(f"{'total':<52}{layout['total']:>14}")
    lines.append(f"{layout['spec']} on {layout['n']} elements of {layout['dtype']}: {layout['ratio']:.2f} times smaller than float32")
    if layout["sent_as"] != layout["spec"]:
        lines.append("its message would be no smaller than the gradient, so the gradient itself is sent")
    return "\n".join(lines)


def _overview_text(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["spec"]) for row in rows) + 2
    lines = [f"{'spec':{width}}{'bits/value':>10}  {'bias':<16}{'collective':<12}when to use it"]
    return "\n".join(lines + [f"{r['spec']:{width}}{r['bits']:>10.3f}  {r['bias']:<16}{r['collective']:<12}{r['when']}" for r in rows])


def _show(value: dict[str, Any], text: str, path: str | None) -> None:
    """Prints the text, or writes the value as JSON to a file or, for -, to stdout in the text's place."""
    if path == "-":
        print(json.dumps(value, indent=1))
        return
    if path:
        Path(path).write_text(json.dumps(value, indent=1) + "\n")
    print(text)


def _bench(name: str, argv: list[str]) -> int:
    module = importlib.import_module(f"commopt.bench.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m commopt bench {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help=JSON_HELP)
    args = parser.parse_args(argv)
    if args.json not in (None, "-") and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"--json: there is no directory {Path(args.json).resolve().parent}")  # said before hours of work, not after
    found = module.main(args)
    if found is None:  # another rank shows it
        return 0
    result, text = found
    named = {"bench": name, "command": shlex.join(["python", "-m", "commopt", "bench", name, *argv]),
             "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    _show(named | result, text, args.json)
    return 0


def _report(files: list[str], output: str) -> None:
    """Writes the page of these files, or prints it for -."""
    to = Path(output)
    if output != "-" and not to.resolve().parent.is_dir():
        raise ValueError(f"-o: there is no directory {to.resolve().parent}")
    if to.resolve() in [Path(file).resolve() for file in files]:
        raise ValueError(f"-o: {output} is one of the files to read, and would be lost")
    text = importlib.import_module("commopt.bench.report").page(files)
    if output == "-":
        print(text, end="")
        return
    to.write_text(text, encoding="utf-8")
    print(f"wrote {output}; open it in a browser: {to.resolve().as_uri()}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m commopt", description="Compressed gradient exchange for data-parallel PyTorch training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("info", help="what is built, which backend serves which op, and warnings")
    command.add_argument("--json", metavar="FILE", help=JSON_HELP)
    command = commands.add_parser("wire", help="fields and bytes of a spec's message; without one, all specs")
    command.add_argument("spec", metavar="SPEC", nargs="?", help="for example topk:ratio=0.01")
    command.add_argument("n", metavar="N", type=int, nargs="?", default=1 << 24, help="number of gradient elements, for example 25_000_000")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the gradient")
    command.add_argument("--json", metavar="FILE", help=JSON_HELP)
    # A bench brings its own options, see _bench: this one only knows the names.
    names = "\n".join(f"  {name:<12}{text}" for name, text in BENCHES.items())
    command = commands.add_parser("bench", help="measure; `bench NAME --help` tells how", epilog=f"benches:\n{names}",
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("name", metavar="NAME", choices=BENCHES, help=", ".join(BENCHES))
    command = commands.add_parser("report", help="one HTML page with charts of what benches measured and training runs logged")
    command.add_argument("files", metavar="FILE", nargs="+", help="of `bench NAME --json FILE`, or of handle.log_to(commopt.jsonl(FILE))")
    command.add_argument("-o", "--output", metavar="FILE", default="report.html", help="the page, report.html by default; - is standard output")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["bench"] and argv[1:2] and argv[1] in BENCHES:
            return _bench(argv[1], argv[2:])
        args = _parser().parse_args(argv)
        if args.command == "info":
            found = info()
            _show(found, _info_text(found), args.json)
            return 1 if found["errors"] else 0
        if args.command == "report":
            _report(args.files, args.output)
            return 0
        if args.spec is None:
            rows = overview(args.n)
            _show({"specs": rows}, _overview_text(rows), args.json)
            return 0
        layout = wire(args.spec, args.n, args.dtype)
        _show(layout, _wire_text(layout), args.json)
        return 0
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except (RuntimeError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


if __name__ == "__main__":
    sys.exit(main())
