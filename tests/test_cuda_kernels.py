"""The kernels of csrc/cuda have the bits of the reference: compiled by g++ and run thread by thread on the CPU, which proves logic
and arithmetic on machines without a GPU, and on a GPU where there is one. What nvcc makes of them is in test_cuda_code.
"""

import importlib
import importlib.util
import re
import subprocess
import types
from concurrent.futures import ThreadPoolExecutor

import op_cases
import pytest
import torch
from commopt import backends
from commopt.backends import native, reference
from commopt.backends.reference import topk as reference_topk
from emulator import build
from storages import through


def load(path):
    # pybind11 keeps one module per name, whatever the file.
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return types.SimpleNamespace(**native.bind(module, "cpu", lambda device: 0))


@pytest.fixture(scope="module", params=["emulated", *(["on_gpu"] if torch.cuda.is_available() and backends.built("cuda") else [])])
def kernels(request):
    """The ops, for tensors on the CPU."""
    if request.param == "emulated":
        return load(build.module())
    ops = vars(importlib.import_module("commopt.backends.cuda"))
    return types.SimpleNamespace(**{name: through(op, "cuda") for name, op in ops.items() if name in backends.OPS})


def compare(kernels, op: str, n: int, kind: str, dtype: torch.dtype, **options) -> None:
    got = op_cases.run(kernels, op, n, kind, dtype, **options)
    wanted = op_cases.run(reference, op, n, kind, dtype, **options)
    wrong = op_cases.difference(got, wanted)
    assert not wrong, f"{op} n={n} {kind} {dtype} {options}: {wrong}"


