"""The definition of every op, in plain torch. Other backends have the same names, arguments and bits.

Arguments that all ops share:
    x: float32, bfloat16 or float16 [n], the gradient; only read.
    residual: float32 [n] in unscaled gradient units, or None. acc = x + residual * loss_scale is what gets encoded, and
        residual <- (acc - decoded) / loss_scale. Where acc is not finite the residual keeps its value.
    loss_scale: float32 [1], the factor the loss was multiplied with, 1 without a GradScaler.
    out: float32, bfloat16 or float16 [n] <- weight * (row 0 + row 1 + ...), added in float32 in rank order.
    A field is 1-D when encoded and [rows, count] when decoded; rows may be any number of bytes apart.

No operation is fused with another, so that each is rounded alike everywhere. A NaN that enters a message is always
0x7fc00000: machines differ in the bits of the NaN that they compute. A decoder accepts any bytes.
"""

import torch
from torch import Tensor

TILE = 65536  # sparse indices are 16 bits within tiles of this many elements

_EXPONENT = 0x7F800000
_NAN = float("nan")


def _magnitude(acc: Tensor) -> Tensor:
    """|acc| as int32 bits: ordered like the magnitude, NaN above infinity above every finite value."""
    return acc.view(torch.int32) & 0x7FFFFFFF


def _accumulate(x: Tensor, residual: Tensor | None, loss_scale: Tensor) -> Tensor:
    acc = x.to(torch.float32)
    if residual is not None:
        acc = acc + residual * loss_scale
    return torch.where(acc.isnan(), _NAN, acc)


def _keep(residual: Tensor | None, error: Tensor, usable: Tensor, loss_scale: Tensor) -> None:
    if residual is not None:
        residual.copy_(torch.where(usable, error * (1.0 / loss_scale), residual))


def _sum_rows(out: Tensor, weight: float, decoded) -> None:
    """out <- weight * the sum of an iterable of float32 rows, in its order."""
    rows = iter(decoded)
    total = next(rows).clone()
    for row in rows:
        total += row
    out.copy_(total * torch.tensor(weight, dtype=torch.float32))


# --- every value, as float32 or bfloat16 ---


def dense_encode(x: Tensor, residual: Tensor | None, loss_scale: Tensor, values: Tensor) -> None:
    """values: float32 or bfloat16 [n] <- acc, rounded to nearest."""
    acc = _accumulate(x, residual, loss_scale)
    values.copy_(acc).masked_fill_(acc.isnan(), _NAN)  # torch's conversion to bfloat16 writes several NaNs
    sent = values.to(torch.float32)
    _keep(residual, acc - sent, _magnitude(sent) < _EXPONENT, loss_scale)


def dense_decode_sum(out: Tensor, weight: float, values: Tensor) -> None:
    """values: float32 or bfloat16 [rows, n]."""
    _sum_rows(out, weight, (row.to(torch.float32) for row in values))


# --- blocks that share a scale ---


