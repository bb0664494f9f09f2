"""What reaches the C++ kernels has been checked, and what a hostile message holds stays inside its output."""

import pytest
import torch
from op_cases import difference, message_rows

_C = pytest.importorskip("commopt._C", reason="the native kernels are not built")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from commopt.backends import cpu, reference  # noqa: E402

N, K = 1000, 10
TILE = 65536


def good(op: str) -> dict:
    """Arguments that `op` takes, by name."""
    given_kept = {"residual": torch.zeros(N), "loss_scale": torch.ones(1)}
    given = {"x": torch.randn(N)} | given_kept
    taken = {"out": torch.zeros(N), "weight": 0.5}
    lists = {"values": (K, torch.float32), "index": (K, torch.int16), "starts": (1, torch.int64)}
    fields = {
        "dense": {"values": (N, torch.bfloat16)},
        "half": {"values": (N, torch.float16), "scales": (4, torch.float32)},
        "quant": {"codes": (N, torch.int8), "scales": (4, torch.float32)},
        "ternary": {"codes": (4 * 64, torch.uint8), "scales": (4, torch.float32)},
        "sign": {"signs": (125, torch.uint8), "scales": (1, torch.float32)},
        "hadamard": {"rotated": (N, torch.float32)},
        "topk": lists,
        "threshold": lists,
        "sparse": lists,
    }[op.split("_")[0]]
    message = message_rows(2, fields, "cpu")
    extra = {"half": {"block": 256}, "quant": {"bits": 8, "block": 256}, "ternary": {"block": 320}, "sign": {"block": 1024}}.get(op.split("_")[0], {})
    row = {name: field[0] for name, field in message.items()}
    shared = {"absmax": torch.zeros(4, dtype=torch.int32), "codes": torch.zeros(N, dtype=torch.uint8)}
    if op == "quant_absmax":
        return given | {"absmax": shared["absmax"], "block": 256}
    if op == "quant_encode_shared":
        return given | shared | {"levels": 7, "width": 8, "block": 256, "stochastic": True, "draw": (1, 2, 3)}
    if op == "quant_decode_shared":
        return taken | {"codes": shared["codes"], "absmax": shared["absmax"], "rows": 3, "levels": 7, "width": 8, "block": 256, "stochastic": True}
    if op == "sign_vote":
        return {"n": N} | {f"row_{name}": field for name, field in message.items()} | row | extra
    if op == "quant_resum":
        return {"n": N} | {f"row_{name}": field for name, field in message.items()} | given_kept | row | extra | {"stochastic": True, "draw": (1, 2, 3)}
    if op.endswith("decode_sum"):
        return taken | message | extra
    if op == "hadamard_decode":
        return taken | row
    if op in ("quant_encode", "ternary_encode"):
        return given | row | extra | {"stochastic": True, "draw": (1, 2, 3)}
    if op == "topk_encode":
        return given | row | {"workspace": torch.zeros(cpu.topk_workspace(N, K), dtype=torch.uint8)}
    if op == "threshold_encode":
        return given | row | {"control": torch.zeros(2, dtype=torch.int32), "begin": 7,
                              "workspace": torch.zeros(cpu.threshold_workspace(N, K), dtype=torch.uint8)}
    if op == "sparse_add":
        return {"residual": torch.zeros(N), "loss_scale": torch.ones(1)} | row
    return given | row | extra


OPS = ("dense_encode", "dense_decode_sum", "half_encode", "half_decode_sum", "quant_encode", "quant_decode_sum", "quant_resum",
       "quant_absmax", "quant_encode_shared", "quant_decode_shared", "sign_vote",
       "ternary_encode", "ternary_decode_sum", "sign_encode", "sign_decode_sum", "hadamard_encode", "hadamard_keep", "hadamard_decode",
       "topk_encode", "topk_decode_sum", "threshold_encode", "sparse_add")
TENSORS = [(op, name) for op in OPS for name, value in good(op).items() if isinstance(value, torch.Tensor)]