@pytest.mark.parametrize("n", op_cases.SIZES)
@pytest.mark.parametrize("op", ["dense", "half", "quant", "shared", "ternary", "sign", "hadamard", "topk", "threshold", "blocktopk", "randomk"])
def test_bits_of_the_reference(kernels, op, n):
    for i, kind in enumerate(op_cases.VALUES):
        for j, options in enumerate(op_cases.variants(op, n)):
            if n > 1000 and (i + j) % 4:
                continue
            turn = n + i + j
            compare(kernels, op, n, kind, op_cases.DTYPES[turn % 3], residual=turn % 5 > 0,
                    loss_scale=(1.0, 1024.0, 3.0)[turn // 3 % 3], offset=turn // 9 % 4, **options)


@pytest.mark.parametrize("block", [8, 24, 512, 2048, 4096, 5000])
def test_other_blocks(kernels, block):
    for n in (1, 25, 4097, 5003):
        for kind in ("heavy", "nan"):
            compare(kernels, "half", n, kind, torch.float32, block=block, loss_scale=3.0)
            compare(kernels, "sign", n, kind, torch.float32, block=block, loss_scale=3.0)
            compare(kernels, "shared", n, kind, torch.float32, levels=7, block=block, stochastic=n % 2 == 0, rows=3)
            for bits in (8, 4, 2):
                compare(kernels, "quant", n, kind, torch.bfloat16, bits=bits, block=block, stochastic=bits == 8, offset=1)


@pytest.mark.parametrize("n", [65535, 65537, 140_003])
def test_topk_over_several_tiles(kernels, n):
    for kind, k in (("normal", n // 100), ("few", n // 20), ("nan", 1), ("heavy", n)):
        compare(kernels, "topk", n, kind, torch.float32, k=k, rows=1, offset=3)


def gradients(n: int):
    """Gradients whose statistics change from one call to the next, with the loss scale of each."""
    normal, heavy = (op_cases.values_of(kind, n, 5) for kind in ("normal", "heavy"))
    clustered = normal * torch.where(torch.arange(n) // 1000 == 4, 50.0, 1.0)
    sparse = torch.where(torch.arange(n) % 997 == 0, normal, 0.0)
    awkward = [op_cases.values_of(kind, n, 6) for kind in ("nan", "inf", "tiny", "denormal", "equal", "minus_zero", "huge")]
    steady = [normal + 0.1 * op_cases.values_of("normal", n, 20 + i) for i in range(3)]
    sequence = [normal, *steady, heavy, 0.01 * normal, *steady, 1e-4 * heavy, 100 * normal, clustered, clustered, sparse, sparse, normal]
    for g in awkward:
        sequence += [g, normal, 0.5 * normal]
    scales = [1.0, 1.0, 1.0, 2.0, 1024.0, 1024.0, 3.0, 1.0, 2.0**-20, 65536.0, 0.3]
    return [(g, scales[i // 2 % len(scales)]) for i, g in enumerate(sequence)]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.6])
def test_topk_does_not_depend_on_earlier_calls(kernels, share, residual):
    n = 9001
    k, tiles = int(share * n), -(-n // 65536)
    workspace = torch.zeros(kernels.topk_workspace(n, k), dtype=torch.uint8)
    kept = [torch.zeros(n), torch.zeros(n)] if residual else [None, None]
    recoveries = carried = 0
    for step, (gradient, scale) in enumerate(gradients(n)):
        x = gradient.to(op_cases.DTYPES[step % 7 % 3])
        results = []
        for backend, r in zip((kernels, reference), kept):
            values, index, starts = torch.zeros(k), torch.zeros(k, dtype=torch.int16), torch.zeros(tiles, dtype=torch.int64)
            carried += backend is kernels and workspace[:4].view(torch.float32).item() > 0
            backend.topk_encode(x, r, torch.full((1,), scale), values, index, starts, workspace)
            results.append({"values": values, "index": index, "starts": starts} | ({"residual": r.clone()} if residual else {}))
        wrong = op_cases.difference(*results)
        assert not wrong, f"step {step}, loss_scale {scale}: {wrong}"
        recoveries += reached(workspace) < k
        if residual and not kept[0].isfinite().all():
            for r in kept:
                r.zero_()
    assert recoveries >= 1 and carried >= 10, "the sequence no longer reaches every path"


def reached(workspace: torch.Tensor) -> int:
    """How many elements reached the threshold in the last call: Control::then in topk.cu."""
    return workspace[56:64].view(torch.int64).item()


def refused(workspace: torch.Tensor) -> int:
    """Whether the list had no room for a tile, and how little: Pool::refused in candidates.h."""
    return workspace[48:56].view(torch.int64).item()


def in_turn(kernels, n: int, k: int, steps: list[tuple[torch.Tensor, float]]) -> list[tuple[int, int]]:
    """Encodes the gradients one after the other, each with its loss scale, and compares. What `reached` and `refused` say after each."""
    workspace, kept, said = torch.zeros(kernels.topk_workspace(n, k), dtype=torch.uint8), [torch.zeros(n), torch.zeros(n)], []
    for step, (x, scale) in enumerate(steps):
        results = []
        for backend, r in zip((kernels, reference), kept):
            fields = {"values": torch.zeros(k), "index": torch.zeros(k, dtype=torch.int16), "starts": torch.zeros(-(-n // 65536), dtype=torch.int64)}
            backend.topk_encode(x, r, torch.full((1,), scale), *fields.values(), workspace)
            results.append(fields | {"residual": r.clone()})
        assert not (wrong := op_cases.difference(*results)), f"step {step}: {wrong}"
        said.append((reached(workspace), refused(workspace)))
    return said


def test_topk_where_the_list_has_no_room(kernels):
    """More candidates than six times k: some tiles are read again. After that the threshold fits."""
    n, k = 60_000, 300
    x = op_cases.values_of("normal", n, 3)
    said = in_turn(kernels, n, k, [(x, 1.0), (50 * x, 1.0), *[(0.1 * x, 1.0)] * 6])
    assert said[1][0] > 6 * k and said[1][1] and k <= said[-1][0] < 6 * k and not said[-1][1], said


def test_topk_recovers_where_the_list_has_no_room(kernels):
    """A carried threshold proves too high in a call that loses the residual of many elements, all of them candidates."""
    n, k = 60_000, 30
    few, x = torch.zeros(n), op_cases.values_of("normal", n, 3)
    few[::2000] = 1e-36
    said = in_turn(kernels, n, k, [(few, 1.0), (1e-35 * x, 2.0**20), (1e-35 * x, 2.0**20), (x, 1.0)])
    assert said[1][0] < k and said[1][1], said


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_hostile_lists(kernels, rows):
    """Starts and indices that no encoder writes mean what the reference says, and repeated elements add in order."""
    for seed, n in enumerate((1, 5003, 140_003)):
        torch.manual_seed(seed)
        k, tiles = min(n, 3000), -(-n // 65536)
        fields = list(op_cases.message_rows(
            rows, {"values": (k, torch.float32), "index": (k, torch.int16), "starts": (tiles, torch.int64)}, "cpu").values())
        fields[0].copy_(torch.randn(rows, k))
        fields[1].copy_(torch.randint(-32768, 32768, (rows, k)).to(torch.int16))
        fields[1][:, k // 2:] = torch.randint(0, 40, (rows, k - k // 2)).to(torch.int16)
        fields[2].copy_(torch.randint(-50, k + 50, (rows, tiles)))
        fields[2][0, -1] = 2**62
        if rows > 1:
            fields[2][1] = -(2**62)
        # The reference is called at sizes where index_add_ adds in the order of the list.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for dtype in op_cases.DTYPES:
            out = [torch.zeros(n + 1, dtype=dtype)[1:] for _ in range(2)]
            for backend, to in zip((kernels, reference), out):
                backend.topk_decode_sum(to, 1 / rows, *fields)
            assert torch.equal(*out), f"n={n} {dtype}"
        residual = [torch.ones(n + 1)[1:] for _ in range(2)]
        for backend, to in zip((kernels, reference), residual):
            backend.sparse_add(to, torch.full((1,), 3.0), *(f[0] for f in fields))
        assert torch.equal(*residual)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("width", range(1, 17))
def test_a_stream_of_bits(kernels, width):
    """Anything above the low bits is left out, wherever the arrays begin."""
    for count in (0, 1, 7, 8, 2047, 2048, 2049, 5003):
        for offset in (0, 1, 3):
            torch.manual_seed(count)
            index = torch.randint(-32768, 32768, (count + offset,)).to(torch.int16)[offset:]
            results = []
            for backend in (kernels, reference):
                packed = torch.full((-(-count * width // 8) + 5 * offset,), 0x5A, dtype=torch.uint8)[5 * offset:]
                again = torch.full((count + offset,), -7, dtype=torch.int16)[offset:]
                backend.bits_pack(index, packed, width)
                backend.bits_unpack(packed, again, width)
                results.append({"packed": packed, "again": again})
            wrong = op_cases.difference(*results)
            assert not wrong, f"count={count} offset={offset}: {wrong}"


def ascending(n: int, k: int, how: str) -> torch.Tensor:
    """int64 [k]: elements of n in ascending order, spread out, in a few clusters, or with the last element again and again."""
    if how == "spread":
        return torch.randperm(n)[:k].sort().values
    if how == "clusters":
        return (torch.arange(k) + (n - k) * (torch.arange(k) > k // 3)).clamp(max=n - 1)
    return torch.randperm(n)[:k].sort().values.where(torch.arange(k) < k // 2, torch.tensor(n - 1))


@pytest.mark.parametrize("bits", [1, 2, 6, 11, 14, 16])
@pytest.mark.parametrize("n, k", [(1, 1), (65_536, 700), (65_537, 65_537), (300_001, 3000), (2_000_003, 9), (5_000_000, 40), (1_000_000, 40_000)])
def test_an_ascending_list(kernels, n, k, bits):
    for seed, how in enumerate(("spread", "clusters", "repeats")):
        torch.manual_seed(seed)
        elements, offset = ascending(n, k, how), seed
        index = torch.zeros(k + offset, dtype=torch.int16)[offset:]
        starts = torch.zeros(-(-n // 65536), dtype=torch.int64)
        reference_topk.in_tiles(elements, index, starts)
        results = []
        for backend in (kernels, reference):
            high = torch.full((-(-(k + (n >> bits)) // 8) + 3 * offset,), 0x5A, dtype=torch.uint8)[3 * offset:]
            backend.eliasfano_pack(index, starts, high, n, bits)
            again, begin = torch.zeros(k + offset, dtype=torch.int16)[offset:], torch.full_like(starts, -7)
            again.copy_(index ^ (0 if bits == 16 else -1 << bits))  # what is above the low bits does not matter
            backend.eliasfano_unpack(high, again, begin, n, bits)
            results.append({"high": high, "index": again, "starts": begin})
        wrong = op_cases.difference(*results)
        assert not wrong, f"{how}: {wrong}"
        assert torch.equal(results[0]["index"], index) and torch.equal(results[0]["starts"], starts)


@pytest.mark.parametrize("n, k, bits", [(200_003, 2000, 6), (65_536, 1, 16), (70_001, 30_000, 1), (5, 5, 1), (131_072, 0, 9),
                                        (1_000_000, 999, 16), (3_000_000, 20_000, 2), (3_000_000, 2000, 16)])
def test_any_bytes_are_an_ascending_list(kernels, n, k, bits):
    length = -(-(k + (n >> bits)) // 8)
    for density in (0, 1, 30, 128, 250, 256):
        torch.manual_seed(density)
        stream = torch.rand(length, 8) * 256 < density
        offset = density % 16 + 1
        results = []
        for backend in (kernels, reference):
            high = torch.full((length + offset,), 0x5A, dtype=torch.uint8)[offset:]
            high.copy_((stream << torch.arange(8)).sum(1).to(torch.uint8))
            index, starts = torch.arange(k).to(torch.int16), torch.full((-(-n // 65536),), -7)
            backend.eliasfano_unpack(high, index, starts, n, bits)
            results.append({"index": index, "starts": starts})
        wrong = op_cases.difference(*results)
        assert not wrong, f"{density} of 256 are ones: {wrong}"


@pytest.mark.parametrize("n, k", [(4088, 1), (4089, 1), (8200, 2), (12_263, 3), (9001, 2), (8178, 2), (8177, 2), (5003, 5000), (5003, 41), (30_011, 7)])
def test_strata_as_long_as_a_block(kernels, n, k):
    """About the longest strata that a block encodes at once, and others with values that are not finite."""
    for i, kind in enumerate(("heavy", "nan", "inf")):
        for residual in (True, False):
            compare(kernels, "randomk", n, kind, op_cases.DTYPES[(i + n) % 3], k=k, scaled=residual, residual=residual, loss_scale=3.0, offset=i)


@pytest.mark.parametrize("at", [0, 30, 31, 32, 255, 256, 300])
def test_a_list_that_falls_once(kernels, at):
    """An element twice, or two entries exchanged, in a list that rises but for that: its values add up in the order of the
    list, which here matters."""
    n, k = 70_003, 400
    for seed, exchanged in enumerate((False, False, False, True)):
        torch.manual_seed(seed)
        values, index, starts = op_cases.message_rows(
            2, {"values": (k, torch.float32), "index": (k, torch.int16), "starts": (2, torch.int64)}, "cpu").values()
        values[0] = 1.0
        values[1] = torch.randn(k)
        values[1, at : at + 2] = torch.tensor([2.0**24, -(2.0**24)])
        index[:] = torch.randperm(5000)[:k].sort().values.to(torch.int16)
        index[1, at : at + 2] = index[1, at : at + 2].flip(0) if exchanged else index[1, at]
        starts[:] = k // 2 if at == 300 else k  # the second tile begins there
        starts[:, 0] = 0
        out = [torch.zeros(n) for _ in range(2)]
        for backend, to in zip((kernels, reference), out):
            backend.topk_decode_sum(to, 1.0, values, index, starts)
        assert torch.equal(*out), f"seed {seed}"


@pytest.mark.parametrize("again", [1, 30, 100, 250])
@pytest.mark.parametrize("beyond", [1, 40, 400])
def test_a_list_that_comes_back(kernels, beyond, again):
    """Behind entries that point past the end of the gradient come some that do not: they count."""
    n, k = 70_003, 900
    torch.manual_seed(beyond + again)
    values, index, starts = op_cases.message_rows(1, {"values": (k, torch.float32), "index": (k, torch.int16), "starts": (2, torch.int64)}, "cpu").values()
    values[0] = torch.randn(k)
    first = k - beyond - again
    index[0] = torch.cat([torch.arange(first), 9000 + torch.arange(beyond), 2000 + torch.arange(again)]).to(torch.int16)  # of 4467 in the second tile
    out = [torch.zeros(n) for _ in range(2)]
    for backend, to in zip((kernels, reference), out):
        backend.topk_decode_sum(to, 1.0, values, index, starts)
    assert torch.equal(*out) and int((out[0] != 0).sum()) == first + again


@pytest.mark.parametrize("k", [0, 2, 20, 32, 33, 1023, 1024])
def test_any_share_of_a_block(kernels, k):
    """Few and many candidates, and lists that are longer than a warp is wide."""
    for turn, kind in enumerate(op_cases.VALUES):
        n = (1023, 1024, 3500)[turn % 3]
        compare(kernels, "blocktopk", n, kind, op_cases.DTYPES[turn % 2], k=k, rows=(1, 2, 11)[(turn + k) % 3], loss_scale=3.0, offset=turn % 5)


@pytest.mark.parametrize("k", [1, 10, 40, 1024])
def test_hostile_lists_of_blocks(kernels, k):
    """Entries that point nowhere or do not rise are none, in any row."""
    for seed, (n, rows) in enumerate(((1, 1), (1000, 3), (1024, 10), (5003, 3))):
        torch.manual_seed(seed)
        count = n // 1024 * k + -(-(n % 1024) * k // 1024)
        values, index = op_cases.message_rows(rows, {"values": (count, torch.float32), "index": (count, torch.int16)}, "cpu").values()
        values.copy_(torch.randn(rows, count))
        index.copy_(torch.randint(-32768, 32768, (rows, count)).to(torch.int16))
        index[:, ::2] = torch.randint(-3, 1100, (rows, (count + 1) // 2)).to(torch.int16)
        index[-1] = (torch.arange(count) % k).to(torch.int16)
        for dtype in op_cases.DTYPES:
            out = [torch.zeros(n + 1, dtype=dtype)[1:] for _ in range(2)]
            for backend, to in zip((kernels, reference), out):
                backend.blocktopk_decode_sum(to, 1 / rows, values, index, k)
            assert torch.equal(*out), f"n={n} {dtype}"
        residual = [torch.ones(n) for _ in range(2)]
        for backend, to in zip((kernels, reference), residual):
            backend.blocktopk_add(to, torch.full((1,), 3.0), values[0], index[0], k)
        assert torch.equal(*residual)


@pytest.mark.parametrize("n, k", [(13_001, 3), (8177, 2), (5003, 41), (5003, 2000)])
def test_a_value_that_is_not_finite_spoils_its_stratum_alone(kernels, n, k):
    for at in (0, n // k, n // k + 1, n // 2, n - n // k - 1, n - 1):
        results = []
        for backend in (kernels, reference):
            x, residual, values = op_cases.values_of("normal", n), op_cases.values_of("heavy", n, 1), torch.zeros(k)
            x[at] = torch.inf
            backend.randomk_encode(x, residual, torch.full((1,), 3.0), values, False, (5, 6, 7))
            results.append({"values": values, "residual": residual})
        wrong = op_cases.difference(*results)
        assert not wrong, f"infinite at {at}: {wrong}"
        assert int(results[0]["values"].isnan().sum()) == 1


def test_a_missing_barrier_is_seen(tmp_path):
    """The emulator would not prove much if it did not notice: without one barrier the results differ."""
    for name in ("half.cu", "blocks.h", "launch.h", "run.h"):
        text = (build.ROOT / "csrc/cuda" / name).read_text().replace('"../', f'"{build.ROOT}/csrc/')
        if name == "blocks.h":
            text, count = re.subn(r"__syncthreads\(\);", "", text)
            assert count == 1
        (tmp_path / name).write_text(text)
    broken = load(build.module("broken", half=tmp_path / "half.cu"))
    compare(broken, "half", 4096, "heavy", torch.float32, block=256)  # within a warp
    with pytest.raises(AssertionError, match="half n=4096"):
        compare(broken, "half", 4096, "heavy", torch.float32, block=1024)


def test_no_access_outside_the_buffers():
    program = build.bounds_program()
    environment = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    ways = [[program, str(dtype)] for dtype in range(3)] + [[program, "0", "overrun"]]
    with ThreadPoolExecutor(len(ways)) as pool:
        *good, bad = pool.map(lambda way: subprocess.run(way, env=environment, capture_output=True, text=True, timeout=120), ways)
    for done in good:
        assert done.stdout == "clean\n", done.stderr[-4000:]
    assert "heap-buffer-overflow" in bad.stderr and "clean" not in bad.stdout
