"""Every value, as float32 or bfloat16."""

import torch
from torch import Tensor

from .values import NAN, NON_FINITE, accumulate, keep, magnitude, sum_rows


def dense_encode(x: Tensor, residual: Tensor | None, loss_scale: Tensor, values: Tensor) -> None:
    """values: float32 or bfloat16 [n] <- acc, rounded to nearest."""
    acc = accumulate(x, residual, loss_scale)
    values.copy_(acc).masked_fill_(acc.isnan(), NAN)  # torch's conversion to bfloat16 writes several NaNs
    sent = values.to(torch.float32)
    keep(residual, acc - sent, magnitude(sent) < NON_FINITE, loss_scale)


def dense_decode_sum(out: Tensor, weight: float, values: Tensor) -> None:
    """values: float32 or bfloat16 [rows, n]."""
    sum_rows(out, weight, (row.to(torch.float32) for row in values))
