"""The layers of the design: imports point down only, and importing commopt costs and starts nothing."""

import ast
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

# A module may import those to its left, and of its own layer. kernels/ is commopt.kernels, bench/ is commopt.bench.
LAYERS = [["kernels", "_C"], ["backends"], ["spec", "wire"], ["compressors"], ["plan", "residual"], ["collectives"], ["schedulers"],
          ["hooks"], ["tuning"], ["trainers"], ["installation"], ["__init__"], ["__main__"], ["bench"]]
NOTHING_OF_OURS = {"spec": ["spec"], "wire": ["wire"], "kernels": ["kernels"], "compressors": ["spec", "wire", "compressors"]}
VERSION_ONLY = {"__version__"}  # what anybody may take from the package itself


def _level(layer: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if layer in names)


def _files():
    for folder, package in ((ROOT / "commopt", ""), (ROOT / "kernels", "kernels"), (ROOT / "bench", "bench")):
        for path in sorted(folder.rglob("*.py")):
            parts = [p for p in [package, *path.relative_to(folder).with_suffix("").parts] if p]
            yield path, parts


def _imports(path: pathlib.Path, parts: list[str]):
    """(line, module of ours as parts, names) of each import in the file."""
    package = parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "commopt":
                    yield node.lineno, alias.name.split(".")[1:], []
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if node.level:
                base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            elif node.module and node.module.split(".")[0] == "commopt":
                base = node.module.split(".")[1:]
            else:
                continue
            if base:
                yield node.lineno, base, names
            else:  # from .. import backends, __version__
                for name in names:
                    yield node.lineno, [name] if name in sum(LAYERS, []) else ["__init__"], [name]


def test_imports_point_down_only():
    wrong = []
    for path, parts in _files():
        layer = parts[0] if parts != ["__init__"] else "__init__"
        for line, module, names in _imports(path, parts):
            target = module[0] if module else "__init__"
            if set(names) <= VERSION_ONLY and names and target == "__init__":
                continue
            fine = _level(target) <= _level(layer) and target in NOTHING_OF_OURS.get(layer, [target])
            if not fine:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {layer} imports {target} ({', '.join(names)})")
    assert not wrong, "\n".join(wrong)


def test_a_collective_knows_compressors_only_through_the_base_class():
    names = [p.stem for p in (ROOT / "commopt/compressors").glob("*.py") if p.stem not in ("base", "__init__")]
    assert {"topk", "quantize", "bf16"} <= set(names)
    for folder in ("collectives", "hooks"):
        for path in (ROOT / "commopt" / folder).glob("*.py"):
            for line, module, _ in _imports(path, [folder, path.stem]):
                assert module[0] != "compressors" or module[-1] not in names, f"{path}:{line}"


def test_files_are_named_for_what_they_do():
    for path, _ in _files():
        assert not re.search("util|helper|common|misc|config", path.stem), path
    for path in sorted((ROOT / "commopt/hooks").glob("*.py")):
        assert "from __future__ import annotations" not in path.read_text(), f"{path}: DDP refuses a hook with annotations that are text"


def _fresh(code: str) -> dict:
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


IMPORT = """
import json, os, sys, threading, time
import numpy, torch
threads = len(os.listdir("/proc/self/task"))
begin, cpu = time.perf_counter(), time.process_time()
import commopt
print(json.dumps({
    "seconds": time.process_time() - cpu, "threads": len(os.listdir("/proc/self/task")) - threads, "python": threading.active_count(),
    "modules": sorted(sys.modules), "cuda": torch.cuda.is_initialized(), "random": torch.initial_seed() == torch.default_generator.initial_seed(),
}))
"""


def test_importing_commopt_costs_and_starts_nothing():
    """Processor time beyond torch's, median of three: a busy machine does not count."""
    runs = [_fresh(IMPORT) for _ in range(3)]
    for r in runs:
        assert r["threads"] == 0 and r["python"] == 1, "a thread was started"
        assert not r["cuda"], "a CUDA context was made"
        loaded = [m for m in r["modules"] if m.split(".")[0] in ("triton", "pybind11", "setuptools", "accelerate", "transformers", "lightning")
                  or m in ("commopt.kernels", "commopt.bench", "torch._dynamo", "torch._inductor")]
        assert not loaded, loaded
    seconds = sorted(r["seconds"] for r in runs)
    assert seconds[1] < 0.2, f"import commopt takes {seconds} s beyond import torch"


def test_the_public_names_are_those_of_the_design():
    names = _fresh("import json, commopt; print(json.dumps({'all': commopt.__all__, 'have': [n for n in commopt.__all__ if hasattr(commopt, n)]}))")
    assert names["all"] == names["have"]
    assert {"attach", "State", "hook", "parse", "register", "wire_bytes", "compressors", "Compressor"} <= set(names["all"])


def test_every_package_is_installed():
    said = set(re.findall(r'"(commopt[\w.]*)"', re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]))
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "commopt").rglob("__init__.py")}
    beside = {".".join(("commopt", *path.parent.relative_to(ROOT).parts)) for folder in ("bench", "kernels") for path in (ROOT / folder).rglob("__init__.py")}
    assert said == there | beside and {"commopt.bench", "commopt.bench.report", "commopt.kernels"} <= beside
