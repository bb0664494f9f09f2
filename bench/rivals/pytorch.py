"""PyTorch's own hooks, registered as the documentation of `torch.distributed.algorithms.ddp_comm_hooks` says.

    fp16            fp16_compress_hook: the gradient in 16 bits
    powersgdR       powerSGD_hook with R columns, Vogels et al. 2019, https://arxiv.org/abs/1905.13727; of an m x n matrix two factors travel,
                    R (m + n) values
    fp16-powersgdR  fp16_compress_wrapper(powerSGD_hook): the factors in 16 bits, and the residual too

PowerSGD has one bucket, since with two it deadlocks on gloo, and all its parameters are used. On gloo the others do not run (torch 2.13): the bf16
hook and its wrapper are refused, batched_powerSGD_hook fails in its first step with an assertion, and both quantization
hooks fail when they read what was gathered. post_localSGD_hook averages parameters instead of gradients, with an optimizer of its own.
"""

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ..candidates import ring

STARTS = 2  # the first step that PowerSGD compresses; the least it accepts


def missing() -> str | None:
    return None


def wrap(name: str, model: nn.Module, bucket_mb: float) -> DistributedDataParallel:
    if name == "fp16":
        ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        return ddp
    ddp = DistributedDataParallel(model, bucket_cap_mb=1 << 20)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=_rank(name), start_powerSGD_iter=STARTS)
    hook = powerSGD_hook.powerSGD_hook
    ddp.register_comm_hook(state, default_hooks.fp16_compress_wrapper(hook) if name.startswith("fp16-") else hook)
    return ddp


def rough(name: str) -> bool:
    return name != "fp16"


def bytes_per_step(name: str, ddp: DistributedDataParallel) -> float:
    """Once PowerSGD has begun."""
    values = sum(p.numel() if name == "fp16" else _factors(p.shape, _rank(name)) for p in ddp.parameters())
    return ring((2 if name.startswith("fp16") else 4) * values)


def _rank(name: str) -> int:
    return int(name.removeprefix("fp16-").removeprefix("powersgd"))


def _factors(shape, rank: int) -> int:
    """What PowerSGD reduces of a parameter: two factors, or all of it where they would not halve it."""
    total = shape.numel()
    if len(shape) < 2:
        return total
    factors = rank * (shape[0] + total // shape[0])
    return factors if 2 * factors < total else total
