from typing import Any, Literal

import torch
from torch import Tensor

from .adaptive_ranks import allocate, energies, energy, expected
from .base import Compressor, all_finite, register
from .bf16 import BF16
from .none import NoCompression
from .quantize import Int8

_BLOCK = 1 << 18  # elements of a matrix that the CPU reads again while they are in its cache
_SHIFT = 2.0**-40  # of a Gram matrix' trace: keeps Cholesky from failing, which rounding in float64 could bring about below 2^-50
_PERIOD = 20  # steps from one choice of ranks to the next
_WAYS = {"bf16": BF16(), "float32": NoCompression(), "int8": Int8(block=64)}  # how the factors travel
_HELD = 2.0**-20  # of |Q|: how much of its old direction is mixed into every vector of Q


@register("powersgd")
class PowerSGD(Compressor):
    """Each matrix as a product of two thin ones, by one power iteration per step that starts where the last step ended
    (Vogels et al., "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", NeurIPS 2019).

        A = x + residual, a parameter as [rows, columns], where rows is its first dimension; M = mean of A over the ranks
        P = orthonormal(M Q),   Q' = M^T P,   decoded = P Q'^T = P P^T M,   Q <- orthonormal(Q')
        |M - decoded|^2 = |M|^2 - |Q'|^2 <= |M|^2, and 0 for a matrix of at most that rank: biased

    In two rounds of means, first M Q, then M^T P. values=bf16: 2 rank (rows + columns) bytes per matrix; what rounding the
    factors loses stays in the residual. values=float32: 4. values=int8: 1.06, with a scale for each 64 values; longer blocks
    or 4 bits cost more than they save: a factor's error is one of the whole matrix, and later steps do not look for it.
    Tensors with one dimension, and matrices with rows columns <= 2 rank (rows + columns), travel exactly. Of a flat gradient
    of n elements the bytes are those of the squarest matrix that holds it.

    ranks=adaptive: the same bytes in all, but every 20 steps a matrix whose last direction transmits little for its size gives
    it to one that would transmit more with it: adaptive_ranks.py.

    Orthonormal by Cholesky QR, twice, in float64: no gradient is too small for it. What vanishes decodes to zero, and keeps
    its old direction in Q, so that a gradient that was zero or of low rank can grow. The first Q is drawn from the seed.
    It is not part of a checkpoint and is drawn anew when a bucket changes: the residual keeps what an iteration misses.
    In a step with an infinity or a NaN Q and the residual stay as they were.

    All ranks decode the same bytes by the same matrix products, torch's: their processors and builds of torch must not differ.
    """

    collective = "rounds"
    uses = {"powersgd:rank=4": "matrices on very slow links, any number of ranks"}

    rank: int = 4
    values: Literal[tuple(_WAYS)] = "bf16"
    ranks: Literal["equal", "adaptive"] = "equal"
    ef: bool = True

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be 1 or more, got {self.rank}")

    def takes(self, shape):
        if len(shape) < 2:
            return False
        rows, columns = _matrix(shape)
        return 2 * self.rank * (rows + columns) < rows * columns

    def rounds(self, shapes):
        rows, columns = (sum(sizes) for sizes in zip(*map(_matrix, shapes)))
        return [("p", _WAYS[self.values], self.rank * rows), ("q", _WAYS[self.values], self.rank * columns)]

    def fields(self, n):
        rows = int(n**0.5)
        rounds = self.rounds([torch.Size((rows, -(-n // max(1, rows))))])
        return [(f"{name} {field}", dtype, count) for name, way, total in rounds for field, dtype, count in way.fields(total)]

    def average(self, kernels, tensors, residuals, p, q):
        grads = [t.view(_matrix(t.shape)) for t in tensors]
        kept = [r.view(g.shape) for r, g in zip(residuals, grads)] if residuals is not None else [None] * len(grads)
        held = kernels.scratch("held", torch.float32, q.numel(), lambda flat: _draw(flat, kernels.draw[0]))
        wide = kernels.scratch("wide", torch.float64, max(p.numel(), q.numel()))
        # All thin matrices are stored transposed, [rank, rows] and [rank, columns]: BLAS is many times as fast on these.
        ranks = kernels.notes.setdefault("ranks", [self.rank] * len(grads))
        left = lambda flat: _thin(flat, ranks, [g.shape[0] for g in grads])
        right = lambda flat: _thin(flat, ranks, [g.shape[1] for g in grads])
        of_p, of_q, of_held = left(p), right(q), right(held)

        sums = grads  # A, in the place of a float32 gradient
        if p.dtype != tensors[0].dtype:
            flat = kernels.scratch("sums", torch.float32, sum(g.numel() for g in grads))
            sums = [t.view(g.shape) for t, g in zip(flat.split([g.numel() for g in grads]), grads)]
        for g, r, a, p_i, q_i in zip(grads, kept, sums, of_p, of_held):
            for rows in _blocks(a):
                if a is not g:
                    a[rows].copy_(g[rows])
                if r is not None:
                    torch.addcmul(a[rows], r[rows], kernels.loss_scale, out=a[rows])
                torch.mm(q_i, a[rows].T, out=p_i[:, rows])
        _clear_behind(of_p, p)
        yield  # p = M Q

        double = wide[: p.numel()].copy_(p)
        finite = [all_finite(p_i) for p_i in of_p]
        _orthonormalize(left(double))
        p.copy_(double)
        for a, p_i, q_i, fine in zip(sums, of_p, of_q, finite):
            p_i.masked_fill_(~fine, torch.nan)
            torch.mm(p_i, a, out=q_i)
        _clear_behind(of_q, q)
        yield  # q = M^T P

        finite = [all_finite(q_i) for q_i in of_q]
        decoded = kernels.scratch("decoded", torch.float32, max(a[rows].numel() for a in sums for rows in _blocks(a)))
        for g, r, a, p_i, q_i, fine in zip(grads, kept, sums, of_p, of_q, finite):
            for rows in _blocks(a):
                d = torch.mm(p_i[:, rows].T, q_i, out=decoded[: a[rows].numel()].view(a[rows].shape))
                if r is not None:
                    _keep(r[rows], a[rows], d, kernels.loss_scale, fine)
                g[rows].copy_(d)
        double = wide[: q.numel()].copy_(q)
        new_held = right(double)
        for new, old in zip(new_held, of_held):
            new.addcmul_(old.to(torch.float64), _HELD * torch.linalg.vector_norm(new) + 1e-100)
        _orthonormalize(new_held)
        torch.where(torch.stack(finite).all(), double.to(torch.float32), held, out=held)
        steps = kernels.notes["steps"] = kernels.notes.get("steps", 0) + 1
        if self.ranks == "adaptive" and steps % _PERIOD == 0 and all(finite):
            self._choose_ranks(kernels, [tuple(g.shape) for g in grads], of_q, of_held)

    def _choose_ranks(self, kernels: Any, shapes: list[tuple[int, int]], sent: list[Tensor], directions: list[Tensor]) -> None:
        """Which directions each matrix keeps, by the energy that they have sent; new ones are drawn. All are moved to where
        they lie with the new ranks."""
        squares = [q.to(torch.float64).square().sum(1).tolist() for q in sent]
        now, held = kernels.notes["ranks"], kernels.scratch("held", torch.float32, self.rank * sum(columns for _, columns in shapes))
        known = expected(energies(squares), kernels.notes.get("energies", [[]] * len(now)))
        chosen, kernels.notes["energies"] = allocate(self.rank, shapes, now, known), known
        if chosen == now:
            return
        order = [sorted(range(r), key=lambda j: -energy(s[j])) for r, s in zip(now, squares)]  # ties to the first
        kept = [d[o[:r]] for d, o, r in zip(directions, order, chosen)]
        _draw(held, kernels.draw[0] + kernels.notes["steps"])
        for place, d in zip(_thin(held, chosen, [columns for _, columns in shapes]), kept):
            place.mul_(place.shape[1] ** -0.5)  # about as long as the others
            place[: d.shape[0]] = d
        kernels.notes["ranks"] = chosen


def _thin(flat: Tensor, ranks: list[int], lengths: list[int]) -> list[Tensor]:
    """The thin matrices [rank, length] that lie one after the other; what is behind them is not in use."""
    sizes = [r * length for r, length in zip(ranks, lengths)]
    return [t.view(r, -1) for t, r in zip(flat[: sum(sizes)].split(sizes), ranks)]


def _clear_behind(thin: list[Tensor], flat: Tensor) -> None:
    rest = flat[sum(t.numel() for t in thin) :]
    if rest.numel():
        rest.zero_()


def _matrix(shape: torch.Size) -> tuple[int, int]:
    return shape[0], shape[1:].numel()


def _blocks(a: Tensor) -> list[slice]:
    """The rows of a matrix, a cacheful at a time; a GPU takes them all."""
    rows = max(1, _BLOCK // a.shape[1] if a.device.type == "cpu" else a.shape[0])
    return [slice(i, min(i + rows, a.shape[0])) for i in range(0, a.shape[0], rows)]


def _keep(residual: Tensor, had: Tensor, decoded: Tensor, loss_scale: Tensor, fine: Tensor) -> None:
    """residual <- (had - decoded) / loss_scale if fine, bool []; had is lost. The CPU looks; for a GPU nobody waits."""
    if residual.device.type != "cpu":
        torch.where(fine, torch.sub(had, decoded, out=had).div_(loss_scale), residual, out=residual)
    elif fine:
        torch.sub(had, decoded, out=residual)
        if loss_scale != 1.0:
            residual.div_(loss_scale)


def _draw(flat: Tensor, seed: int) -> None:
    flat.copy_(torch.randn(flat.numel(), generator=torch.Generator("cpu").manual_seed(seed), device="cpu"))  # the same numbers for any device


def _orthonormalize(thin: list[Tensor]) -> None:
    """Makes the rows of each matrix, float64 [rank, n], orthonormal. Zeros stay zeros, and a row that depends on those
    before it, to 2^-20 of the matrix, may end shorter than 1, never longer."""
    if len({len(a) for a in thin}) > 1:
        for rank in sorted({len(a) for a in thin}):
            _orthonormalize([a for a in thin if len(a) == rank])
        return
    one = torch.eye(len(thin[0]), dtype=thin[0].dtype, device=thin[0].device)
    for _ in range(2):
        gram = torch.stack([a @ a.T for a in thin])
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal += _SHIFT * diagonal.sum(-1, keepdim=True) + 1e-300
        lower, _ = torch.linalg.cholesky_ex(gram)
        inverse = torch.linalg.solve_triangular(lower, one, upper=False)
        for a, by in zip(thin, inverse):
            a.copy_(by @ a)
