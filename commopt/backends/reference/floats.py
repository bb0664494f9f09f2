"""Small floats in blocks that share a scale."""

from typing import NamedTuple

import torch
from torch import Tensor

from .values import NAN, NON_FINITE, accumulate, blocks, keep, magnitude, over, philox, spread, sum_rows


class Element(NamedTuple):
    mantissa: int  # bits
    least: int  # exponent of the smallest normal value; what is below is spaced like what is just above
    most: float  # the largest value: what is larger becomes this
    top: int  # a power-of-two scale brings the block's largest magnitude into [2^top, 2^(top + 1))


ELEMENTS = {
    "e4m3": Element(3, -6, 448.0, 8),  # no infinity; 0x7f and 0xff are NaN
    "e5m2": Element(2, -14, 57344.0, 15),  # from 0x7c on infinity and NaN
    "e2m1": Element(1, 0, 6.0, 2),  # 4 bits, two to a byte, the even element in the low nibble
    "power": Element(0, -126, 1.0, -1),  # 2^(code - 127), code 0 is zero; rounding up may double the largest
}


def _bits(x: float) -> int:
    return int(torch.tensor(x).view(torch.int32))


def _to_code(scaled: Tensor, element: str, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The code of each finite float32, uint8, and the value it stands for. To nearest, ties to the even mantissa; or, with
    16 random bits for each, up with the probability of the fraction."""
    e = ELEMENTS[element]
    size = magnitude(scaled).clamp_max(_bits(e.most))
    exponent = (size >> 23).clamp_min(127 + e.least)
    step = (exponent - e.mantissa << 23).view(torch.float32)
    q = size.view(torch.float32) / step
    if random is None:
        q = torch.round(q)
    else:
        q = torch.floor((torch.floor(q * 2.0**17) + (2 * random + 1).to(torch.float32)) / 2.0**17)
    code = q.to(torch.int32) + (exponent - (127 + e.least) << e.mantissa)
    negative = scaled.view(torch.int32) < 0
    code = code + negative * (8 if element == "e2m1" else 128)
    return code.to(torch.uint8), torch.where(negative, -(q * step), q * step)


def _to_value(code: Tensor, element: str) -> Tensor:
    """float32 values of uint8 codes, of any shape."""
    e, sign = ELEMENTS[element], 8 if element == "e2m1" else 128
    rest = code.to(torch.int32) & (sign - 1)
    normal = ((rest << 23 - e.mantissa) + (126 + e.least << 23)).view(torch.float32)
    value = torch.where(rest >> e.mantissa == 0, rest.to(torch.float32) * 2.0 ** (e.least - e.mantissa), normal)
    if element == "e4m3":
        value = torch.where(rest == 0x7F, NAN, value)
    if element == "e5m2":
        value = torch.where(rest >= 0x7C, torch.where(rest == 0x7C, float("inf"), NAN), value)
    return torch.where(code.to(torch.int32) & sign != 0, -value, value)


def _to_scale(scales: Tensor, whole: Tensor | None, scaling: str) -> Tensor:
    """float32 [blocks], what the codes of each block are multiplied with."""
    if scaling == "float32":
        return scales
    if scaling == "e4m3":
        return _to_value(scales, "e4m3") * whole
    code = scales.to(torch.int32)
    power = torch.where(code == 0, 0x00400000, code << 23).view(torch.float32)
    return torch.where(code == 0xFF, NAN, power)


def absmax(x: Tensor, residual: Tensor | None, loss_scale: Tensor, out: Tensor, divisor: float) -> None:
    """out: float32 [1] <- the largest |acc| / divisor, NaN above infinity above every finite value; 0 where n is 0."""
    size = magnitude(accumulate(x, residual, loss_scale))
    out.copy_(over(size.amax().view(torch.float32), divisor) if size.numel() else torch.zeros(1))


def float_encode(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor, codes: Tensor, scales: Tensor, whole: Tensor | None,
    element: str, scaling: str, block: int, stochastic: bool, draw: tuple[int, int, int],
) -> None:
    """codes: uint8 [n], or [ceil(n / 2)] for e2m1: acc / scale in the format `element`, what is too large as the largest.
    scales: of each of ceil(n / block) blocks,
        float32: float32, largest magnitude / largest value of the element.
        e8m0: uint8 c for 2^(c - 127), 2^(floor(log2 largest magnitude) - top), at least 2^-127 and at most 2^127.
        e4m3: uint8, largest magnitude / largest value of the element / whole, rounded to nearest; the scale is this times whole.
            whole: float32 [1], only read; None with other scalings.
    A block with an infinity or a NaN has the scale NaN, in e8m0 0xff, in e4m3 0x7f, and codes 0; all have where whole is one.
    stochastic, draw: (seed, step, stream): see quant_encode."""
    n, acc, e = x.numel(), accumulate(x, residual, loss_scale), ELEMENTS[element]
    if n == 0:
        return
    largest = magnitude(blocks(acc, block)).amax(1)
    finite = largest < NON_FINITE
    if scaling == "float32":
        stored = torch.where(finite, over(largest.view(torch.float32), e.most), NAN)
    elif scaling == "e8m0":
        stored = torch.where(finite, ((largest >> 23) - e.top).clamp(0, 254), 0xFF).to(torch.uint8)
    else:
        finite = finite & torch.isfinite(whole)
        ratio = torch.where(finite & (whole > 0), over(largest.view(torch.float32), e.most) / whole, 0.0)
        stored = torch.where(finite, _to_code(ratio, "e4m3")[0], 0x7F)
    scales.copy_(stored)
    scale = torch.where(finite, _to_scale(stored, whole, scaling), 0.0)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    inverse = torch.where(torch.isfinite(inverse), inverse, 0.0)
    usable = spread(finite, block, n)
    scaled = torch.where(usable, acc * spread(inverse, block, n), 0.0)
    code, value = _to_code(scaled, element, philox(*draw, n, x.device) if stochastic else None)
    keep(residual, acc - value * spread(scale, block, n), usable, loss_scale)
    if element == "e2m1":
        nibbles = torch.zeros(2 * codes.numel(), dtype=torch.uint8, device=x.device)
        nibbles[:n] = code
        code = nibbles[0::2] | nibbles[1::2] << 4
    codes.copy_(code)


def float_decode_sum(
    out: Tensor, weight: float, codes: Tensor, scales: Tensor, whole: Tensor | None, element: str, scaling: str, block: int
) -> None:
    """codes: uint8 [rows, n] or [rows, ceil(n / 2)], scales: [rows, ceil(n / block)], whole: float32 [rows, 1] or None."""
    n = out.numel()

    def row(c: Tensor, s: Tensor, w: Tensor | None) -> Tensor:
        if element == "e2m1":
            c = torch.stack([c & 15, c >> 4], 1).flatten()[:n]
        return _to_value(c, element) * spread(_to_scale(s, w, scaling), block, n)

    sum_rows(out, weight, map(row, codes, scales, [None] * len(codes) if whole is None else whole))
