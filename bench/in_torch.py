"""The methods that have a usual form in torch, as one writes them there, for the bench of kernels to compare with.

Each is an `encode(c, x, residual, *fields)` and a `decode(c, out, weight, *fields)` with the arguments and the messages of
the compressor `c`, except that top-k sends the int64 positions of torch.topk, and fp16 has the scales of a plain cast: one.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..compressors import Compressor
from ..compressors.topk_scopes import SCOPES
from .kernel_runs import Tensors, What

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # in malloc.h


class Way(NamedTuple):
    encode: Callable[..., Any]
    decode: Callable[..., None]


def way(c: Compressor) -> Way | None:
    """None where there is no usual form: random rounding, rotations, formats that torch does not have."""
    keys = {"rounding": "nearest", "rotate": "none", "scope": "global", "values": "float32", "momentum": 0.0}
    usual = all(getattr(c, key, value) == value for key, value in keys.items())
    return _WAYS.get(c.name) if usual else None


def work(t: Tensors, what: What, residual: Tensor) -> Callable[[Tensor], Any] | None:
    """The work of `what` on t's messages, as a function of the gradient; None where there is no usual form."""
    c, form = t.compressor, way(t.compressor)
    if form is None:
        return None
    rows, sent = t.layout.views(t.rows[: what.rows]), t.layout.views(t.resent)
    if c.name == "topk":
        values, *lists = c.lists(backends.select(t.out.device), t.n, *rows)
        rows = [values, torch.stack([SCOPES["global"].positions(t.n, c.ratio, *places) for places in zip(*lists)])]
        sent = [sent[0], torch.zeros_like(rows[1][0])]
    sent = [field.clone() for field in sent]  # torch.compile refuses to write to two fields of one message
    out, total, weight, kept = t.out, t.total, 1 / what.rows, residual if c.ef else None
    if what.action == "decode":
        return lambda x: form.decode(c, out, weight, *rows)
    if what.action == "encode":
        return lambda x: form.encode(c, x, kept, *sent)

    def resum(x: Tensor) -> None:
        form.decode(c, total, 1.0, *rows)
        form.encode(c, total, None, *sent)

    return resum if what.action == "resum" else None


def keep_memory() -> None:
    """Has glibc keep what torch frees. It allocates what it needs anew in every call, and more than 32 MiB of it would be new
    pages from the kernel each time, which take longer than the work: the bench is not about that."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def compiled(body: Callable[[Tensor], Any], x: Tensor, label: str) -> Callable[[Tensor], Any] | None:
    """The same under torch.compile, called once; None, with a line on stderr, where that fails."""
    torch._dynamo.reset()  # else it counts the bodies before as recompilations of one function, and gives up
    faster = torch.compile(body, fullgraph=True, dynamic=False)
    try:
        faster(x)
    except Exception as error:  # whatever is missing or broken there, the bench has other columns
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        print(f"{label}: torch.compile fails, {type(error).__name__}: {said}", file=sys.stderr)
        return None
    return faster


def _accumulated(x: Tensor, residual: Tensor | None) -> Tensor:
    return x.float() if residual is None else residual.add_(x)


def _blocks(t: Tensor, block: int) -> Tensor:
    """The whole blocks, as a view [blocks, block]. Elements behind the last are left out: filling them up would cost
    torch.compile its vector instructions."""
    return t[: t.numel() // block * block].view(-1, block)


def _sum_rows(out: Tensor, weight: float, decoded: Iterator[Tensor]) -> None:
    """Row by row: torch is four times as fast at this as at a sum over the first dimension."""
    total = next(decoded)
    for row in decoded:
        total.add_(row)
    out.copy_(total.view(out.shape).mul_(weight))


def _quantize(c: Compressor, x: Tensor, residual: Tensor | None, codes: Tensor, scales: Tensor) -> None:
    levels = {8: 127.0, 4: 7.0}[c.bits]
    blocks = _blocks(_accumulated(x, residual), c.block)
    absmax = blocks.abs().amax(1, keepdim=True)
    q = (blocks * (levels / absmax.clamp_min(1e-30))).round_()
    scale = absmax / levels
    if c.bits == 4:
        nibbles = (q + 8.0).to(torch.uint8).view(-1)
        codes[: nibbles.numel() // 2].copy_(nibbles[0::2] | nibbles[1::2] << 4)
    else:
        _blocks(codes, c.block).copy_(q)
    scales[: scale.numel()].copy_(scale[:, 0])
    if residual is not None:
        blocks.sub_(q * scale)


def _dequantize_sum(c: Compressor, out: Tensor, weight: float, codes: Tensor, scales: Tensor) -> None:
    if c.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1).to(torch.int8) - 8
    blocks = _blocks(out, c.block)
    _sum_rows(blocks, weight, (row[: blocks.numel()].view(-1, c.block) * s[: len(blocks), None] for row, s in zip(codes, scales)))


def _sign(c: Compressor, x: Tensor, residual: Tensor | None, signs: Tensor, scales: Tensor) -> None:
    blocks = _blocks(_accumulated(x, residual), c.block)
    negative, scale = blocks < 0, blocks.abs().mean(1, keepdim=True)
    eight = negative.view(-1, 8).to(torch.uint8)
    packed = sum(eight[:, i] << i for i in range(8))
    signs[: packed.numel()].copy_(packed)
    scales[: scale.numel()].copy_(scale[:, 0])
    if residual is not None:
        blocks.sub_(torch.where(negative, -scale, scale))


def _sign_sum(c: Compressor, out: Tensor, weight: float, signs: Tensor, scales: Tensor) -> None:
    blocks = _blocks(out, c.block)
    signs, scales = signs[:, : blocks.numel() // 8], scales[:, : len(blocks), None]
    bits = (torch.stack([row >> i & 1 for i in range(8)], -1).view(-1, c.block) for row in signs)
    _sum_rows(blocks, weight, (scale - 2.0 * scale * row for row, scale in zip(bits, scales)))


def _cast(c: Compressor, x: Tensor, residual: Tensor | None, values: Tensor, *scales: Tensor) -> None:
    acc = _accumulated(x, residual)
    values.copy_(acc)
    for one in scales:
        one.fill_(1.0)
    if residual is not None:
        residual.sub_(values)


def _cast_sum(c: Compressor, out: Tensor, weight: float, values: Tensor, *scales: Tensor) -> None:
    _sum_rows(out, weight, (row.float() for row in values))


def _topk(c: Compressor, x: Tensor, residual: Tensor | None, values: Tensor, positions: Tensor) -> None:
    acc = _accumulated(x, residual)
    positions.copy_(acc.abs().topk(values.numel(), sorted=False).indices)
    values.copy_(acc[positions])
    if residual is not None:
        residual[positions] = 0.0


def _scatter_sum(c: Compressor, out: Tensor, weight: float, values: Tensor, positions: Tensor) -> None:
    out.zero_()
    for value, position in zip(values, positions):
        out.index_add_(0, position, value.to(out.dtype))
    out.mul_(weight)


_WAYS = {
    "int8": Way(_quantize, _dequantize_sum),
    "int4": Way(_quantize, _dequantize_sum),
    "sign": Way(_sign, _sign_sum),
    "bf16": Way(_cast, _cast_sum),
    "fp16": Way(_cast, _cast_sum),
    "topk": Way(_topk, _scatter_sum),
}
