"""The ops of the small floats: the C++ kernels, the emulated CUDA kernels and the Triton kernels against the reference, bit
for bit. Triton's interpreter must be switched on before the kernels are imported: this file starts itself again for it."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from op_cases import DTYPES, FLOATS, SIZES, VALUES, difference, message_rows, run, variants

from commopt.backends import reference

ROUNDED = [dict(zip(("element", "scaling", "block", "stochastic"), f)) for f in FLOATS]

if os.environ.get("TRITON_INTERPRET") == "1":
    from commopt.backends import triton

    torch.set_num_threads(1)
    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy remarks on infinities and NaNs
    turns = itertools.count()

    def compare(n: int, kind: str, **options) -> None:
        turn = next(turns)
        options |= {"dtype": DTYPES[turn % 3], "loss_scale": (1.0, 1024.0, 3.0)[turn // 3 % 3], "residual": turn % 5 != 0,
                    "offset": turn % 4, "rows": 1 + turn % 7 % 3}
        wrong = difference(run(triton, "float", n, kind, **options), run(reference, "float", n, kind, **options))
        assert not wrong, f"n={n} {kind} {options}: {wrong}"

    @pytest.mark.parametrize("n", [0, 1, 7, 17, 129, 257, 1000])
    def test_interpreted(n):
        options = itertools.cycle(variants("float", n))
        for kind in VALUES:
            compare(n, kind, **next(options))
            if n in (17, 257):
                compare(n, kind, **next(options))

    @pytest.mark.parametrize("options", [ROUNDED[0], ROUNDED[6], ROUNDED[7], ROUNDED[8]], ids=str)
    def test_interpreted_over_many_programs(options):
        compare(9001, "heavy", **options)
        compare(9001, "nan", **options)

    @pytest.mark.parametrize("block, n", [(24, 1003), (9000, 10_007)])
    def test_interpreted_with_any_block(block, n):
        for i in (1, 6, 7, 8):
            compare(n, "heavy", **ROUNDED[i] | {"block": block})

    @pytest.mark.parametrize("element, scaling", [("e4m3", "float32"), ("e5m2", "e8m0"), ("e2m1", "e4m3"), ("power", "e8m0")])
    def test_interpreted_on_any_bytes(element, scaling):
        hostile(triton, element, scaling)

else:
    _C = pytest.importorskip("commopt._C", reason="the native kernels are not built")
    from test_native_checks import SPOILERS
    from test_ops import ISAS, Inside, _restored, same  # noqa: F401

    from commopt.backends import cpu

    def test_in_the_interpreter():
        pytest.importorskip("triton", reason="triton is not installed")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_small(dtype):
        offsets, scales, residuals = itertools.cycle((0, 1, 3)), itertools.cycle((1.0, 1024.0, 3.0, 1.0, 0.0078125)), itertools.cycle([True] * 6 + [False])
        for n in SIZES:
            for i, (options, kind) in enumerate(itertools.product(ROUNDED, VALUES)):
                if n > 7 and (i + n) % 3:
                    continue
                same("float", n, kind, dtype, residual=next(residuals), offset=next(offsets), loss_scale=next(scales), **options)

    def test_several_threads():
        kinds, dtypes = itertools.cycle(VALUES), itertools.cycle(DTYPES)
        for options in ROUNDED:
            same("float", 100_003, next(kinds), next(dtypes), threads=(1, 2, 3), loss_scale=3.0, offset=1, **options)

    @pytest.mark.parametrize("block", (8, 16, 24, 32, 200, 2048))
    def test_any_multiple_of_eight_is_a_block(block):
        for n, options in itertools.product((1, 199, 4099), ROUNDED):
            same("float", n, "heavy", torch.float32, rows=3, **options | {"block": block})

    def test_flushed_denormals_change_nothing():
        if not torch.set_flush_denormal(True):
            pytest.skip("this machine cannot flush denormals")
        torch.set_flush_denormal(False)
        flushing = Inside(cpu, lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False))
        for options, isa in itertools.product(ROUNDED, ISAS):
            _C.cpu.use_isa(isa)
            want, got = (run(k, "float", 5003, "denormal", torch.float32, residual=False, **options) for k in (reference, flushing))
            wrong = difference(want, got)
            assert not wrong, f"{options} {isa}: {wrong}"

    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("element, scaling", [("e4m3", "float32"), ("e5m2", "e8m0"), ("e2m1", "e8m0"), ("e2m1", "e4m3"), ("power", "e8m0")])
    def test_any_bytes(element, scaling, isa):
        _C.cpu.use_isa(isa)
        hostile(cpu, element, scaling)

    # --- arguments ---

    def good(op: str) -> dict:
        message = message_rows(2, {"codes": (500, torch.uint8), "scales": (63, torch.uint8), "whole": (1, torch.float32)}, "cpu")
        row = {name: field[0] for name, field in message.items()}
        given = {"x": torch.randn(1000), "residual": torch.zeros(1000), "loss_scale": torch.ones(1)}
        kind = {"element": "e2m1", "scaling": "e4m3", "block": 16}
        return {"absmax": given | {"out": row["whole"], "divisor": 3.0}, "float_encode": given | row | kind | {"stochastic": False, "draw": (1, 2, 3)},
                "float_decode_sum": {"out": torch.zeros(1000), "weight": 0.5} | message | kind}[op]

    TENSORS = [(op, name) for op in ("absmax", "float_encode", "float_decode_sum") for name, v in good(op).items() if isinstance(v, torch.Tensor)]

    @pytest.mark.parametrize(("op", "name"), TENSORS)
    def test_a_bad_tensor_is_named(op, name):
        getattr(cpu, op)(*good(op).values())
        for spoiler in SPOILERS:
            arguments = good(op)
            arguments[name] = SPOILERS[spoiler](arguments[name])
            if spoiler == "strided" and arguments[name].shape[-1] <= 1:
                continue  # one element is contiguous
            with pytest.raises(ValueError, match=f"^{op}: ") as raised:
                getattr(cpu, op)(*arguments.values())
            assert spoiler == "count" or name in str(raised.value) or "field" in str(raised.value)

    def test_a_bad_format_is_answered_with_the_good_ones():
        for change, message in [
            ({"element": "e3m2"}, "no element 'e3m2' with scales 'e4m3'; there are e4m3 with float32 or e8m0,"),
            ({"scaling": "float32"}, "no element 'e2m1' with scales 'float32'"),
            ({"scaling": "e8m0"}, "whole must be None with scales 'e8m0', got float32"),
            ({"whole": None}, "whole must be float32"),
        ]:
            with pytest.raises(ValueError, match=f"^float_encode: .*{message}"):
                cpu.float_encode(*(good("float_encode") | change).values())

    # --- compiled by Triton, with no GPU in sight: each target has another half of the formats ---

    @pytest.fixture
    def compiler(monkeypatch, tmp_path):
        pytest.importorskip("triton", reason="triton is not installed")
        import test_triton_compiled

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setitem(test_triton_compiled.POINTER, torch.int32, "*i32")

        def launch(*formats):
            def every_kernel(ops) -> None:
                for i in formats:
                    run(ops, "float", 3 * 4096, "normal", torch.float32, **ROUNDED[i])

            monkeypatch.setattr(test_triton_compiled, "every_kernel", every_kernel)
            return test_triton_compiled

        return launch

    @pytest.mark.parametrize("capability, formats", [(80, (0, 7)), (90, (1, 6)), (100, (7, 8))])
    def test_compiled_for_nvidia(compiler, capability, formats, monkeypatch):
        compiler(*formats).test_nvidia(capability, monkeypatch)

    def test_compiled_for_amd(compiler, monkeypatch):
        compiler(2, 7).test_amd(monkeypatch)

    # --- the same files as CUDA ---

    @pytest.fixture(scope="module")
    def emulated():
        from emulator import build
        from test_cuda_kernels import load

        return load(build.module())

    @pytest.mark.parametrize("n", [0, 1, 7, 129, 256, 257, 1000, 5003])
    def test_emulated(emulated, n):
        for i, kind in enumerate(VALUES):
            for j, options in enumerate(ROUNDED):
                if n > 1 and (i + j + n) % (3 if n <= 1000 else 6):
                    continue
                turn = n + i + j
                given = options | {"dtype": DTYPES[turn % 3], "residual": turn % 5 > 0, "loss_scale": (1.0, 1024.0, 3.0)[turn // 3 % 3], "offset": turn // 9 % 4}
                wrong = difference(run(emulated, "float", n, kind, **given), run(reference, "float", n, kind, **given))
                assert not wrong, f"n={n} {kind} {given}: {wrong}"

    @pytest.mark.parametrize("block", (8, 24, 2048, 5000))
    def test_emulated_with_other_blocks(emulated, block):
        for n, i in itertools.product((25, 5003), (0, 1, 5, 6, 7, 8)):
            options = ROUNDED[i] | {"block": block, "offset": 1, "loss_scale": 3.0}
            wrong = difference(run(emulated, "float", n, "heavy", torch.bfloat16, **options), run(reference, "float", n, "heavy", torch.bfloat16, **options))
            assert not wrong, f"n={n} {options}: {wrong}"

    @pytest.mark.parametrize("element, scaling", [("e4m3", "float32"), ("e5m2", "e8m0"), ("e2m1", "e4m3"), ("power", "e8m0")])
    def test_emulated_on_any_bytes(emulated, element, scaling):
        hostile(emulated, element, scaling)


def hostile(kernels, element: str, scaling: str) -> None:
    """Messages of random bytes decode to what the reference says, and nothing is written beside the output."""
    for n in (1, 255, 1001, 5003):
        g, block = torch.Generator().manual_seed(n), 16
        shapes = {"codes": (-(-n // 2) if element == "e2m1" else n, torch.uint8),
                  "scales": (-(-n // block), torch.float32 if scaling == "float32" else torch.uint8), "whole": (1, torch.float32)}
        fields = message_rows(3, shapes, "cpu")
        for name, (count, dtype) in shapes.items():
            fields[name].copy_(torch.randint(0, 256, (3, count * dtype.itemsize), dtype=torch.uint8, generator=g).view(dtype))
        if scaling != "e4m3":
            fields["whole"] = None
        results = []
        for backend in (reference, kernels):
            buffer = torch.full((n + 4096,), 7.0)
            backend.float_decode_sum(buffer[2048 : n + 2048], -0.3, *fields.values(), element, scaling, block)
            results.append({"out": buffer})
        wrong = difference(*results)
        assert not wrong, f"n={n} {element} {scaling}: {wrong}"
