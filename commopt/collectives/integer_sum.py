import torch
import torch.distributed as dist
from torch import Tensor

from ..compressors import all_finite
from ..plan import Plan
from .link import Link
from .phases import All, Phases, Prepared

_INFINITY = 0x7F800000  # its bits, as an integer above those of every number and below those of every NaN


def integer_sum(plan: Plan) -> Prepared:
    """Integers that an ordinary all-reduce adds up, so that any ring, tree or switch can do it (after Sapio et al., "Scaling
    distributed machine learning with in-network aggregation", NSDI 2021):

    1. The largest magnitude of each block over all ranks, an all-reduce of 4 / block bytes per value, gives one scale to all.
       What travels exactly is added up beside it.
    2. Each value, as a number of steps of that scale above the least one, takes as many bits as the sum over W ranks
       needs, 4, 8 or 16. An all-reduce adds them, several in a word, and none runs over into its neighbour.

    A value is rounded once, by the rank that has it and keeps what that loses. Twice or more the bytes of a two_shot, which
    sends sums rounded again: int4 takes 8 bits up to 18 ranks, int8 16 bits up to 258.
    """
    message = plan.message(0, plan.n, "integers")
    places, counts = zip(*plan.exactly)
    exact = torch.zeros(sum(counts), dtype=torch.float32, device=plan.device)
    exactly = list(zip(places, exact.split(counts)))
    blocks, words = zip(*(part.compressor.shared_words(part.stop - part.start, plan.world) for part in plan.lossy))
    maxima, absmax = _words(blocks, plan.device)
    codes, sums = _words(words, plan.device)

    def begin(link: Link, x: Tensor, residual: Tensor | None) -> Phases:
        def ready():
            lossy = [(part, kernels) for part, kernels in message.ready(plan.draw, plan.loss_scale) if part.compressor.name != "none"]
            for (part, kernels), most, words in zip(lossy, absmax, sums):
                yield part, kernels, x[part.start : part.stop], part.of(residual), most, words.view(torch.uint8)

        def measure(_: int) -> None:
            for place, values in exactly:
                values.copy_(x[place])
                x[place] = 0.0  # for the parts that it lies in
            for part, kernels, some, kept, most, _ in ready():
                part.compressor.measure(kernels, some, kept, most)

        def encode(_: int) -> None:
            for part, kernels, some, kept, most, words in ready():
                part.compressor.encode_shared(kernels, some, kept, most, words, plan.world)

        link.open_late()
        failed = link.written(measure, plan.rank, maxima.view(torch.uint8), None)
        begun = [link.all_reduce(maxima, dist.ReduceOp.MAX)] + ([link.all_reduce(exact)] if exact.numel() else [])
        failed = (yield All(begun)) or failed
        failed = link.written(encode, plan.rank, codes.view(torch.uint8), failed)
        failed = (yield link.all_reduce(codes, late=True)) or failed
        if failed:
            raise failed
        for part, kernels, some, _, most, words in ready():
            part.compressor.decode_shared(kernels, some, plan.weight, most, words, plan.world)
        for place, values in exactly:
            x[place] = (values * plan.weight).to(x.dtype)
        plan.finite = [(maxima < _INFINITY).all(), all_finite(exact)]

    plan.sends(2 * (plan.world - 1) * 4 * (maxima.numel() + codes.numel() + exact.numel()) // plan.world)
    return Prepared(plan, begin, phases=2, merges=False)


def _words(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """int32 [sum of counts], and each count's own."""
    words = torch.zeros(sum(counts), dtype=torch.int32, device=device)
    return words, list(words.split(counts))
