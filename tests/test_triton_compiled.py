"""Every Triton kernel compiles for NVIDIA and AMD, with no GPU in sight, and no multiplication is fused with an addition:
that would give other bits than the reference has. What is compiled is what the backend launches, recorded from its calls."""

import ast
import os
import re
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

if os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter replaces the compiler in the whole process

    def test_in_a_process_without_the_interpreter():
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=600,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

else:
    from types import SimpleNamespace

    import op_cases
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from commopt import kernels
    from commopt.backends import triton as backend
    from commopt.backends.native import bind

    NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    POINTER = {
        torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.uint8: "*u8",
        torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    }

    def recorded(calls, monkeypatch) -> list:
        """The launches of calls(ops) as (kernel, arguments by name, options), each kind once."""
        launches = {}

        class Recorder:
            def __init__(self, kernel):
                self.kernel = kernel

            def __getitem__(self, grid):
                def launch(*args, num_warps, enable_fp_fusion, **constants):
                    assert enable_fp_fusion is False
                    given = dict(zip(self.kernel.arg_names, args)) | constants
                    options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
                    key = (self.kernel.__name__, str(signature(self.kernel, given)))
                    launches.setdefault(key, (self.kernel, given, options))

                return launch

        original = backend._launch
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        monkeypatch.setattr(backend, "_launch", lambda device, kernel, *a, **named: original(device, Recorder(kernel), *a, **named))
        calls(SimpleNamespace(**bind(SimpleNamespace(**backend._LAUNCHERS), "cpu", lambda device: device, addresses=False)))
        return list(launches.values())

    def signature(kernel, given: dict, wide: bool = False) -> tuple[dict, dict, dict]:
        """Types, constants and alignments as Triton derives them at a launch. wide: integers as if beyond 2^31."""
        types, constants, aligned = {}, {}, {}
        for i, (parameter, name) in enumerate(zip(kernel.params, kernel.arg_names)):
            value, fixed = given[name], parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
                types[name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[name] = POINTER[value.dtype]
                if value.data_ptr() % 16 == 0:
                    aligned[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i64" if name in ("n", "k") and wide else "i32"
                if value % 16 == 0 and not fixed:
                    aligned[(i,)] = [["tt.divisibility", 16]]
        return types, constants, aligned

    def compiled(launch, target: GPUTarget, wide: bool = False):
        kernel, given, options = launch
        return triton.compile(ASTSource(kernel, *signature(kernel, given, wide)), target=target, options=options)

    def one_at_a_time(function):
        """CPython 3.11 counts how deep it is for all threads together, and fails where two parse."""
        lock = threading.Lock()

        def call(*args, **named):
            with lock:
                return function(*args, **named)

        return call

    def all_compiled(launches: list, target: GPUTarget, wide: bool = False) -> list[tuple[str, dict]]:
        """Each kernel's name and its code in all stages."""
        with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
            patch.setattr(ast, "parse", one_at_a_time(ast.parse))
            return [(launch[0].__name__, made.asm) for launch, made in zip(launches, pool.map(lambda launch: compiled(launch, target, wide), launches))]

    def every_kernel(ops) -> None:
        n = 3 * 4096
        op_cases.run(ops, "dense", n, "normal", torch.bfloat16, values=torch.bfloat16)
        op_cases.run(ops, "half", n, "normal", torch.float32, block=1024)
        op_cases.run(ops, "quant", n, "normal", torch.bfloat16, bits=8, block=256, stochastic=False)
        op_cases.run(ops, "quant", n, "normal", torch.float32, bits=4, block=128, stochastic=True)
        op_cases.run(ops, "quant", n, "normal", torch.float32, bits=2, block=64, stochastic=False)
        op_cases.run(ops, "shared", n, "normal", torch.bfloat16, levels=127, block=256, stochastic=False)
        op_cases.run(ops, "shared", n, "normal", torch.float32, levels=1, block=128, stochastic=True)
        op_cases.run(ops, "ternary", n, "normal", torch.float32, block=320, stochastic=True)
        op_cases.run(ops, "sign", n, "normal", torch.bfloat16, block=1024)
        op_cases.run(ops, "hadamard", n, "normal", torch.float32)
        op_cases.run(ops, "topk", 65536 + n, "normal", torch.float32, k=64)
        op_cases.run(ops, "threshold", 65536 + n, "normal", torch.float32, k=64)
        op_cases.run(ops, "blocktopk", n, "normal", torch.float32, k=10)
        op_cases.run(ops, "randomk", n, "normal", torch.float32, k=120, scaled=True)
        ops.bits_pack(torch.zeros(n, dtype=torch.int16), torch.zeros(n * 10 // 8, dtype=torch.uint8), 10)
        ops.bits_unpack(torch.zeros(n * 10 // 8, dtype=torch.uint8), torch.zeros(n, dtype=torch.int16), 10)

    def every_way(ops) -> None:
        """One element, no residual, ragged, unaligned, blocks of any size: each of them is compiled anew."""
        op_cases.run(ops, "topk", 1, "normal", torch.float16, k=1, rows=1, offset=1)
        for op, options in [
            ("dense", {"values": torch.float32}), ("half", {"block": 8}), ("quant", {"bits": 4, "block": 24, "stochastic": False}),
            ("quant", {"bits": 8, "block": 5000, "stochastic": True}), ("ternary", {"block": 1280, "stochastic": False}),
            ("shared", {"levels": 7, "block": 5000, "stochastic": False}),
            ("sign", {"block": 24}), ("hadamard", {}),
        ]:
            op_cases.run(ops, op, 5003, "normal", torch.float16, residual=False, offset=1, rows=1, **options)

    @pytest.fixture(autouse=True)
    def empty_cache(monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def test_every_kernel_is_compiled_here(monkeypatch):
        launched = {kernel.__name__ for kernel, _, _ in recorded(every_kernel, monkeypatch)}
        families = ("dense", "half", "quant", "quant_shared", "ternary", "sign", "hadamard", "topk", "threshold", "bits", "eliasfano", "blocktopk", "randomk")
        methods = [getattr(kernels, name) for name in families]
        defined = {name for m in methods for name in vars(m) if re.fullmatch(rf"({'|'.join(families)}|sparse)_\w+", name)} - {"bits_of"}
        assert launched == defined

    def test_other_ways_to_launch(monkeypatch):
        assert all_compiled(recorded(every_way, monkeypatch), GPUTarget("cuda", 90, 32), wide=True)

    @pytest.mark.parametrize("capability", [80, 90, 100])
    def test_nvidia(capability, monkeypatch):
        kernels = all_compiled(recorded(every_kernel, monkeypatch), GPUTarget("cuda", capability, 32))
        for name, asm in kernels:
            assert not re.search(r"\bfma\.", asm["ptx"]), name
            assert ".ftz" not in asm["ptx"], name
            assert not re.search(r"\bdiv\.(full|approx)|\brcp\.", asm["ptx"]), name
        if capability == 90:  # the machine code of the others is made in the same way
            with ThreadPoolExecutor(2) as pool:
                for (name, asm), sass in zip(kernels, pool.map(lambda kernel: disassembled(kernel[1]["cubin"]), kernels)):
                    check_machine_code(name, asm["ptx"], sass)

    def disassembled(cubin: bytes) -> str:
        with tempfile.NamedTemporaryFile() as file:
            file.write(cubin)
            file.flush()
            return subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout

    def check_machine_code(name: str, ptx: str, sass: str) -> None:
        assert "FADD" in sass or name in ("topk_scan", "bits_pack", "bits_unpack", "eliasfano_pack", "eliasfano_count", "eliasfano_unpack", "threshold_begin", "threshold_finish"), name
        # An IEEE division is five FFMA, and eleven more for all that need the slow way; a fused tile would add 16.
        divisions, fused = len(re.findall(r"\bdiv\.rn", ptx)), len(re.findall(r"\bFFMA", sass))
        assert fused <= (5 * divisions + 12 if divisions else 0), f"{name}: {fused} FFMA for {divisions} divisions"

    def test_amd(monkeypatch):
        for name, asm in all_compiled(recorded(every_kernel, monkeypatch), GPUTarget("hip", "gfx942", 64)):
            code = asm["amdgcn"]
            divisions = len(re.findall(r"\bv_div_fmas_f32", code))
            fused = len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|fmaak|fmamk|mad|mac)_(?:legacy_)?f32", code))
            assert fused == 5 * divisions or name == "threshold_finish", f"{name}: {fused} fused operations for {divisions} divisions"
            assert not re.search(r"\bv_rcp_f32", code) or divisions or name == "threshold_finish", name  # which divides integers