def fake(t: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(t.shape, dtype=t.dtype)


SPOILERS = {
    "dtype": lambda t: t.to(torch.float64),
    "device": lambda t: t.to("meta"),
    "fake": fake,
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "count": lambda t: t.repeat_interleave(200, -1),  # more than a tile
    "dimensions": lambda t: t[None],
    "not a tensor": lambda t: t.tolist(),
    "a subclass": lambda t: t.as_subclass(type("Other", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_are_taken(op):
    getattr(cpu, op)(*good(op).values())


@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_bad_tensor_is_named(op, name, spoiler):
    arguments = good(op)
    spoiled = SPOILERS[spoiler](arguments[name])
    if spoiler == "strided" and spoiled.shape[-1] <= 1:
        pytest.skip("one element is contiguous")
    if spoiler == "count" and op.endswith("_shared") and name == "codes":
        pytest.skip("there may be bytes behind the codes")
    arguments[name] = spoiled
    with pytest.raises(ValueError, match=f"^{op}: ") as raised:
        getattr(cpu, op)(*arguments.values())
    if spoiler != "count":  # there another argument may be the one that no longer fits
        assert name in str(raised.value) or "field" in str(raised.value)


def test_more_entries_than_elements():
    arguments = good("topk_encode")
    k = N + 1
    arguments |= {"values": torch.zeros(k), "index": torch.zeros(k, dtype=torch.int16),
                  "workspace": torch.zeros(cpu.topk_workspace(N, k), dtype=torch.uint8)}
    with pytest.raises(ValueError, match="topk_encode: values holds k = 1001"):
        cpu.topk_encode(*arguments.values())


def test_a_beginning_beyond_the_end():
    for begin in (-1, N):
        with pytest.raises(ValueError, match=f"threshold_encode: begin must be one of 1000 elements, got {begin}"):
            cpu.threshold_encode(*(good("threshold_encode") | {"begin": begin}).values())


def test_the_blocks_of_ternary_are_few():
    for op in ("ternary_encode", "ternary_decode_sum"):
        with pytest.raises(ValueError, match=f"{op}: block must be one of 40, 80, 160, 320, 640, 1280, got 64"):
            getattr(cpu, op)(*(good(op) | {"block": 64}).values())


def test_hadamard_keep_needs_a_residual():
    with pytest.raises(ValueError, match="hadamard_keep: residual must be float32"):
        cpu.hadamard_keep(*(good("hadamard_keep") | {"residual": None}).values())


@pytest.mark.parametrize("changed, message", [
    ({"codes": torch.zeros(N + 2, dtype=torch.uint8)}, "codes must be a multiple of 4 bytes and at least 1000, got 1002"),
    ({"codes": torch.zeros(N - 4, dtype=torch.uint8)}, "codes must be a multiple of 4 bytes and at least 1000, got 996"),
    ({"width": 12}, "width must be 4, 8 or 16 bits that hold 2 \\* levels \\* rows = [0-9]+, got 12"),
    ({"levels": 128}, "levels from 1 to 127, got [13] and 128"), ({"levels": 0}, "levels from 1 to 127, got [13] and 0"),
])
def test_codes_that_cannot_be_added(changed, message):
    for op in ("quant_encode_shared", "quant_decode_shared"):
        with pytest.raises(ValueError, match=f"{op}: .*{message}"):
            getattr(cpu, op)(*(good(op) | changed).values())
    for rows, levels, width in ((1, 8, 4), (2, 127, 8), (259, 127, 16)):
        with pytest.raises(ValueError, match=f"quant_decode_shared: width must be .* = {2 * rows * levels}, got {width}"):
            cpu.quant_decode_shared(*(good("quant_decode_shared") | {"codes": torch.zeros(2 * N, dtype=torch.uint8), "rows": rows, "levels": levels, "width": width}).values())
    with pytest.raises(ValueError, match="quant_decode_shared: rows must be at least 1"):
        cpu.quant_decode_shared(*(good("quant_decode_shared") | {"rows": 0}).values())


def test_rows_at_different_distances():
    arguments = good("half_decode_sum")
    arguments["scales"] = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="half_decode_sum: the rows of scales must lie"):
        cpu.half_decode_sum(*arguments.values())
    arguments = good("quant_resum")
    arguments["row_scales"] = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="quant_resum: the rows of row_scales must lie"):
        cpu.quant_resum(*arguments.values())


# --- hostile messages ---


def hostile(dtype: torch.dtype, rows: int, count: int, g: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (rows, count * dtype.itemsize), dtype=torch.uint8, generator=g).view(dtype)


def starts_of(kind: str, k: int, tiles: int, g: torch.Generator) -> torch.Tensor:
    if kind == "bytes":
        return hostile(torch.int64, 1, tiles, g)[0]
    if kind == "disordered":
        return torch.randint(-k, 2 * k, (tiles,), generator=g)
    if kind == "late":  # the first entries belong to no tile
        return torch.sort(torch.randint(k // 2, k + 1, (tiles,), generator=g)).values
    return torch.full((tiles,), {"none": k, "last": -(2**63), "beyond": 2**63 - 1}[kind])


def guarded(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer and its middle [n]."""
    buffer = torch.full((n + 2 * TILE,), 7.0, dtype=dtype)
    return buffer, buffer[TILE : TILE + n]


@pytest.mark.parametrize("isa", _C.cpu.isas())
@pytest.mark.parametrize("kind", ("bytes", "disordered", "late", "none", "last", "beyond"))
@pytest.mark.parametrize("n", (1, 1000, 65536, 150_001))
def test_hostile_lists(n, kind, isa):
    g, before = torch.Generator().manual_seed(n), (_C.cpu.isa(), torch.get_num_threads())
    k, tiles = min(n, 4000), -(-n // TILE)
    try:
        _C.cpu.use_isa(isa)
        torch.set_num_threads(3)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            fields = message_rows(2, {"values": (k, torch.float32), "index": (k, torch.int16), "starts": (tiles, torch.int64)}, "cpu")
            fields["values"].copy_(torch.randn(2, k, generator=g))
            fields["index"].copy_(hostile(torch.int16, 2, k, g))  # in no order, some of them twice
            fields["index"][0, : k // 2] = 5
            for row in fields["starts"]:
                row.copy_(starts_of(kind, k, tiles, g))
            buffers = []
            for backend in (reference, cpu):
                buffer, out = guarded(n, dtype)
                backend.topk_decode_sum(out, 0.5, *fields.values())
                kept, residual = guarded(n, torch.float32)
                backend.sparse_add(residual, torch.tensor([4.0]), *(f[1] for f in fields.values()))
                buffers.append({"out": buffer, "residual": kept})
            wrong = difference(*buffers)
            assert not wrong, f"{dtype}: {wrong}"
    finally:
        _C.cpu.use_isa(before[0])
        torch.set_num_threads(before[1])


@pytest.mark.parametrize("isa", _C.cpu.isas())
@pytest.mark.parametrize("op", ("dense", "half", "quant", "quant2", "ternary", "sign"))
def test_hostile_values(op, isa):
    before = _C.cpu.isa()
    try:
        _C.cpu.use_isa(isa)
        for n, (dtype, bits) in ((n, d) for n in (1, 255, 1001, 70_001) for d in ((torch.float32, 8), (torch.bfloat16, 4))):
            g = torch.Generator().manual_seed(n)
            shapes = {
                "dense": {"values": (n, dtype)},
                "half": {"values": (n, torch.float16), "scales": (-(-n // 64), torch.float32)},
                "quant": {"codes": (n, torch.int8) if bits == 8 else (-(-n // 2), torch.uint8), "scales": (-(-n // 64), torch.float32)},
                "quant2": {"codes": (-(-n // 4), torch.uint8), "scales": (-(-n // 64), torch.float32)},
                "ternary": {"codes": (-(-n // 320) * 64, torch.uint8), "scales": (-(-n // 320), torch.float32)},
                "sign": {"signs": (-(-n // 8), torch.uint8), "scales": (-(-n // 64), torch.float32)},
            }[op]
            fields = message_rows(3, shapes, "cpu")
            for name, (count, field_dtype) in shapes.items():
                fields[name].copy_(hostile(field_dtype, 3, count, g))
            extra = {"dense": (), "half": (64,), "quant": (bits, 64), "quant2": (2, 64), "ternary": (320,), "sign": (64,)}[op]
            buffers = []
            for backend in (reference, cpu):
                buffer, out = guarded(n, torch.float32)
                getattr(backend, f"{op.strip('2')}_decode_sum")(out, -0.3, *fields.values(), *extra)
                buffers.append({"out": buffer})
                resent = [field[0].clone() for field in fields.values()]
                if op == "sign":
                    backend.sign_vote(n, *fields.values(), *resent, *extra)
                if op.startswith("quant"):
                    backend.quant_resum(n, *fields.values(), None, torch.ones(1), *resent, *extra, False, (1, 2, 3))
                buffers[-1] |= {f"{name} again": field for name, field in zip(fields, resent)}
            wrong = difference(*buffers)
            assert not wrong, f"n={n} {dtype} {bits}: {wrong}"
    finally:
        _C.cpu.use_isa(before)


@pytest.mark.parametrize("isa", _C.cpu.isas())
@pytest.mark.parametrize("width", (4, 8, 16))
def test_hostile_codes_with_a_shared_scale(width, isa):
    before = _C.cpu.isa()
    try:
        _C.cpu.use_isa(isa)
        for n in (1, 255, 1001, 70_001):
            g = torch.Generator().manual_seed(n)
            codes, absmax = hostile(torch.uint8, 1, -(-n * width // 32) * 4, g)[0], hostile(torch.int32, 1, -(-n // 64), g)[0]
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                buffers = []
                for backend in (reference, cpu):
                    buffer, out = guarded(n, dtype)
                    backend.quant_decode_shared(out, -0.3, codes, absmax, 3, 1, width, 64, False)
                    buffers.append({"out": buffer})
                wrong = difference(*buffers)
                assert not wrong, f"n={n} {dtype}: {wrong}"
    finally:
        _C.cpu.use_isa(before)
