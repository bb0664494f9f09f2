"""#wrong, as nccl-tests counts it: the elements of a mean that are not what they must be.

With n ranks, u = 2^-24 and u' the rounding of the gradient's dtype (2^-24 of float32, 2^-12 of fp16, 2^-9 of bf16):

    all          rank r's bits are those of rank 0
    exact        |mean - exact| <= (n + 1) u' mean|x|, exact being computed in float64 by each rank from all ranks' gradients,
                 which it makes itself from their seeds: n roundings of a sum in any order, one of the division
    with error feedback
                 |(what was sent) + (what is kept) - (what there was)| <= 8 n u (mean|x| + mean|kept| + |sent| + rms(x)) + u' |sent|,
                 means over the ranks, sums over two exchanges, of which the second sends what the first has kept: float32
                 roundings of what was added up, those of neighbours where a method mixes them, and of a mean in a shorter dtype
    other lossy  the bits that the reference kernels and the same collective give in one process, from all ranks' gradients;
                 see alone.py. Methods that work in rounds multiply matrices: 2^-14 rms(x) is allowed them
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import alone
from .exchange import Ours, Plain

U = 2.0**-24


class WrongMean(RuntimeError):
    """The same on all ranks."""


class Gradients(NamedTuple):
    """make(rank, step): the gradient of any rank, on the CPU. talk: a gloo group for what the check itself has to say."""

    make: Callable[[int, int], Tensor]
    device: torch.device
    shape: tuple[int, int]
    nodes: tuple[tuple[int, ...], ...]
    talk: dist.ProcessGroup


def check(c: Ours | Plain, gradients: Gradients) -> None:
    """Makes the first exchanges of a candidate. WrongMean, which says where, unless none of their elements is wrong."""
    rank, world = dist.get_rank(), dist.get_world_size()
    twice = c.residual is not None and c.plan.slots == 1  # with momentum a second gradient does not simply add up
    sent, had, sizes = 0.0, 0.0, [0.0, 0.0]  # of the means and of the gradients
    for step in range(2 if twice else 1):
        everyone = [gradients.make(r, step) for r in range(world)]
        x = everyone[rank].to(gradients.device, copy=True)
        c.exchange(x)
        mean = x.cpu()
        sent = sent + mean.double()
        had = had + sum(g.double() for g in everyone) / world
        sizes = [sizes[0] + mean.double().abs(), sizes[1] + sum(g.double().abs() for g in everyone) / world]
    limits = torch.finfo(mean.dtype)
    if c.exact:
        got, must, allowed = sent, had, (world + 1) * limits.eps / 2 * sizes[1] + world * limits.smallest_normal * limits.eps
    elif c.residual is not None:
        kept = (c.residual if c.residual.dim() == 1 else c.residual[0]).double().cpu()
        left, most = kept / world, kept.abs() / world
        dist.all_reduce(left, group=gradients.talk)
        dist.all_reduce(most, group=gradients.talk)
        allowed = 8 * world * U * (sizes[1] + most + sizes[0] + had.square().mean().sqrt()) + limits.eps / 2 * sizes[0] + 2 * limits.smallest_normal * limits.eps
        got, must = sent + left, had
    else:
        must = torch.empty_like(mean)
        if rank == 0:
            must = alone.mean(c.spec, gradients.shape, everyone, c.plan.step, gradients.nodes, c.whole)
        dist.broadcast(must, 0, gradients.talk)
        got, must = sent, must.double()
        allowed = torch.full_like(got, 2.0**-14 * float(had.square().mean().sqrt()) if c.collective == "rounds" else 0.0)
    report(c.spec, mean.nbytes, _wrong(got, must, allowed, mean, gradients.talk), gradients.talk)


def report(spec: str, nbytes: int, mine: str | None, talk: dist.ProcessGroup) -> None:
    """WrongMean on all ranks if one of them has something to say."""
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine, group=talk)
    if any(said):
        raise WrongMean(f"{spec}, {nbytes} bytes: " + "; ".join(f"rank {r}: {text}" for r, text in enumerate(said) if text))


def check_same(spec: str, mean: Tensor, talk: dist.ProcessGroup) -> None:
    """WrongMean unless all ranks hold the same bits."""
    mine = mean.double()
    report(spec, mean.nbytes, _wrong(mine, mine, torch.zeros(()), mean, talk), talk)


def _wrong(got: Tensor, must: Tensor, allowed: Tensor, mean: Tensor, talk: dist.ProcessGroup) -> str | None:
    """How many elements of this rank are wrong and what the first one is, or None."""
    digests = [0] * dist.get_world_size()
    dist.all_gather_object(digests, zlib.crc32(mean.view(torch.uint8).numpy()), group=talk)
    first = mean.clone()
    if len(set(digests)) > 1:
        dist.broadcast(first, 0, talk)
    other = _differs(mean, first)
    far = ~((got - must).abs() <= allowed)  # a NaN is far
    wrong = far | other
    if not wrong.any():
        return None
    i = int(wrong.nonzero()[0])
    where = f"#wrong {int(wrong.sum())} of {wrong.numel()} elements, the first at {i}: "
    if far[i]:
        return where + f"{float(got[i]):.9g} where {float(must[i]):.9g} must be, within {float(allowed[i]):.1e}"
    return where + f"{float(mean[i]):.9g} where rank 0 has {float(first[i]):.9g}"


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """bool [n]: where the bits do."""
    word = torch.int32 if a.element_size() == 4 else torch.int16
    return a.view(word) != b.view(word)
