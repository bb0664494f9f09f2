"""Builds commopt._C with ninja, g++ and, where it is found, nvcc. Never imports torch: one wheel serves every version.

COMMOPT_CUDA=1 makes a missing nvcc an error, COMMOPT_CUDA=0 leaves CUDA out. COMMOPT_CUDA_ARCHS="90" or "80;90" names
the GPU architectures; the default covers sm_80, 90, 100, 120 and, by PTX of the lowest, what comes later.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ISAS = {"base": "", "avx2": "-mavx2 -mbmi2", "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512cd -mbmi2"}


def nvcc() -> str | None:
    """The CUDA compiler to use, or None for a CPU build."""
    wanted = os.environ.get("COMMOPT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"COMMOPT_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not found and (default := Path("/usr/local/cuda/bin/nvcc")).exists():
        found = str(default)
    if not found and wanted == "1":
        raise SystemExit("COMMOPT_CUDA=1, but nvcc was not found: put it on PATH or set CUDACXX")
    return os.path.realpath(found) if found else None  # called by a link, nvcc does not find what belongs to it


def archs() -> tuple[list[str], list[str]]:
    """The GPU architectures as nvcc flags, and their names."""
    names = os.environ.get("COMMOPT_CUDA_ARCHS", "80;90;100;120").replace(",", ";").split(";")
    flags = [f"-gencode arch=compute_{a},code=sm_{a}" for a in names]
    return flags + [f"-gencode arch=compute_{names[0]},code=compute_{names[0]}"], names


def write_ninja(path: Path, output: Path) -> None:
    """build.ninja: one object per source and, for the CPU loops, per instruction set; then one link."""
    import pybind11

    # Isolated builds see pybind11 at a new path each time; a copy at a fixed place keeps the objects valid.
    headers = path.parent / f"pybind11-{pybind11.__version__}"
    if not headers.exists():
        shutil.copytree(pybind11.get_include(), headers)
    objects = path.parent / f"obj-{sys.implementation.cache_tag}"
    shared = path.parent / "obj"
    cuda = nvcc()
    gencode, names = archs()
    include = f"-I{headers} -I{sysconfig.get_path('include')}"
    flags = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-trapping-math -Wall -MMD -MF $out.d"
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"nvcc = {cuda or ''}",
        f"rule cxx\n  command = $cxx {flags} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule cuda\n  command = $nvcc -O3 -std=c++17 --fmad=false --threads=0 --compress-mode=size -Xcompiler -fPIC,-fvisibility=hidden,"
        f"-ffp-contract=off {' '.join(gencode)} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link_cxx\n  command = $cxx -shared -s -o $out $in -lpthread",
        "rule link_cuda\n  command = $nvcc -shared -cudart static -Xlinker -s -o $out $in -lpthread",
    ]
    built = []

    def compile(rule: str, source: Path, target: Path, extra: str = "") -> None:
        built.append(target)
        lines.append(f"build {target}: {rule} {source}\n  flags = {extra}")

    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.name == "kernels.cpp":
            for isa, march in ISAS.items():
                compile("cxx", source, shared / f"kernels_{isa}.o", f"-DCOMMOPT_ISA={isa} {march}")
        else:
            compile("cxx", source, shared / f"{source.stem}.o")
    if cuda:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            compile("cuda", source, shared / f"{source.stem}.cu.o")
        said = subprocess.run([cuda, "-dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        if "TOP=" not in said:
            raise SystemExit(f"{cuda} does not say where its CUDA is (`nvcc -dryrun -c x.cu` has no TOP=): set CUDACXX to the nvcc of a whole CUDA toolkit, or COMMOPT_CUDA=0")
        home = Path(said.split("TOP=")[1].split("\n")[0].strip())
        include += f" -I{home / 'include'} '-DCOMMOPT_CUDA=\"{';'.join(names)}\"'"
    compile("cxx", ROOT / "csrc/bind.cpp", objects / f"bind{'_cuda' if cuda else ''}.o", include)
    lines.append(f"build {output}: link_{'cuda' if cuda else 'cxx'} {' '.join(map(str, built))}")
    path.write_text("\n".join(lines) + "\n")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        directory = ROOT / "build" / "ninja"
        directory.mkdir(parents=True, exist_ok=True)
        write_ninja(directory / "build.ninja", output)
        try:
            import ninja

            program = str(Path(ninja.BIN_DIR) / "ninja")
        except ImportError:
            program = shutil.which("ninja") or sys.exit("ninja was not found: pip install ninja")
        subprocess.run([program, "-C", str(directory)] + (["-v"] if self.verbose > 1 else []), check=True)


setup(ext_modules=[Extension("commopt._C", [])], cmdclass={"build_ext": NinjaBuild})
