"""What the README shows works as it is written."""

import importlib
import pathlib
import re

import torch

import commopt
from commopt import backends
from commopt.__main__ import BENCHES, main
from commopt.bench import accuracy, candidates, launch
from commopt.compressors import base, overview
from commopt.wire import Layout

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_method_of_your_own():
    block = re.search(r"```python\n(@commopt\.register.*?)```", README, re.S).group(1)
    name = re.search(r'register\("(\w+)"\)', block).group(1)
    try:
        exec(block, {"commopt": commopt, "torch": torch})
        n, kernels = 100_000, backends.select("cpu")
        layout = Layout(commopt.parse(name).fields(n))
        assert commopt.wire_bytes(name, n) == layout.nbytes and abs(layout.nbytes / n - 0.625) < 1e-3  # as its docstring says
        row = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
        x, out = torch.randn(n, generator=torch.Generator().manual_seed(0)), torch.empty(n)
        for residual in (torch.zeros(n), None):
            compressor = commopt.parse(name if residual is not None else f"{name}:ef=false")
            compressor.encode(kernels, x, residual, *(field[0] for field in layout.views(row)))
            compressor.decode_sum(kernels, out, 1.0, *layout.views(row))
            assert (x - out).abs().max() <= x.abs().max() / 14 * 1.0001
            assert residual is None or torch.equal(out + residual, x)
    finally:
        base._table.classes.pop(name, None)


def test_the_table_of_specs_is_that_of_the_registry():
    """What `python -m commopt wire` shows, as Markdown."""
    rows = [row for row in overview() if type(commopt.parse(row["spec"])).__module__.startswith("commopt.")]
    table = "".join(f"| `{r['spec']}` | {r['bits']:.3g} | {r['bias']} | {r['collective']} | {r['when']} |\n" for r in rows)
    assert table in README, f"the README's table should be\n{table}"


def test_exactly_two_commands_set_up_and_run():
    commands = [line for line in README.splitlines() if "pip install" in line]
    assert len(commands) == 2 and commands[0].endswith("-m commopt bench accuracy") and commands[1].endswith("-m pytest")


def test_the_page_of_the_benches_says_what_help_says():
    """Every number that a bench defines, word for word."""
    page = (pathlib.Path(__file__).parent.parent / "bench/README.md").read_text()
    for name in [*BENCHES, "wrong"]:
        defined = [line for line in importlib.import_module(f"commopt.bench.{name}").__doc__.splitlines() if line.startswith("    ")]
        missing = [line for line in defined if line[4:] not in page and not line[4:].startswith(("python", "torchrun"))]
        assert not missing, f"bench/README.md lacks these lines of bench {name}:\n" + "\n".join(line[4:] for line in missing)
        assert name == "wrong" or f"\n## {name}\n" in page


def test_every_command_of_the_pages_is_taken(monkeypatch):
    """Each command for a figure is one that its bench understands."""
    pages = README + (pathlib.Path(__file__).parent.parent / "bench/README.md").read_text()
    commands = set(re.findall(r"`python -m commopt bench (\w+) ([^`]*)`", pages.replace("\n", " ")))
    commands.discard(("NAME", "--help"))
    assert len(commands) > 15 and {name for name, _ in commands} == set(BENCHES)
    for name, options in commands:
        module, taken = importlib.import_module(f"commopt.bench.{name}"), []
        monkeypatch.setattr(module, "main", taken.append)
        assert main(["bench", name, *options.split()]) == 0, (name, options)
        specs = accuracy.RECOMMENDED if taken[0].spec == "recommended" else launch.split_specs(taken[0].spec or "none")
        candidates.check([spec for spec in specs if not candidates.missing(spec)])
