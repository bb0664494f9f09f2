"""How the values of a sparse list travel: the fields they take in a message, and the ops that fill and read them.

What rounding a value loses is returned to the residual. A new format is one line of FORMATS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..wire import Field


class Format(NamedTuple):
    """fields(k): those of k values. encode(kernels, values, error, one, *fields): fields <- values, error: float32 [k], zero,
    <- what was lost. decode(kernels, values, *fields): float32 [k] <- one row. `witness` is not finite exactly where a value is."""

    fields: Callable[[int], list[Field]]
    encode: Callable[..., None]
    decode: Callable[..., None]
    witness: str = "values"


def _dense(dtype: torch.dtype) -> Format:
    def encode(kernels: Any, values: Tensor, error: Tensor, one: Tensor, *coded: Tensor) -> None:
        kernels.dense_encode(values, error, one, *coded)

    def decode(kernels: Any, values: Tensor, *coded: Tensor) -> None:
        kernels.dense_decode_sum(values, 1.0, *coded)

    return Format(lambda k: [("values", dtype, k)], encode, decode)


def _integers(bits: int, block: int) -> Format:
    codes = {8: torch.int8, 4: torch.uint8}[bits]

    def encode(kernels: Any, values: Tensor, error: Tensor, one: Tensor, *coded: Tensor) -> None:
        kernels.quant_encode(values, error, one, *coded, bits, block, False, (0, 0, 0))

    def decode(kernels: Any, values: Tensor, *coded: Tensor) -> None:
        kernels.quant_decode_sum(values, 1.0, *coded, bits, block)

    return Format(lambda k: [("codes", codes, -(-k * bits // 8)), ("scales", torch.float32, -(-k // block))], encode, decode, "scales")


def _fp8(block: int) -> Format:
    def encode(kernels: Any, values: Tensor, error: Tensor, one: Tensor, *coded: Tensor) -> None:
        kernels.float_encode(values, error, one, *coded, None, "e4m3", "float32", block, False, (0, 0, 0))

    def decode(kernels: Any, values: Tensor, *coded: Tensor) -> None:
        kernels.float_decode_sum(values, 1.0, *coded, None, "e4m3", "float32", block)

    return Format(lambda k: [("codes", torch.uint8, k), ("scales", torch.float32, -(-k // block))], encode, decode, "scales")


FORMATS = {
    "float32": _dense(torch.float32),
    "bf16": _dense(torch.bfloat16),
    "fp8": _fp8(256),
    "int8": _integers(8, 256),
    "int4": _integers(4, 64),
}
