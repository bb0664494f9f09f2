"""What reaches a threshold, up to k values of it; the threshold is carried from call to call and made for k to reach it.

All of it is arithmetic of whole numbers on magnitudes as int32 bits, in which equal ratios are nearly equal distances.
"""

import torch
from torch import Tensor

from .topk import in_tiles
from .values import NAN, NON_FINITE, accumulate, keep, magnitude

SAMPLE = 65536  # elements that a first threshold is made from
BINS, WIDTH = 16, 19  # the distances from the threshold are counted in bins of 2^19, a 16th of an octave; the last is open


def threshold_workspace(n: int, k: int) -> int:
    """Bytes of scratch that threshold_encode keeps between calls, zero before the first. It never changes a result."""
    return 0


def threshold_encode(
    x: Tensor, residual: Tensor | None, loss_scale: Tensor,
    values: Tensor, index: Tensor, starts: Tensor, control: Tensor, begin: int, workspace: Tensor,
) -> None:
    """The first k elements from `begin` on, going round, whose magnitude is at least the threshold.
    values: float32 [k] <- acc; index: int16 [k], starts: int64 [ceil(n / 65536)] as topk_encode writes them, in the order
    of the index. Where fewer than k reach it, the list ends with zeros for the last element.
    control: int32 [2], the threshold, 0 for none, and what it should have been in the last call <- those of the next call.
    residual <- 0 where sent, acc / loss_scale elsewhere; not touched where acc is not finite. If any acc is not, values[0]
    <- NaN, and its element counts as not sent, so that no choice can leave the sign of trouble out."""
    n, k, acc = x.numel(), values.numel(), accumulate(x, residual, loss_scale)
    size = magnitude(acc)
    threshold = int(control[0]) or first_threshold(size, k)
    reached = (size >= threshold).nonzero().flatten()
    chosen = torch.cat([reached[reached >= begin], reached[reached < begin]])[:k].sort().values
    values.zero_()
    values[: chosen.numel()] = acc[chosen]
    in_tiles(torch.cat([chosen, chosen.new_full((k - chosen.numel(),), n - 1)]), index, starts)
    bad = bool((size >= NON_FINITE).any())
    if bad and k:
        values[0], chosen = NAN, chosen[1:]
    error = acc.clone()
    error[chosen] = 0.0
    keep(residual, error, size < NON_FINITE, loss_scale)
    control.copy_(torch.tensor((0, 0) if bad else next_threshold(threshold, int(control[1]), size[reached] - threshold, k)))


def first_threshold(size: Tensor, k: int) -> int:
    """About the k-th largest of n magnitudes, from one element of each of 65536 stretches of equal length, at places that
    have no period; exactly where n is no more than that. What is not finite reaches any threshold."""
    n = size.numel()
    m = min(n, SAMPLE)
    if k == 0 or n == 0:
        return NON_FINITE
    j = torch.arange(m, device=size.device)
    sample = size[j * n // m + ((j * 2654435761 & 0xFFFFFFFF) * (n // m) >> 32)]
    rank = max(1, (k * m + n // 2) // n)
    return min(max(1, int(sample.sort(descending=True).values[rank - 1])), NON_FINITE)


def next_threshold(threshold: int, last: int, above: Tensor, k: int) -> tuple[int, int]:
    """The next threshold and `fitting`, what k would have reached this time, by the distances `above` of those that reached
    the threshold: between two of them where they are k or more, and else as far below it as the nearer half of them is
    above, for each time that they are too few. The next one goes on by half of the way from `last`, the fitting one of the
    call before, to it. (0, 0) where they are less than a quarter of k, or k of them in the last bin."""
    c = above.numel()
    counts = torch.bincount((above >> WIDTH).clamp(max=BINS - 1), minlength=BINS)
    reach = counts.flip(0).cumsum(0).flip(0)  # how many are in this bin or higher
    if k == 0 or 4 * c < k or reach[-1] >= k:
        return 0, 0
    j = int((reach >= k if c >= k else 2 * reach >= c).sum()) - 1
    if c >= k:
        fitting = threshold + (j << WIDTH) + int(reach[j] - k << WIDTH) // int(counts[j])
    else:
        half = (j << WIDTH) + int(2 * reach[j] - c << WIDTH) // int(2 * counts[j])
        fitting = max(1, threshold - half * (k - c) // c)
    trend = fitting - last >> 1 if last else 0
    return min(max(1, fitting + trend), NON_FINITE), fitting
