"""Integers in blocks whose scale all ranks share, so that sums of codes are codes of sums: a collective may add them up.

Three steps: every rank measures its blocks, the largest of the measures over the ranks is that of all, every rank encodes with
the scale that it gives. Codes are q + levels, unsigned, so that no sum of `rows` of them needs more than `width` bits as long as
2 levels rows < 2^width: what adds whole words of 32 bits adds the codes in them.
"""

import torch
from torch import Tensor

from .quant import quantized, scale_of
from .values import accumulate, blocks, magnitude, spread


def quant_absmax(x: Tensor, residual: Tensor | None, loss_scale: Tensor, absmax: Tensor, block: int) -> None:
    """absmax: int32 [ceil(n / block)] <- the bits of the largest |acc| of each block. As integers they are ordered like the
    magnitudes; with an infinity it is 0x7f800000, with a NaN 0x7fc00000. residual: only read."""
    if x.numel():
        absmax.copy_(magnitude(blocks(accumulate(x, residual, loss_scale), block)).amax(1))


def quant_encode_shared(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor, absmax: Tensor, codes: Tensor, levels: int, width: int, block: int,
    stochastic: bool, draw: tuple[int, int, int],
) -> None:
    """absmax: as quant_absmax gives it, for each block at least this rank's own. codes: uint8, a multiple of 4 bytes and at
    least ceil(n width / 8): q + levels in `width` bits each, 4 (the even element in the low nibble), 8 or 16 (little endian),
    and zeros behind them. levels: 1 to 127, 2 levels < 2^width. q and the residual: as in quant_encode, but with the scale that
    absmax gives, 0 and kept where that is not finite."""
    n = x.numel()
    codes.zero_()
    if n == 0:
        return
    acc = accumulate(x, residual, loss_scale)
    q = quantized(acc, scale_of(absmax, levels, stochastic), residual, loss_scale, levels, block, stochastic, draw)
    code = (q + levels).to(torch.uint8)
    if width == 4:
        padded = torch.zeros(2 * codes.numel(), dtype=torch.uint8, device=codes.device)
        padded[:n] = code
        codes.copy_(padded[::2] | padded[1::2] << 4)
    else:  # the high byte of a wide code is zero
        codes[: n * width // 8 : width // 8] = code


def quant_decode_shared(
    out: Tensor, weight: float, codes: Tensor, absmax: Tensor, rows: int, levels: int, width: int, block: int, stochastic: bool
) -> None:
    """out <- weight * (code - rows levels) * scale. codes: the sum of what `rows` ranks have encoded, 2 levels rows < 2^width.
    The scale of a block is that of the encoder; NaN where absmax is that of an infinity or a NaN."""
    n = out.numel()
    if width == 4:
        code = torch.stack([codes & 15, codes >> 4], 1).flatten()[:n].to(torch.int32)
    else:
        code = sum(codes[i : n * width // 8 : width // 8].to(torch.int32) << 8 * i for i in range(width // 8))
    value = (code - rows * levels).to(torch.float32) * spread(scale_of(absmax, levels, stochastic), block, n)
    out.copy_(value * torch.tensor(weight, dtype=torch.float32))
