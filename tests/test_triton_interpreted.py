"""The Triton kernels give the bits of the reference. They run on the CPU, in Triton's interpreter, which must be switched
on before the kernels are imported: this file starts itself again in a process of its own."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_in_the_interpreter():
        """Two halves of about the same length, side by side."""
        def run(half: str) -> subprocess.CompletedProcess:
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", half]
            return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600)

        with ThreadPoolExecutor(2) as pool:
            for done in pool.map(run, ["sizes and not threshold", "not sizes or threshold"]):
                assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

else:
    import op_cases

    from commopt.backends import reference, triton

    torch.set_num_threads(1)
    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy remarks on infinities and NaNs

    def compare(op: str, n: int, kind: str, dtype: torch.dtype, **options) -> None:
        expected = op_cases.run(reference, op, n, kind, dtype, **options)
        difference = op_cases.difference(op_cases.run(triton, op, n, kind, dtype, **options), expected)
        assert not difference, f"{op} n={n} {kind} {dtype} {options}: {difference}"

    # What does not depend on each other takes turns instead of being multiplied out: a program takes milliseconds here.
    turns = itertools.count()

    def settings() -> dict:
        turn = next(turns)
        return {
            "dtype": op_cases.DTYPES[turn % 3], "loss_scale": (1.0, 1024.0, 3.0)[turn // 3 % 3], "residual": turn % 5 != 0,
            "offset": turn % 4, "rows": 1 + turn % 7 % 3,
        }

    @pytest.mark.parametrize("n", [n for n in op_cases.SIZES if n not in (2, 127, 255, 256, 4096)])
    @pytest.mark.parametrize("op, at_once", [("dense", 1), ("half", 1), ("quant", 2), ("shared", 1), ("ternary", 1), ("sign", 1), ("hadamard", 1),
                                             ("topk", 1), ("threshold", 1), ("blocktopk", 1), ("randomk", 1)])
    def test_sizes_and_values(op, at_once, n):
        options = itertools.cycle(op_cases.variants(op, n))
        kinds = op_cases.VALUES
        if op in ("blocktopk", "randomk") or (op == "topk" and n != 257):  # several launches, or long ones
            kinds = [kinds[next(turns) % len(kinds)] for _ in range(2)]
        if op in ("ternary", "sign") and n != 129:  # many steps to a program
            kinds = [kinds[next(turns) % len(kinds)] for _ in range(3)]
        for kind in kinds:
            for _ in range(at_once):
                compare(op, n, kind, **settings(), **next(options))

    @pytest.mark.parametrize("op, n, kind, options", [
        ("dense", 65537, "mixed", {"values": torch.bfloat16}),
        ("half", 65536, "heavy", {"block": 1024}),
        ("quant", 65537, "heavy", {"bits": 8, "block": 256, "stochastic": True}),
        ("quant", 65535, "normal", {"bits": 4, "block": 128, "stochastic": True}),
        ("quant", 65537, "heavy", {"bits": 2, "block": 64, "stochastic": True}),
        ("shared", 65537, "heavy", {"levels": 127, "block": 256, "stochastic": True}),
        ("shared", 65535, "normal", {"levels": 1, "block": 64, "stochastic": False}),
        ("ternary", 65537, "heavy", {"block": 320, "stochastic": True}),
        ("sign", 65535, "heavy", {"block": 1024}),
        ("hadamard", 65535, "heavy", {}),
        ("topk", 9001, "equal", {"k": 8999}),
        ("topk", 65537, "few", {"k": 30_000}),
        ("topk", 131_073, "nan", {"k": 2001}),
        ("threshold", 9001, "equal", {"k": 899}),
        ("threshold", 70_001, "nan", {"k": 300}),
        ("threshold", 131_073, "heavy", {"k": 2001}),
        ("blocktopk", 9001, "few", {"k": 10}),
        ("randomk", 9001, "nan", {"k": 2, "scaled": False}),
    ])
    def test_many_programs(op, n, kind, options):
        compare(op, n, kind, torch.float32, **options)

    @pytest.mark.parametrize("block, n", [(8, 1003), (24, 1003), (1000, 5003), (4096, 9001), (9000, 10_007)])
    def test_any_block(block, n):
        compare("half", n, "heavy", torch.float32, block=block)
        compare("sign", n, "heavy", torch.bfloat16, block=block)
        compare("shared", n, "heavy", torch.bfloat16, levels=7, block=block, stochastic=n % 2 == 0, rows=1 + block % 3)
        for bits, stochastic in [(8, False), (4, True), (2, False)]:
            compare("quant", n, "heavy", torch.bfloat16, bits=bits, block=block, stochastic=stochastic)

    @pytest.mark.parametrize("draw", [(0, 0, 0), (2**64 - 1, 2**32 - 1, 2**31), (2**31, 1, 16)])
    def test_random_numbers_for_any_seed(draw):
        x, scale = op_cases.values_of("normal", 1000), torch.ones(1)
        codes, scales = torch.zeros(2, 1000, dtype=torch.int8), torch.zeros(2, 4)
        for row, kernels in enumerate((reference, triton)):
            kernels.quant_encode(x, None, scale, codes[row], scales[row], 8, 256, True, draw)
        assert torch.equal(codes[0], codes[1])

    @pytest.mark.parametrize("bits", [8, 4])
    def test_minus_zero_in_the_residual(bits):
        kept = []
        for kernels in (reference, triton):
            x, residual = torch.zeros(64).neg(), torch.zeros(64).neg()
            x[5] = 1.0
            kernels.quant_encode(
                x, residual, torch.ones(1), torch.zeros(64 * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8),
                torch.zeros(1), bits, 64, False, (0, 0, 0))
            kept.append(residual.view(torch.int32))
        assert torch.equal(*kept)

    @pytest.mark.parametrize("left_over", [0xFF, 0x01])
    def test_topk_does_not_depend_on_what_the_workspace_held(left_over):
        n, k, results = 9001, 90, []
        x = op_cases.values_of("few", n)
        for kernels in (reference, triton):
            fields = torch.zeros(k), torch.zeros(k, dtype=torch.int16), torch.zeros(1, dtype=torch.int64)
            workspace = torch.full((kernels.topk_workspace(n, k),), left_over, dtype=torch.uint8)
            kernels.topk_encode(x, None, torch.ones(1), *fields, workspace)
            results.append(dict(zip(("values", "index", "starts"), fields)))
        assert not op_cases.difference(*results)

    @pytest.mark.parametrize("seed", range(10))
    def test_topk_decodes_any_bytes(seed):
        """Random starts and indices, elements that come several times, and nothing written outside of the output."""
        g = torch.Generator().manual_seed(seed)
        n, k, rows = (1, 70_000, 65_536, 131_077, 5)[seed % 5], (0, 1, 40, 250)[seed % 4], 1 + seed % 3
        tiles = -(-n // 65536)
        fields = op_cases.message_rows(
            rows, {"values": (k, torch.float32), "index": (k, torch.int16), "starts": (tiles, torch.int64)}, "cpu")
        far, near = ((2**62, 32768), (2 * k + 4, 9))[seed % 2]
        fields["values"].copy_(torch.randn(rows, k, generator=g))
        fields["index"].copy_(torch.randint(-near, near, (rows, k), generator=g))
        if seed % 3:
            fields["index"].copy_(fields["index"].sort().values)
        fields["starts"].copy_(torch.randint(-far, far, (rows, tiles), generator=g))
        results = []
        for kernels in (reference, triton):
            out, residual = torch.full((n + 128,), 7.0, dtype=op_cases.DTYPES[seed % 3]), torch.ones(n + 128)
            kernels.topk_decode_sum(out[64 : n + 64], 0.3, *fields.values())
            kernels.sparse_add(residual[64 : n + 64], torch.full((1,), 3.0), *(f[0] for f in fields.values()))
            results.append({"all": out, "residual": residual})
        assert not op_cases.difference(*results)

    def test_arguments_are_checked():
        x = torch.zeros(12)
        with pytest.raises(ValueError, match="half_encode: block must be a multiple of 8, got 12"):
            triton.half_encode(x, None, torch.ones(1), x.half(), torch.zeros(1), 12)
        with pytest.raises(ValueError, match=r"dense_encode: values must be float32 or bfloat16 \[12\].*got float16 \[12\]"):
            triton.dense_encode(x, None, torch.ones(1), x.half())
