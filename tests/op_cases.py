"""What every backend is put through: each op at the awkward sizes and values. A case runs on any backend and returns
its results by name, so that two backends are compared bit for bit."""

from collections.abc import Iterator

import torch

SIZES = (0, 1, 2, 7, 127, 128, 129, 255, 256, 257, 1000, 4096, 5003)
LARGE = (65535, 65536, 65537, 200_003)
VALUES = ("normal", "heavy", "mixed", "tiny", "denormal", "zero", "equal", "few", "nan", "inf", "minus_zero", "huge")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (64, 128, 256, 1024)
FLOATS = (
    ("e4m3", "float32", 256, False), ("e5m2", "float32", 64, True), ("e4m3", "float32", 128, True), ("e5m2", "float32", 1024, False),
    ("e4m3", "e8m0", 32, False), ("e5m2", "e8m0", 32, False), ("e2m1", "e8m0", 32, False), ("e2m1", "e4m3", 16, False),
    ("power", "e8m0", 256, True), ("power", "e8m0", 64, False),
)


def values_of(kind: str, n: int, seed: int = 0) -> torch.Tensor:
    """float32 [n] of one awkward kind."""
    g = torch.Generator().manual_seed(seed * 7919 + n)
    x = torch.randn(n, generator=g)
    if kind == "heavy":
        return x * torch.exp(2 * torch.randn(n, generator=g))
    if kind == "mixed":
        return x * 10.0 ** torch.randint(-30, 30, (n,), generator=g)
    if kind == "tiny":
        return x * 1e-30
    if kind == "denormal":
        return x * 1e-41
    if kind == "zero":
        return torch.zeros(n)
    if kind == "minus_zero":
        return -torch.zeros(n)
    if kind == "equal":
        return torch.full((n,), 0.75)
    if kind == "few":
        return torch.randint(-2, 3, (n,), generator=g).float()
    if kind == "huge":
        return x * 1e38
    if kind in ("nan", "inf") and n:
        where = torch.randint(0, n, (max(1, n // 300),), generator=g)
        x[where] = float(kind)
        x[where[: len(where) // 2]] *= -1
    return x


def message_rows(rows: int, fields: dict[str, tuple[int, torch.dtype]], device) -> dict[str, torch.Tensor]:
    """Fields [rows, count] of `rows` messages, zero: one after the other in each row, aligned, with a gap behind."""
    at, places = 0, {}
    for name, (count, dtype) in fields.items():
        places[name] = at
        at += -(-count * dtype.itemsize // 16) * 16 + 16
    message = torch.zeros(rows, at, dtype=torch.uint8, device=device)
    return {name: message[:, places[name] : places[name] + count * dtype.itemsize].view(dtype) for name, (count, dtype) in fields.items()}


def _encode_each(encode, rows: int, n: int, kind: str, dtype: torch.dtype, residual: bool, device, offset: int):
    """Calls encode(row, x, residual) for each row with inputs that start `offset` elements into their storage."""
    kept = []
    for row in range(rows):
        x = torch.zeros(n + offset, dtype=dtype, device=device)[offset:]
        x.copy_(values_of(kind, n, row))
        r = None
        if residual:
            r = torch.zeros(n + offset, device=device)[offset:]
            r.copy_(values_of("heavy", n, row + 100) * 0.1)
        encode(row, x, r)
        if r is not None:
            kept.append(r)
    return {"residual": torch.stack(kept)} if kept else {}


def run(kernels, op: str, n: int, kind: str, dtype: torch.dtype, *, residual=True, rows=2, loss_scale=1.0, device="cpu",
        offset=0, **options) -> dict[str, torch.Tensor]:
    """Encodes `rows` messages and decodes their sum. op: a family of ops, see `variants`; options as the ops name them."""
    scale = torch.full((1,), loss_scale, device=device)
    extra: tuple = ()
    if op == "dense":
        fields = message_rows(rows, {"values": (n, options["values"])}, device)
        encode = lambda i, x, r: kernels.dense_encode(x, r, scale, fields["values"][i])
    elif op == "half":
        extra = (options["block"],)
        fields = message_rows(rows, {"values": (n, torch.float16), "scales": (-(-n // extra[0]), torch.float32)}, device)
        encode = lambda i, x, r: kernels.half_encode(x, r, scale, fields["values"][i], fields["scales"][i], *extra)
    elif op == "float":
        element, scaling, block, stochastic = (options[name] for name in ("element", "scaling", "block", "stochastic"))
        lists = {"codes": (-(-n // 2) if element == "e2m1" else n, torch.uint8),
                 "scales": (-(-n // block), torch.float32 if scaling == "float32" else torch.uint8)}
        fields = message_rows(rows, lists | ({"whole": (1, torch.float32)} if scaling == "e4m3" else {}), device)
        extra = (element, scaling, block) if scaling == "e4m3" else (None, element, scaling, block)

        def encode(i, x, r):
            row = [f[i] for f in fields.values()]
            if scaling == "e4m3":
                kernels.absmax(x, r, scale, row[-1], 2688.0)
            kernels.float_encode(x, r, scale, *row, *extra, stochastic, (2**40 + 12345, 7, i + 3))
    elif op == "quant":
        bits = options["bits"]
        extra = (bits, options["block"])
        codes = (-(-n * bits // 8), torch.int8 if bits == 8 else torch.uint8)
        fields = message_rows(rows, {"codes": codes, "scales": (-(-n // extra[1]), torch.float32)}, device)
        encode = lambda i, x, r: kernels.quant_encode(
            x, r, scale, fields["codes"][i], fields["scales"][i], *extra, options["stochastic"], (2**40 + 12345, 7, i + 3))
    elif op == "ternary":
        extra = (options["block"],)
        blocks = -(-n // extra[0])
        fields = message_rows(rows, {"codes": (blocks * (extra[0] // 5), torch.uint8), "scales": (blocks, torch.float32)}, device)
        encode = lambda i, x, r: kernels.ternary_encode(
            x, r, scale, fields["codes"][i], fields["scales"][i], *extra, options["stochastic"], (2**40 + 12345, 7, i + 3))
    elif op == "sign":
        extra = (options["block"],)
        fields = message_rows(rows, {"signs": (-(-n // 8), torch.uint8), "scales": (-(-n // extra[0]), torch.float32)}, device)
        encode = lambda i, x, r: kernels.sign_encode(x, r, scale, fields["signs"][i], fields["scales"][i], *extra)
    elif op == "shared":
        return _run_shared(kernels, n, kind, dtype, rows, residual, scale, device, offset, **options)
    elif op == "hadamard":
        return _run_hadamard(kernels, n, kind, dtype, residual, scale, device, offset)
    elif op == "threshold":
        return _run_threshold(kernels, n, kind, dtype, residual, scale, device, offset, options["k"])
    elif op == "blocktopk":
        k = options["k"]
        count, extra = n // 1024 * k + -(-(n % 1024) * k // 1024), (k,)
        fields = message_rows(rows, {"values": (count, torch.float32), "index": (count, torch.int16)}, device)
        encode = lambda i, x, r: kernels.blocktopk_encode(x, r, scale, fields["values"][i], fields["index"][i], k)
    elif op == "randomk":
        extra = ((2**40 + 12345, 7, 3),)
        fields = message_rows(rows, {"values": (options["k"], torch.float32)}, device)
        encode = lambda i, x, r: kernels.randomk_encode(x, r, scale, fields["values"][i], options["scaled"], *extra)
    else:
        k = options["k"]
        lists = {"values": (k, torch.float32), "index": (k, torch.int16), "starts": (-(-n // 65536), torch.int64)}
        fields = message_rows(rows, lists, device)
        workspace = torch.zeros(kernels.topk_workspace(n, k), dtype=torch.uint8, device=device)
        encode = lambda i, x, r: kernels.topk_encode(x, r, scale, *(f[i] for f in fields.values()), workspace)

    results = _encode_each(encode, rows, n, kind, dtype, residual, device, offset)
    out = torch.zeros(n, dtype=dtype, device=device)
    getattr(kernels, f"{op}_decode_sum")(out, 1 / rows, *fields.values(), *extra)
    results |= fields | {"out": out}
    if op == "quant":
        results |= _resummed(kernels, n, fields, results["residual"][0] if residual else None, scale, bits, options["block"], options["stochastic"])
    if op == "sign":
        voted = {name: torch.zeros_like(field[0]) for name, field in fields.items()}
        kernels.sign_vote(n, *fields.values(), *voted.values(), *extra)
        results |= {f"{name} of the vote": field for name, field in voted.items()}
    if op == "topk":
        results |= _coded(kernels, n, fields["index"][0], fields["starts"][0])
    if op == "topk" and residual:
        r = results["residual"][0].clone()
        kernels.sparse_add(r, scale, *(f[0] for f in fields.values()))
        results["out returned"] = r
    if op == "blocktopk" and residual:
        results["out returned"] = results["residual"][0].clone()
        kernels.blocktopk_add(results["out returned"], scale, *(f[0] for f in fields.values()), k)
    return results


def _resummed(kernels, n: int, rows: dict[str, torch.Tensor], residual, scale: torch.Tensor, *how) -> dict[str, torch.Tensor]:
    """The message of the rows' sum."""
    fields = message_rows(1, {name: (field.shape[1], field.dtype) for name, field in rows.items()}, scale.device)
    fields = {name: field[0] for name, field in fields.items()}
    kept = None if residual is None else residual.clone()
    kernels.quant_resum(n, *rows.values(), kept, scale, *fields.values(), *how, (3, 2**32 - 1, 5))
    return {f"{name} of the sum": field for name, field in fields.items()} | ({} if kept is None else {"kept of the sum": kept})


def _coded(kernels, n: int, index: torch.Tensor, starts: torch.Tensor) -> dict[str, torch.Tensor]:
    """A list's low bits, its upper bits in unary, and the list read from both."""
    k, bits = index.numel(), (1, 16, 13, 6)[n % 4]
    low, high = (torch.full((-(-count // 8),), 0x5A, dtype=torch.uint8, device=index.device) for count in (k * bits, k + (n >> bits)))
    kernels.bits_pack(index, low, bits)
    kernels.eliasfano_pack(index, starts, high, n, bits)
    again, begin = torch.full_like(index, -7), torch.full_like(starts, -7)
    kernels.bits_unpack(low, again, bits)
    lows = again.clone()
    kernels.eliasfano_unpack(high, again, begin, n, bits)
    return {"low": low, "low again": lows, "high": high, "index again": again, "starts again": begin}


def _run_threshold(kernels, n: int, kind: str, dtype: torch.dtype, residual: bool, scale: torch.Tensor, device, offset: int, k: int):
    """Three steps of one gradient after another on one residual: the threshold of a step comes from the step before. The
    lists are decoded by the ops of topk."""
    lists = {"values": (k, torch.float32), "index": (k, torch.int16), "starts": (-(-n // 65536), torch.int64)}
    fields = message_rows(3, lists, device)
    control = torch.zeros(3, 2, dtype=torch.int32, device=device)
    workspace = torch.zeros(kernels.threshold_workspace(n, k), dtype=torch.uint8, device=device)
    kept = torch.zeros(n, device=device)

    def encode(i, x, r):
        if i:
            control[i] = control[i - 1]
        if r is not None:
            r.add_(kept)
        begin = (7919 * (i + 1) * n // 12345) % max(n, 1)
        kernels.threshold_encode(x, r, scale, *(f[i] for f in fields.values()), control[i], begin, workspace)
        if r is not None:
            kept.copy_(r)

    return fields | {"control": control} | _encode_each(encode, 3, n, kind, dtype, residual, device, offset)


def _run_shared(kernels, n: int, kind: str, dtype: torch.dtype, rows: int, residual: bool, scale: torch.Tensor, device, offset: int,
                levels: int, block: int, stochastic: bool, width: int = 0):
    """Codes of several ranks, added up as words of 32 bits. width: 0 is the least that holds the sum."""
    width = width or next(w for w in (4, 8, 16) if 2 * levels * rows < 2**w)
    absmax = torch.zeros(rows, -(-n // block), dtype=torch.int32, device=device)
    words = torch.full((rows, -(-n * width // 32) + offset), -1, dtype=torch.int32, device=device)
    _encode_each(lambda i, x, r: kernels.quant_absmax(x, r, scale, absmax[i], block), rows, n, kind, dtype, residual, device, offset)
    largest = absmax.amax(0)

    def encode(i, x, r):
        codes = words[i].view(torch.uint8)
        kernels.quant_encode_shared(x, r, scale, largest, codes, levels, width, block, stochastic, (2**40 + 12345, 7, i + 3))

    results = _encode_each(encode, rows, n, kind, dtype, residual, device, offset)
    out = torch.zeros(n, dtype=dtype, device=device)
    kernels.quant_decode_shared(out, 1 / rows, words.sum(0, dtype=torch.int32).view(torch.uint8), largest, rows, levels, width, block, stochastic)
    return results | {"absmax": absmax, "codes": words, "out": out}


def _run_hadamard(kernels, n: int, kind: str, dtype: torch.dtype, residual: bool, scale: torch.Tensor, device, offset: int):
    """Rotates, rotates back into a gradient, and keeps what a sender of a coarser value would. Its results are no message, so
    that one NaN is as good as another: all are named out."""
    rotated, out = torch.zeros(n + offset, device=device)[offset:], torch.zeros(n, dtype=dtype, device=device)
    results = {"out": out}

    def encode(_, x, r) -> None:
        kernels.hadamard_encode(x, r, scale, rotated)
        results["out rotated"] = rotated.clone()
        kernels.hadamard_decode(out, 0.5, rotated)
        if r is not None:
            kernels.hadamard_keep(x, r, scale, rotated * 0.75)

    return _encode_each(encode, 1, n, kind, dtype, residual, device, offset) | results


def variants(op: str, n: int) -> Iterator[dict]:
    """The option sets of an op that are worth running at size n."""
    if op == "dense":
        yield from ({"values": d} for d in (torch.float32, torch.bfloat16))
    elif op == "half":
        yield from ({"block": b} for b in BLOCKS)
    elif op == "float":
        for element, scaling, block, stochastic in FLOATS:
            yield {"element": element, "scaling": scaling, "block": block, "stochastic": stochastic}
    elif op == "quant":
        yield from ({"bits": q, "block": b, "stochastic": s} for q in (8, 4) for b in BLOCKS for s in (False, True))
        yield from ({"bits": 2, "block": b, "stochastic": s} for b in (64, 256) for s in (False, True))
    elif op == "ternary":
        yield from ({"block": b, "stochastic": s} for b in (320, 40) for s in (False, True))
    elif op == "sign":
        yield from ({"block": b} for b in (1024, 256, 64))
    elif op == "shared":
        yield from ({"levels": q, "block": b, "stochastic": s} for q, b in ((127, 256), (7, 128), (1, 64), (127, 1024)) for s in (False, True))
        yield {"levels": 1, "block": 256, "stochastic": False, "width": 16}
    elif op == "hadamard":
        yield {}
    elif op == "blocktopk":
        yield from ({"k": k} for k in (1, 10, 300))
    elif op == "randomk":
        yield from ({"k": k, "scaled": k % 2 == 0} for k in sorted({min(n, max(1, k)) for k in (1, n // 100, n // 3)}))
    else:
        yield from ({"k": k} for k in sorted({min(n, k) for k in (0, 1, -(-n // 100), -(-n // 10), n)}))


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str:
    """'' where all results have the same bits, else the first that differ. Any NaN in what is added up, `out` by its name, equals any other: machines
    differ in the NaN they compute; in a message there is only one."""
    for name in a:
        x, y = a[name].cpu().contiguous(), b[name].cpu().contiguous()
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"{name}: {x.dtype} {list(x.shape)} against {y.dtype} {list(y.shape)}"
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        wrong = x.view(bits) != y.view(bits)
        if name.startswith("out"):
            wrong &= ~(x.isnan() & y.isnan())
        if wrong.any():
            at = wrong.flatten().nonzero()[0].item()
            v, w = x.flatten()[at], y.flatten()[at]
            return (f"{name}[{at}] of {x.numel()}: {v.item()!r} ({v.view(bits).item():#x}) against "
                    f"{w.item()!r} ({w.view(bits).item():#x}); {int(wrong.sum())} differ")
    return ""
