import dataclasses
from typing import Literal

import torch
from torch import Tensor

from ..wire import Layout
from .base import Compressor, register
from .sparse_index import PLAIN
from .sparse_values import FORMATS
from .topk_scopes import SCOPES


@register("topk")
class TopK(Compressor):
    """The k = ratio n values of largest magnitude, exactly, ties to the lowest index (Aji & Heafield, "Sparse communication
    for distributed gradient descent", EMNLP 2017; error feedback: Stich et al., "Sparsified SGD with memory", NeurIPS 2018).

        S = the k indices of largest |x|,   decoded_i = x_i for i in S, else 0
        |x - decoded|^2 <= (1 - k/n) |x|^2: biased, and a contraction, which error feedback needs

    scope=global: the largest of the whole bucket.
    scope=threshold: what reaches a threshold that k of the whole bucket are expected to reach, and no more than k of it; one
        pass, and no choice among candidates. The threshold goes on from what k would have reached in the steps before.
    scope=block: the largest round(1024 ratio) of each of n // 1024 blocks, and of the n % 1024 elements that are left as
        many as ratio says, rounded up. Block j is the 32 lines t of 32 elements from (t (n // 1024) + j) 32 on, so that it
        has a share of every layer; on real gradients this keeps 0.85 to 0.97 of the energy that scope=global keeps. One
        pass whatever the gradient, no state.

    values=float32: 4 bytes per entry; values=bf16: 2 bytes; values=fp8 (e4m3) and int8: 1 byte, values=int4: 1/2 byte, and
    4 bytes for each 256 (int4: 64) entries, which share a scale. What rounding a value loses stays in the residual.

    index=coded: the fewest bytes: for scope=global an Elias-Fano code, 8.56 bits per entry at 1 % and 5.23 at 10 %, for
    scope=block 10 bits. index=u16: 16 bits and, for each tile of 65536 elements, 64 more; the quickest to write and to read.

    warmup: in the first `warmup` steps the ratio falls in four equal stages from 25 % to its value (Lin et al., "Deep
    Gradient Compression", ICLR 2018): early gradients change fast, and what waits in the residual then is stale.

    momentum: above 0, what is accumulated is a velocity u <- momentum u + x and not x, so that an entry that waits gathers
    the momentum it would have had, and u is set to zero where it was sent (momentum correction and factor masking of the
    same paper). It takes the place of the optimizer's own momentum, for SGD without one, and one more float32 per value.

    collective=gather: every rank gets the lists of all others, W - 1 of them. collective=sparse_two_shot: the sum of W lists
    is cut to k entries again, so that a rank sends at most two lists however many ranks there are. auto: the first up to 4
    ranks.
    """

    uses = {"topk:ratio=0.01": "very slow links", "topk:scope=threshold": "the same in one pass, with what happens to reach a threshold", "topk:scope=block": "the same, at one speed whatever the gradient"}

    ratio: float = 0.01
    scope: Literal[tuple(SCOPES)] = "global"
    values: Literal[tuple(FORMATS)] = "float32"
    index: Literal["coded", "u16"] = "coded"
    warmup: int = 100
    momentum: float = 0.0
    collective: Literal["auto", "gather", "sparse_two_shot"] = "auto"
    ef: bool = True

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, got {self.ratio}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be a number of steps, got {self.warmup}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.momentum and not self.ef:
            raise ValueError("momentum is accumulated in the residual: it needs ef=true")

    @property
    def witness(self) -> str:
        return FORMATS[self.values].witness

    @property
    def slots(self) -> int:
        return 2 if self.momentum else 1

    def at(self, step):
        if step >= self.warmup or self.ratio >= 0.25:
            return dataclasses.replace(self, warmup=0)
        stage = 4 * step // self.warmup
        return dataclasses.replace(self, warmup=0, ratio=0.25 * (self.ratio / 0.25) ** (stage / 4))

    def k(self, n: int) -> int:
        return SCOPES[self.scope].count(n, self.ratio)

    def entries(self, n):
        return 0 if self.scope == "block" else self.k(n)

    def naming(self, entries, n):
        return dataclasses.replace(self, ratio=entries / n)

    def resent(self):
        return dataclasses.replace(self, momentum=0.0)  # a sum has gathered it already

    @property
    def _coding(self):
        return SCOPES[self.scope].coding if self.index == "coded" else PLAIN

    def fields(self, n):
        k = self.k(n)
        return FORMATS[self.values].fields(k) + self._coding.fields(n, SCOPES[self.scope].places(n, k))

    def encode(self, kernels, x, residual, *fields):
        velocity = None
        if residual is not None and self.momentum:
            residual, velocity = residual
            x = self._accelerate(x, velocity, kernels.loss_scale)
        n = x.numel()
        scope, k = SCOPES[self.scope], self.k(n)
        coded, placed = self._split(fields, k)
        values = coded[0] if self.values == "float32" else kernels.scratch("values", torch.float32, k)
        places = placed if self._coding is PLAIN else [kernels.scratch(*place) for place in scope.places(n, k)]
        scope.encode(kernels, x, residual, self.ratio, values, *places)
        if self._coding is not PLAIN:
            self._coding.write(kernels, n, places, placed)
        if velocity is not None:
            sent = scope.positions(n, self.ratio, *places)
            velocity.index_fill_(0, sent[torch.isfinite(values) & (values != 0)], 0.0)
        if self.values == "float32":
            return
        error, one = kernels.scratch("error", torch.float32, k).zero_(), kernels.scratch("one", torch.float32, 1).fill_(1.0)
        FORMATS[self.values].encode(kernels, values, error, one, *coded)
        if residual is not None:
            scope.add(kernels, residual, self.ratio, error, *places)

    def _accelerate(self, x: Tensor, velocity: Tensor, loss_scale: Tensor) -> Tensor:
        """velocity <- momentum velocity + x / loss_scale; returns it in the units of x, float32. Where x is not finite, x
        goes through and the velocity stays."""
        finite = torch.isfinite(x)
        torch.where(finite, velocity * self.momentum + x.float() / loss_scale, velocity, out=velocity)
        return torch.where(finite, velocity * loss_scale, x)

    def decode_sum(self, kernels, out, weight, *fields):
        values, *places = self.lists(kernels, out.numel(), *fields)
        SCOPES[self.scope].decode_sum(kernels, out, weight, self.ratio, values, *places)

    def lists(self, kernels, n: int, *fields: Tensor) -> list[Tensor]:
        """The lists of the rows of fields as the ops add them up: values, float32 [rows, k], and where they were, plainly."""
        k, rows = self.k(n), fields[0].shape[0]
        coded, placed = self._split(fields, k)
        values, places = coded[0], placed
        if self.values != "float32":
            values = kernels.scratch("lists", torch.float32, rows * k).view(rows, k)
            for r in range(rows):
                FORMATS[self.values].decode(kernels, values[r], *(field[r : r + 1] for field in coded))
        if self._coding is not PLAIN:
            plain = Layout(SCOPES[self.scope].places(n, k))
            places = plain.views(kernels.scratch("places", torch.uint8, rows * plain.nbytes).view(rows, plain.nbytes))
            for r in range(rows):
                self._coding.read(kernels, n, [place[r] for place in places], [field[r] for field in placed])
        return [values, *places]

    def _split(self, fields, k: int):
        count = len(FORMATS[self.values].fields(k))
        return fields[:count], fields[count:]
