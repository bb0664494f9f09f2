"""The ops over a module of kernels: every argument is checked here, once, because C++ sees pointers and no dtypes.

`_C.cpu` and `_C.cuda` take the same arguments, but for the last: the thread count, or the stream. The launchers of
triton.py do too, with tensors in the place of the pointers and the device for the last.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .reference import TERNARY_BLOCKS, TILE
from .reference.blocktopk import BLOCK

GRADIENT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/ops.h
_DENSE = (torch.float32, torch.bfloat16)
_ELEMENT = {"e4m3": 0, "e5m2": 1, "e2m1": 2, "power": 3}  # Element in csrc/ops.h
_SCALING = {"float32": 0, "e8m0": 1, "e4m3": 2}  # Scaling in csrc/ops.h
_SCALED = {"e4m3": ("float32", "e8m0"), "e5m2": ("float32", "e8m0"), "e2m1": ("e8m0", "e4m3"), "power": ("e8m0",)}
_PLAIN = (Tensor, torch.nn.Parameter)  # others, such as those of a tracer, may have no memory


def _fits(t: Tensor, shape: tuple) -> bool:
    """Whether it has that shape (None: any) and dense rows. A hook asks ten times for a bucket, so the usual case comes first."""
    have = t.shape
    if have != shape and (len(have) != len(shape) or any(want not in (None, is_) for want, is_ in zip(shape, have))):
        return False
    return t.stride(-1) == 1 or have[-1] <= 1 or t.numel() == 0


def _got(t) -> str:
    return f"{str(t.dtype)[6:]} {list(t.shape)} on {t.device}" if isinstance(t, Tensor) else repr(t)


class Checker:
    """Checks the tensors of one call of `op` against the device the backend serves."""

    def __init__(self, op: str, device_type: str, addresses: bool = True):
        self.op, self.device_type, self.device, self.addresses = op, device_type, None, addresses

    def tensor(self, name: str, t, dtypes, shape: tuple) -> int | Tensor:
        """The address of t, or t; ValueError unless it has one of the dtypes, the shape (None: any), the device, dense rows."""
        dtypes = dtypes if isinstance(dtypes, (tuple, dict)) else (dtypes,)
        if type(t) in _PLAIN and t.dtype in dtypes and t.layout is torch.strided and _fits(t, shape) and self._same(t.device):
            address = t.data_ptr()
            if address or t.numel() == 0:
                return address if self.addresses else t
        wanted = " or ".join(str(d)[6:] for d in dtypes)
        sizes = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(
            f"{self.op}: {name} must be {wanted} [{sizes}], contiguous, on {self.device or self.device_type}, got {_got(t)}"
        )

    def _same(self, device: torch.device) -> bool:
        """Whether it is the device of this call, which the first tensor decides."""
        if self.device is None and device.type == self.device_type:
            self.device = device
        return device == self.device

    def input(self, x, residual, loss_scale) -> tuple:
        address = self.tensor("x", x, GRADIENT, (None,))
        return address, GRADIENT[x.dtype], *self.kept(residual, loss_scale, x.numel()), x.numel()

    def kept(self, residual, loss_scale, n: int) -> tuple:
        kept = (0 if self.addresses else None) if residual is None else self.tensor("residual", residual, torch.float32, (n,))
        return kept, self.tensor("loss_scale", loss_scale, torch.float32, (1,))

    def out(self, out, weight: float) -> tuple:
        address = self.tensor("out", out, GRADIENT, (None,))
        return address, GRADIENT[out.dtype], float(weight), out.numel()

    def output(self, out, weight: float, first: Tensor) -> tuple:
        return *self.out(out, weight), *self.rows(first)

    def rows(self, first: Tensor) -> tuple[int, int]:
        """How many messages there are, by their first field, and how many bytes they lie apart."""
        if not isinstance(first, Tensor) or first.dim() != 2 or first.shape[0] < 1:
            raise ValueError(f"{self.op}: a field must be [rows, count] with at least one row, got {_got(first)}")
        return first.shape[0], first.stride(0) * first.element_size()

    def field(self, name: str, t, dtype, rows: int, count: int | None, stride: int) -> int:
        address = self.tensor(name, t, dtype, (rows, count))
        if rows > 1 and t.stride(0) * t.element_size() != stride:
            raise ValueError(f"{self.op}: the rows of {name} must lie {stride} bytes apart like those of the other fields, "
                             f"got {t.stride(0) * t.element_size()}")
        return address


def code_count(n: int, bits: int) -> int:
    return -(-n * bits // 8)


_CODES = {8: torch.int8, 4: torch.uint8, 2: torch.uint8}


def summed(c: Checker, n: int, absmax, codes, rows: int, levels: int, width: int, block: int) -> tuple:
    """The shared measures and the codes of n elements, of which `rows` ranks' can be added up."""
    if not (rows >= 1 and 1 <= levels <= 127):
        raise ValueError(f"{c.op}: rows must be at least 1 and levels from 1 to 127, got {rows} and {levels}")
    if width not in (4, 8, 16) or 2 * levels * rows >= 2**width:
        raise ValueError(f"{c.op}: width must be 4, 8 or 16 bits that hold 2 * levels * rows = {2 * levels * rows}, got {width}")
    a = c.tensor("absmax", absmax, torch.int32, (-(-n // block),))
    q = c.tensor("codes", codes, torch.uint8, (None,))
    if codes.numel() % 4 or codes.numel() < code_count(n, width):
        raise ValueError(f"{c.op}: codes must be a multiple of 4 bytes and at least {code_count(n, width)}, got {codes.numel()}")
    return a, q


def ternary_blocks(op: str, n: int, block: int) -> int:
    if block not in TERNARY_BLOCKS:
        raise ValueError(f"{op}: block must be one of {', '.join(map(str, TERNARY_BLOCKS))}, got {block}")
    return -(-n // block)


def _format_of(c: Checker, whole, element: str, scaling: str) -> tuple[int, int, torch.dtype, int]:
    """The numbers of the element and the scaling, the dtype of the scales and the bits of a code."""
    if scaling not in _SCALED.get(element, ()):
        known = ", ".join(f"{e} with {' or '.join(s)}" for e, s in _SCALED.items())
        raise ValueError(f"{c.op}: there is no element {element!r} with scales {scaling!r}; there are {known}")
    if whole is not None and scaling != "e4m3":
        raise ValueError(f"{c.op}: whole must be None with scales {scaling!r}, got {_got(whole)}")
    dtype = torch.float32 if scaling == "float32" else torch.uint8
    return _ELEMENT[element], _SCALING[scaling], dtype, 4 if element == "e2m1" else 8


def packed_bytes(op: str, count: int, width: int) -> int:
    if not 1 <= width <= 16:
        raise ValueError(f"{op}: width must be a number of bits from 1 to 16, got {width}")
    return -(-count * width // 8)


def upper_bytes(op: str, n: int, k: int, bits: int) -> int:
    if not 1 <= bits <= 16:
        raise ValueError(f"{op}: bits must be a number from 1 to 16, got {bits}")
    if k > n:
        raise ValueError(f"{op}: index holds {k} entries, but there are only {n} elements")
    return -(-(k + (n >> bits)) // 8)


def entries_of_blocks(op: str, n: int, count: int, k: int) -> None:
    last = count - n // BLOCK * k
    if not (0 <= k <= BLOCK and 0 <= last <= n % BLOCK):
        raise ValueError(f"{op}: {count} values are not k = {k} of each of {n // BLOCK} blocks and up to {n % BLOCK} of the last")


def strata(op: str, n: int, k: int) -> None:
    if k > n or (n and n >= 2**31 * k):
        raise ValueError(f"{op}: values must hold one entry for 1 to 2^31 elements each of {n}, got {k} entries")


def bind(module, device_type: str, where: Callable[[torch.device], object], addresses: bool = True) -> dict[str, Callable]:
    """The ops of the reference by name, served by `module`. where(device): what its functions get as their last argument.
    addresses: whether they get a tensor as its address."""

    checker = partial(Checker, device_type=device_type, addresses=addresses)
    nothing = 0 if addresses else None

    def dense_encode(x, residual, loss_scale, values) -> None:
        c = checker("dense_encode")
        given = c.input(x, residual, loss_scale)
        address = c.tensor("values", values, _DENSE, (x.numel(),))
        module.dense_encode(*given, address, GRADIENT[values.dtype], where(x.device))

    def dense_decode_sum(out, weight, values) -> None:
        c = checker("dense_decode_sum")
        given = c.output(out, weight, values)
        address = c.field("values", values, _DENSE, given[4], out.numel(), given[5])
        module.dense_decode_sum(*given, address, GRADIENT[values.dtype], where(out.device))

    def half_encode(x, residual, loss_scale, values, scales, block) -> None:
        c = checker("half_encode")
        given = c.input(x, residual, loss_scale)
        v = c.tensor("values", values, torch.float16, (x.numel(),))
        s = c.tensor("scales", scales, torch.float32, (-(-x.numel() // block),))
        module.half_encode(*given, v, s, block, where(x.device))

    def half_decode_sum(out, weight, values, scales, block) -> None:
        c = checker("half_decode_sum")
        given = c.output(out, weight, values)
        v = c.field("values", values, torch.float16, given[4], out.numel(), given[5])
        s = c.field("scales", scales, torch.float32, given[4], -(-out.numel() // block), given[5])
        module.half_decode_sum(*given, v, s, block, where(out.device))

    def absmax(x, residual, loss_scale, out, divisor) -> None:
        c = checker("absmax")
        given = c.input(x, residual, loss_scale)
        module.absmax(*given, c.tensor("out", out, torch.float32, (1,)), float(divisor), where(x.device))

    def float_encode(x, residual, loss_scale, codes, scales, whole, element, scaling, block, stochastic, draw) -> None:
        c = checker("float_encode")
        given = c.input(x, residual, loss_scale)
        *numbers, dtype, bits = _format_of(c, whole, element, scaling)
        q = c.tensor("codes", codes, torch.uint8, (code_count(x.numel(), bits),))
        s = c.tensor("scales", scales, dtype, (-(-x.numel() // block),))
        w = c.tensor("whole", whole, torch.float32, (1,)) if scaling == "e4m3" else nothing
        module.float_encode(*given, q, s, w, *numbers, block, stochastic, *draw, where(x.device))

    def float_decode_sum(out, weight, codes, scales, whole, element, scaling, block) -> None:
        c = checker("float_decode_sum")
        given = c.output(out, weight, codes)
        *numbers, dtype, bits = _format_of(c, whole, element, scaling)
        q = c.field("codes", codes, torch.uint8, given[4], code_count(out.numel(), bits), given[5])
        s = c.field("scales", scales, dtype, given[4], -(-out.numel() // block), given[5])
        w = c.field("whole", whole, torch.float32, given[4], 1, given[5]) if scaling == "e4m3" else nothing
        module.float_decode_sum(*given, q, s, w, *numbers, block, where(out.device))

    def quant_encode(x, residual, loss_scale, codes, scales, bits, block, stochastic, draw) -> None:
        c = checker("quant_encode")
        given = c.input(x, residual, loss_scale)
        q = c.tensor("codes", codes, _CODES[bits], (code_count(x.numel(), bits),))
        s = c.tensor("scales", scales, torch.float32, (-(-x.numel() // block),))
        module.quant_encode(*given, q, s, bits, block, stochastic, *draw, where(x.device))

    def quant_decode_sum(out, weight, codes, scales, bits, block) -> None:
        c = checker("quant_decode_sum")
        given = c.output(out, weight, codes)
        q = c.field("codes", codes, _CODES[bits], given[4], code_count(out.numel(), bits), given[5])
        s = c.field("scales", scales, torch.float32, given[4], -(-out.numel() // block), given[5])
        module.quant_decode_sum(*given, q, s, bits, block, where(out.device))

    def quant_resum(n, row_codes, row_scales, residual, loss_scale, codes, scales, bits, block, stochastic, draw) -> None:
        c = checker("quant_resum")
        rows, stride = c.rows(row_codes)
        count, blocks = code_count(n, bits), -(-n // block)
        given = c.field("row_codes", row_codes, _CODES[bits], rows, count, stride), c.field("row_scales", row_scales, torch.float32, rows, blocks, stride)
        kept = c.kept(residual, loss_scale, n)
        q = c.tensor("codes", codes, _CODES[bits], (count,))
        s = c.tensor("scales", scales, torch.float32, (blocks,))
        module.quant_resum(n, rows, stride, *given, *kept, q, s, bits, block, stochastic, *draw, where(codes.device))

    def quant_absmax(x, residual, loss_scale, absmax, block) -> None:
        c = checker("quant_absmax")
        given = c.input(x, residual, loss_scale)
        module.quant_absmax(*given, c.tensor("absmax", absmax, torch.int32, (-(-x.numel() // block),)), block, where(x.device))

    def quant_encode_shared(x, residual, loss_scale, absmax, codes, levels, width, block, stochastic, draw) -> None:
        c = checker("quant_encode_shared")
        given = c.input(x, residual, loss_scale)
        a, q = summed(c, x.numel(), absmax, codes, 1, levels, width, block)
        module.quant_encode_shared(*given, a, q, codes.numel(), levels, width, block, stochastic, *draw, where(x.device))

    def quant_decode_shared(out, weight, codes, absmax, rows, levels, width, block, stochastic) -> None:
        c = checker("quant_decode_shared")
        given = c.out(out, weight)
        a, q = summed(c, out.numel(), absmax, codes, rows, levels, width, block)
        module.quant_decode_shared(*given, q, a, rows, levels, width, block, stochastic, where(out.device))

    def ternary_encode(x, residual, loss_scale, codes, scales, block, stochastic, draw) -> None:
        c = checker("ternary_encode")
        given, blocks = c.input(x, residual, loss_scale), ternary_blocks(c.op, x.numel(), block)
        q = c.tensor("codes", codes, torch.uint8, (blocks * (block // 5),))
        s = c.tensor("scales", scales, torch.float32, (blocks,))
        module.ternary_encode(*given, q, s, block, stochastic, *draw, where(x.device))

    def ternary_decode_sum(out, weight, codes, scales, block) -> None:
        c = checker("ternary_decode_sum")
        given, blocks = c.output(out, weight, codes), ternary_blocks(c.op, out.numel(), block)
        q = c.field("codes", codes, torch.uint8, given[4], blocks * (block // 5), given[5])
        s = c.field("scales", scales, torch.float32, given[4], blocks, given[5])
        module.ternary_decode_sum(*given, q, s, block, where(out.device))

    def sign_encode(x, residual, loss_scale, signs, scales, block) -> None:
        c = checker("sign_encode")
        given = c.input(x, residual, loss_scale)
        q = c.tensor("signs", signs, torch.uint8, (-(-x.numel() // 8),))
        s = c.tensor("scales", scales, torch.float32, (-(-x.numel() // block),))
        module.sign_encode(*given, q, s, block, where(x.device))

    def sign_decode_sum(out, weight, signs, scales, block) -> None:
        c = checker("sign_decode_sum")
        given = c.output(out, weight, signs)
        q = c.field("signs", signs, torch.uint8, given[4], -(-out.numel() // 8), given[5])
        s = c.field("scales", scales, torch.float32, given[4], -(-out.numel() // block), given[5])
        module.sign_decode_sum(*given, q, s, block, where(out.device))

    def sign_vote(n, row_signs, row_scales, signs, scales, block) -> None:
        c = checker("sign_vote")
        rows, stride = c.rows(row_signs)
        count, blocks = -(-n // 8), -(-n // block)
        given = c.field("row_signs", row_signs, torch.uint8, rows, count, stride), c.field("row_scales", row_scales, torch.float32, rows, blocks, stride)
        voted = c.tensor("signs", signs, torch.uint8, (count,)), c.tensor("scales", scales, torch.float32, (blocks,))
        module.sign_vote(n, rows, stride, *given, *voted, block, where(signs.device))

    def hadamard_encode(x, residual, loss_scale, rotated) -> None:
        c = checker("hadamard_encode")
        given = c.input(x, residual, loss_scale)
        module.hadamard_encode(*given, c.tensor("rotated", rotated, torch.float32, (x.numel(),)), where(x.device))

    def hadamard_keep(x, residual, loss_scale, rotated) -> None:
        c = checker("hadamard_keep")
        c.tensor("residual", residual, torch.float32, (None,))  # not optional here
        given = c.input(x, residual, loss_scale)
        module.hadamard_keep(*given, c.tensor("rotated", rotated, torch.float32, (x.numel(),)), where(x.device))

    def hadamard_decode(out, weight, rotated) -> None:
        c = checker("hadamard_decode")
        address = c.tensor("out", out, GRADIENT, (None,))
        values = c.tensor("rotated", rotated, torch.float32, (out.numel(),))
        module.hadamard_decode(address, GRADIENT[out.dtype], float(weight), out.numel(), values, where(out.device))

    def listed(c: Checker, x, values, index, starts, workspace, workspace_of) -> tuple:
        """The arguments of a list of the largest, and of the scratch that finds them."""
        v = c.tensor("values", values, torch.float32, (None,))
        n, k = x.numel(), values.numel()
        i = c.tensor("index", index, torch.int16, (k,))
        s = c.tensor("starts", starts, torch.int64, (-(-n // TILE),))
        w = c.tensor("workspace", workspace, torch.uint8, (workspace_of(n, k),))
        if k > n:
            raise ValueError(f"{c.op}: values holds k = {k} entries, but x only {n} elements")
        return (v, i, s, k), (w, workspace.numel())

    def topk_encode(x, residual, loss_scale, values, index, starts, workspace) -> None:
        c = checker("topk_encode")
        given = c.input(x, residual, loss_scale)
        entries, scratch = listed(c, x, values, index, starts, workspace, module.topk_workspace)
        module.topk_encode(*given, *entries, *scratch, where(x.device))

    def threshold_encode(x, residual, loss_scale, values, index, starts, control, begin, workspace) -> None:
        c = checker("threshold_encode")
        given = c.input(x, residual, loss_scale)
        entries, scratch = listed(c, x, values, index, starts, workspace, module.threshold_workspace)
        carried = c.tensor("control", control, torch.int32, (2,))
        if not 0 <= begin < max(x.numel(), 1):
            raise ValueError(f"threshold_encode: begin must be one of {x.numel()} elements, got {begin}")
        module.threshold_encode(*given, *entries, carried, begin, *scratch, where(x.device))

    def topk_decode_sum(out, weight, values, index, starts) -> None:
        c = checker("topk_decode_sum")
        given = c.output(out, weight, values)
        k = values.shape[1]
        v = c.field("values", values, torch.float32, given[4], k, given[5])
        i, apart = c.tensor("index", index, torch.int16, (given[4], k)), 2 * index.stride(0)  # the places may lie elsewhere
        s = c.field("starts", starts, torch.int64, given[4], -(-out.numel() // TILE), apart)
        module.topk_decode_sum(*given, apart, v, i, s, k, where(out.device))

    def sparse_add(residual, loss_scale, values, index, starts) -> None:
        c = checker("sparse_add")
        r = c.tensor("residual", residual, torch.float32, (None,))
        scale = c.tensor("loss_scale", loss_scale, torch.float32, (1,))
        v = c.tensor("values", values, torch.float32, (None,))
        i = c.tensor("index", index, torch.int16, (values.numel(),))
        s = c.tensor("starts", starts, torch.int64, (-(-residual.numel() // TILE),))
        module.sparse_add(r, scale, residual.numel(), v, i, s, values.numel(), where(residual.device))

    def blocktopk_encode(x, residual, loss_scale, values, index, k) -> None:
        c = checker("blocktopk_encode")
        given = c.input(x, residual, loss_scale)
        v = c.tensor("values", values, torch.float32, (None,))
        count = values.numel()
        i = c.tensor("index", index, torch.int16, (count,))
        entries_of_blocks("blocktopk_encode", x.numel(), count, k)
        module.blocktopk_encode(*given, v, i, count, k, where(x.device))

    def blocktopk_decode_sum(out, weight, values, index, k) -> None:
        c = checker("blocktopk_decode_sum")
        given = c.output(out, weight, values)
        count = values.shape[1]
        v = c.field("values", values, torch.float32, given[4], count, given[5])
        i = c.tensor("index", index, torch.int16, (given[4], count))
        entries_of_blocks("blocktopk_decode_sum", out.numel(), count, k)
        module.blocktopk_decode_sum(*given, 2 * index.stride(0), v, i, count, k, where(out.device))

    def blocktopk_add(residual, loss_scale, values, index, k) -> None:
        c = checker("blocktopk_add")
        r = c.tensor("residual", residual, torch.float32, (None,))
        scale = c.tensor("loss_scale", loss_scale, torch.float32, (1,))
        v = c.tensor("values", values, torch.float32, (None,))
        i = c.tensor("index", index, torch.int16, (values.numel(),))
        entries_of_blocks("blocktopk_add", residual.numel(), values.numel(), k)
        module.blocktopk_add(r, scale, residual.numel(), v, i, values.numel(), k, where(residual.device))

    def bits_pack(index, packed, width) -> None:
        c = checker("bits_pack")
        i = c.tensor("index", index, torch.int16, (None,))
        p = c.tensor("packed", packed, torch.uint8, (packed_bytes("bits_pack", index.numel(), width),))
        module.bits_pack(i, p, index.numel(), width, where(index.device))

    def bits_unpack(packed, index, width) -> None:
        c = checker("bits_unpack")
        i = c.tensor("index", index, torch.int16, (None,))
        p = c.tensor("packed", packed, torch.uint8, (packed_bytes("bits_unpack", index.numel(), width),))
        module.bits_unpack(p, i, index.numel(), width, where(index.device))

    def coded(op: str, index, starts, high, n: int, bits: int) -> tuple:
        c = checker(op)
        i = c.tensor("index", index, torch.int16, (None,))
        s = c.tensor("starts", starts, torch.int64, (-(-n // TILE),))
        return i, s, c.tensor("high", high, torch.uint8, (upper_bytes(op, n, index.numel(), bits),))

    def eliasfano_pack(index, starts, high, n, bits) -> None:
        i, s, h = coded("eliasfano_pack", index, starts, high, n, bits)
        module.eliasfano_pack(i, s, h, n, index.numel(), bits, where(index.device))

    def eliasfano_unpack(high, index, starts, n, bits) -> None:
        i, s, h = coded("eliasfano_unpack", index, starts, high, n, bits)
        module.eliasfano_unpack(h, i, s, n, index.numel(), bits, where(index.device))

    def randomk_encode(x, residual, loss_scale, values, scaled, draw) -> None:
        c = checker("randomk_encode")
        given = c.input(x, residual, loss_scale)
        v = c.tensor("values", values, torch.float32, (None,))
        strata("randomk_encode", x.numel(), values.numel())
        module.randomk_encode(*given, v, values.numel(), scaled, *draw, where(x.device))

    def randomk_decode_sum(out, weight, values, draw) -> None:
        c = checker("randomk_decode_sum")
        given = c.output(out, weight, values)
        v = c.field("values", values, torch.float32, given[4], None, given[5])
        strata("randomk_decode_sum", out.numel(), values.shape[1])
        module.randomk_decode_sum(*given, v, values.shape[1], *draw, where(out.device))

    ops = {name: f for name, f in locals().items() if callable(f) and name not in ("module", "where", "checker") and hasattr(module, name)}
    sizes = {name: getattr(module, name) for name in ("topk_workspace", "threshold_workspace") if hasattr(module, name)}
    return ops | sizes
