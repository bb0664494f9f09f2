"""What nvcc makes of csrc/cuda, read from its machine code: no spills, no operation fused, no fence in a hot kernel.

The nvcc here need not come with a disassembler; the Triton wheel does.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHS = ("80", "90", "100", "120")


def nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def disassembler() -> Path | None:
    triton = importlib.util.find_spec("triton")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return tool if tool and tool.exists() else None


pytestmark = [
    pytest.mark.skipif(nvcc() is None, reason="needs nvcc"),
    pytest.mark.skipif(disassembler() is None, reason="needs the cuobjdump of the Triton wheel"),
]


def compile(source: Path, target: Path, archs: tuple[str, ...], *flags: str) -> str:
    """Compiles for `archs` and returns what nvcc said."""
    gencode = [word for a in archs for word in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    done = subprocess.run([nvcc(), "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-Wall,-Wextra", "--threads=2", *flags, *gencode, "-c", str(source), "-o", str(target)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def built(source: Path) -> Path | None:
    """The object that setup.py left, if it is newer than all it was made from."""
    target = ROOT / "build/ninja/obj" / f"{source.stem}.cu.o"
    made_from = [source, *(ROOT / "csrc").rglob("*.h")]
    return target if target.exists() and all(p.stat().st_mtime < target.stat().st_mtime for p in made_from) else None


def kernels_of(target: Path) -> dict[tuple[str, str], list[str]]:
    """(arch, "file: mangled name") -> the instructions, each with its operands."""
    listing = subprocess.run([disassembler(), "-sass", str(target)], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"\n\s*code for sm_", listing)[1:]:
        arch = part[: part.index("\n")].strip()
        for function in part.split("Function : ")[1:]:
            name = function[: function.index("\n")].strip()
            # Each build invents another name for the unnamed namespace.
            name = f"{target.stem.split('.')[0]}: " + re.sub(r"\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}_?", "", name)
            found[arch, name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", function)
    return found


def mnemonic(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+ +", "", instruction).split(" ")[0]


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> dict:
    """The kernels of all sources as they ship: from the last build, or else compiled here for one architecture."""
    directory = tmp_path_factory.mktemp("objects")

    def take(source: Path) -> dict:
        target = built(source)
        if target is None:
            target = directory / f"{source.stem}.o"
            compile(source, target, ("90",), "--fmad=false")
        return kernels_of(target)

    with ThreadPoolExecutor(2) as pool:
        return {key: kernel for kernels in pool.map(take, SOURCES) for key, kernel in kernels.items()}


def count(kernel: list[str], *names: str) -> int:
    return sum(mnemonic(i).startswith(names) for i in kernel)


def test_nothing_is_spilled(code):
    assert code
    for key, kernel in code.items():
        assert kernel and not count(kernel, "LDL", "STL"), key


def test_there_are_no_fences(code):
    """No block waits for what another writes: kernels of one stream run in order."""
    assert not {name for (_, name), kernel in code.items() if count(kernel, "MEMBAR", "CCTL")}


def test_gradient_and_residual_move_16_bytes_at_a_time(code):
    for (arch, name), kernel in code.items():
        if re.search(":.*(encode|select|keep)", name) and "add_to" not in name:
            assert count(kernel, "LDG.E.128") >= (2 if "Total" in name else 3), (arch, name)  # which has codes for a gradient
        if re.search(":.*(encode|select|keep)", name):
            assert count(kernel, "STG.E.128") >= 2, (arch, name)


def test_no_operation_is_fused(code, tmp_path):
    """--fmad=false changes no kernel: the intrinsics of csrc/codec alone keep every product and sum rounded by itself.
    The fused operations that there are belong to IEEE division, and no decoder divides but that of a shared scale."""

    arch = min(arch for arch, _ in code)

    def take(source: Path) -> dict:
        target = tmp_path / f"{source.stem}.o"
        said = compile(source, target, (arch,), "--fmad=true")
        assert "warning" not in said, said
        return kernels_of(target)

    with ThreadPoolExecutor(2) as pool:
        free = {key: kernel for kernels in pool.map(take, SOURCES) for key, kernel in kernels.items()}
    for key, kernel in free.items():
        assert count(kernel, "FFMA") == count(code[key], "FFMA"), key
    for key, kernel in code.items():
        if re.search(":.*(decode|histogram|count)", key[1]) and "Summed" not in key[1]:  # whose scale is a quotient
            assert count(kernel, "FFMA") == 0, key


def test_every_architecture_compiles(tmp_path):
    """The largest file for all targets, unless the build has them all and test_nothing_is_spilled has seen them."""
    source = ROOT / "csrc/cuda/topk.cu"
    target = built(source)
    if target and {arch for arch, _ in kernels_of(target)} >= set(ARCHS):
        return
    target = tmp_path / "topk.o"
    compile(source, target, ARCHS, "--fmad=false")
    kernels = kernels_of(target)
    assert {arch for arch, _ in kernels} == set(ARCHS)
    test_nothing_is_spilled(kernels)
