"""Builds the emulated CUDA backend with g++ and ninja under build/emulator; nothing is compiled twice."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))


def ninja(directory: Path, text: str) -> None:
    """Runs a build.ninja in `directory`; RuntimeError with the compiler's words when it fails."""
    try:
        import ninja

        program = str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        program = shutil.which("ninja")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text(text)
    done = subprocess.run([program, "-C", str(directory)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def rules(flags: str) -> list[str]:
    compile = f"g++ -x c++ -std=c++17 -fPIC -ffp-contract=off -Wall -Werror -Wno-unknown-pragmas {flags} -I{HERE}"
    return [f"rule cxx\n  command = {compile} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = g++ {flags} $flags -o $out $in"]


def module(name: str = "module", **instead: Path) -> Path:
    """The path of the Python module _emulated; half=path takes that file in place of csrc/cuda/half.cu."""
    import pybind11

    directory, shared = ROOT / "build/emulator" / name, ROOT / "build/emulator/module"
    output = "_emulated" + sysconfig.get_config_var("EXT_SUFFIX")
    include = f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    lines, objects = rules("-O1 -fvisibility=hidden"), [shared / "bind.o"]
    lines.append(f"build {objects[0]}: cxx {HERE / 'bind.cpp'}\n  flags = {include}")
    for source in SOURCES:
        chosen = instead.get(source.stem)
        objects.append((directory if chosen else shared) / f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: cxx {chosen or source}")
    lines.append(f"build {output}: link {' '.join(map(str, objects))}\n  flags = -shared")
    ninja(directory, "\n".join(lines) + "\n")
    return directory / output


def bounds_program() -> Path:
    """The path of the program bounds.cpp, under AddressSanitizer."""
    directory = ROOT / "build/emulator/bounds"
    lines = rules("-O1 -g1 -fsanitize=address")
    for source in [*SOURCES, HERE / "bounds.cpp"]:
        lines.append(f"build {source.stem}.o: cxx {source}")
    lines.append(f"build bounds: link bounds.o {' '.join(s.stem + '.o' for s in SOURCES)}")
    ninja(directory, "\n".join(lines) + "\n")
    return directory / "bounds"
