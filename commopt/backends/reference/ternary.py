"""One of three values each, five to a byte, in blocks that share a scale."""

import torch
from torch import Tensor

from .quant import rounded
from .values import spread, sum_rows

TERNARY_BLOCKS = tuple(5 * 2**k for k in range(3, 9))


def ternary_encode(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor, codes: Tensor, scales: Tensor,
    block: int, stochastic: bool, draw: tuple[int, int, int],
) -> None:
    """codes: uint8 [ceil(n / block) * block / 5]: byte j of a block holds its elements j, j + m, ..., j + 4 m, m = block / 5,
    as the sum of 3^i (q + 1) over i = 0 .. 4. The last block has all its bytes, with q = 0 past the end.
    scales: float32 [ceil(n / block)]. block: one of TERNARY_BLOCKS. scales, draw and what q is: quant.rounded, one level."""
    n, blocks = x.numel(), scales.numel()
    if n == 0:
        return
    digits = torch.ones(blocks * block, dtype=torch.uint8, device=x.device)
    digits[:n] = (rounded(x, residual, loss_scale, scales, 1, block, stochastic, draw) + 1).to(torch.uint8)
    plane = digits.view(blocks, 5, block // 5)
    codes.copy_(sum(plane[:, i] * 3**i for i in range(5)).flatten())


def ternary_decode_sum(out: Tensor, weight: float, codes: Tensor, scales: Tensor, block: int) -> None:
    """codes: uint8 [rows, ceil(n / block) * block / 5], scales: float32 [rows, ceil(n / block)]. In a byte above 242, which
    no encoder writes, the last digit is 3: decoded as twice the scale."""
    n = out.numel()

    def row(c: Tensor, s: Tensor) -> Tensor:
        bytes_ = c.view(-1, 1, block // 5).to(torch.int32)
        digits = [bytes_ // 3**i % 3 if i < 4 else bytes_ // 81 for i in range(5)]
        return (torch.cat(digits, 1).flatten()[:n] - 1).to(torch.float32) * spread(s, block, n)

    sum_rows(out, weight, map(row, codes, scales))