def _blocks(acc: Tensor, block: int) -> Tensor:
    """acc as [blocks, block], the last one filled up with zeros."""
    padded = torch.zeros(-(-acc.numel() // block) * block, dtype=torch.float32, device=acc.device)
    padded[: acc.numel()] = acc
    return padded.view(-1, block)


def _spread(per_block: Tensor, block: int, n: int) -> Tensor:
    return per_block.repeat_interleave(block)[:n]


def half_encode(x: Tensor, residual: Tensor | None, loss_scale: Tensor, values: Tensor, scales: Tensor, block: int) -> None:
    """values: float16 [n] <- acc / scale. scales: float32 [ceil(n / block)], the power of two that brings the block's
    largest magnitude into [2^14, 2^15); NaN for a block that holds an infinity or a NaN, with values 0."""
    n, acc = x.numel(), _accumulate(x, residual, loss_scale)
    if n == 0:
        return
    absmax = _magnitude(_blocks(acc, block)).amax(1)
    finite = absmax < _EXPONENT
    exponent = ((absmax >> 23) - 14).clamp_min(1)
    scale = (exponent << 23).view(torch.float32)
    inverse = torch.where(finite, ((254 - exponent) << 23).view(torch.float32), 0.0)
    scales.copy_(torch.where(finite, scale, _NAN))
    usable = _spread(finite, block, n)
    values.copy_(torch.where(usable, acc * _spread(inverse, block, n), 0.0))
    sent = values.to(torch.float32) * _spread(scale, block, n)
    _keep(residual, acc - sent, usable, loss_scale)


def half_decode_sum(out: Tensor, weight: float, values: Tensor, scales: Tensor, block: int) -> None:
    """values: float16 [rows, n], scales: float32 [rows, ceil(n / block)]."""
    n = out.numel()
    _sum_rows(out, weight, (v.to(torch.float32) * _spread(s, block, n) for v, s in zip(values, scales)))


def philox(seed: int, step: int, stream: int, n: int, device) -> Tensor:
    """16 uniform random bits for each of n elements, int32 [n]: Philox4x32 with 7 rounds, counter (index // 8, step,
    stream), key seed; element i takes half i % 2 of word i // 2 % 4. (Salmon et al., SC 2011.)"""
    mask = 0xFFFFFFFF
    group = torch.arange(-(-n // 8), dtype=torch.int64, device=device)
    c = [group & mask, group >> 32, torch.full_like(group, step & mask), torch.full_like(group, stream & mask)]
    k0, k1 = seed & mask, seed >> 32 & mask

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        low, high = b * (a & 0xFFFF), b * (a >> 16)  # 64-bit products of 32-bit words, without a sign in the way
        middle = high + (low >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(7):
        high0, low0 = multiply(0xD2511F53, c[0])
        high1, low1 = multiply(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    halves = [half for word in c for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, 1).flatten()[:n].to(torch.int32)


def quant_encode(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor, codes: Tensor, scales: Tensor,
    bits: int, block: int, stochastic: bool, draw: tuple[int, int, int],
) -> None:
    """codes: 8 bits: int8 [n]; 4 bits: uint8 [ceil(n / 2)], the even element in the low nibble, stored as q + 8.
    scales: float32 [ceil(n / block)] <- absmax / levels, levels = 127 or 7; NaN for a block with an infinity or a NaN.
    q = round(acc / scale), to nearest even or, stochastic, floor(acc / scale + u) with u from philox(*draw).
    draw: (seed, step, stream)."""
    n, acc, levels = x.numel(), _accumulate(x, residual, loss_scale), {8: 127.0, 4: 7.0}[bits]
    if n == 0:
        return
    absmax = _magnitude(_blocks(acc, block)).amax(1)
    finite = absmax < _EXPONENT
    scale = torch.where(finite, absmax.view(torch.float32) / levels, 0.0)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
    scales.copy_(torch.where(finite, scale, _NAN))
    usable = _spread(finite, block, n)
    scaled = torch.where(usable, acc * _spread(inverse, block, n), 0.0)
    if stochastic:
        q = torch.floor(scaled + philox(*draw, n, x.device).to(torch.float32) * (1.0 / 65536.0))
    else:
        q = torch.round(scaled) + 0.0  # no -0, which an integer code cannot carry
    q = q.clamp(-levels, levels)
    q = torch.where(usable, q, 0.0)
    _keep(residual, acc - q * _spread(scale, block, n), usable, loss_scale)
    if bits == 8:
        codes.copy_(q)
    else:
        nibbles = torch.full((2 * codes.numel(),), 8, dtype=torch.uint8, device=x.device)
        nibbles[:n] = (q + 8).to(torch.uint8)
        codes.copy_(nibbles[0::2] | nibbles[1::2] << 4)


def quant_decode_sum(out: Tensor, weight: float, codes: Tensor, scales: Tensor, bits: int, block: int) -> None:
    """codes: int8 [rows, n] or uint8 [rows, ceil(n / 2)], scales: float32 [rows, ceil(n / block)]."""
    n = out.numel()

    def row(c: Tensor, s: Tensor) -> Tensor:
        q = c if bits == 8 else torch.stack([c & 15, c >> 4], 1).flatten()[:n].to(torch.int8) - 8
        return q.to(torch.float32) * _spread(s, block, n)

    _sum_rows(out, weight, map(row, codes, scales))


# --- the k largest ---


def topk_workspace(n: int, k: int) -> int:
    """Bytes of scratch that topk_encode keeps between calls, zero before the first. It speeds up the next call and
    never changes a result."""
    return 0


def topk_encode(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor,
    values: Tensor, index: Tensor, starts: Tensor, workspace: Tensor,
) -> None:
    """The k elements of largest |acc|, NaN before infinity before finite, ties to the lowest index.
    values: float32 [k] <- acc, in the order of the index. index: int16 [k], holding the unsigned index within a tile.
    starts: int64 [ceil(n / 65536)], the position in the list where each tile begins.
    residual <- 0 where selected, acc / loss_scale elsewhere; not touched where acc is not finite."""
    k, acc = values.numel(), _accumulate(x, residual, loss_scale)
    magnitude = _magnitude(acc)
    chosen = torch.sort(magnitude, descending=True, stable=True).indices[:k].sort().values
    values.copy_(acc[chosen])
    index.copy_((chosen % TILE - (chosen % TILE >= 32768) * TILE).to(torch.int16))
    starts.copy_(torch.searchsorted(chosen, torch.arange(starts.numel(), device=x.device) * TILE))
    error = acc.clone()
    error[chosen] = 0.0
    _keep(residual, error, magnitude < _EXPONENT, loss_scale)


def _positions(n: int, index: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The element each list entry means, and whether it is one: entries before the first tile and entries that point
    past the end are none. A start outside the list or before its predecessor is taken as the nearest that is not."""
    k = index.numel()
    begin = starts.clamp(0, k).cummax(0).values if starts.numel() else starts
    tile = torch.searchsorted(begin, torch.arange(k, device=index.device), right=True) - 1
    position = tile * TILE + (index.to(torch.int64) & 0xFFFF)
    return position, (tile >= 0) & (position < n)


def topk_decode_sum(out: Tensor, weight: float, values: Tensor, index: Tensor, starts: Tensor) -> None:
    """values: float32 [rows, k], index: int16 [rows, k], starts: int64 [rows, tiles]. Where a hostile row names an
    element twice, its entries add up in the order of the list."""
    n = out.numel()
    total = torch.zeros(n, dtype=torch.float32, device=out.device)
    for v, i, s in zip(values, index, starts):
        position, valid = _positions(n, i, s)
        total.index_add_(0, position[valid], v[valid])
    out.copy_(total * torch.tensor(weight, dtype=torch.float32))


def sparse_add(residual: Tensor, loss_scale: Tensor, values: Tensor, index: Tensor, starts: Tensor) -> None:
    """residual[selected] += values / loss_scale, with values: float32 [k] and index, starts as topk_encode wrote them."""
    position, valid = _positions(residual.numel(), index, starts)
    residual.index_add_(0, position[valid], values[valid] * (1.0 / loss_scale))
