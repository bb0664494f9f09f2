"""What a bench compares: ours by their specs, plain DDP, and PyTorch's own hooks as its documentation says to use them."""

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import commopt
from commopt.compressors import STEADY

POWERSGD = {f"torch:powersgd{rank}": rank for rank in (1, 2, 4, 8, 16)}
CASTS = {"torch:fp16": default_hooks.fp16_compress_hook, "torch:bf16": default_hooks.bf16_compress_hook}
EXTERNAL = ("plain", *CASTS, *POWERSGD)
POWERSGD_STARTS = 2  # the first step that it compresses; the least it accepts


def check(specs: list[str]) -> None:
    """ValueError for a spec that is neither ours nor one of EXTERNAL."""
    for spec in specs:
        if spec not in EXTERNAL:
            commopt.parse(spec)


def wrap(
    spec: str, model: nn.Module, *, steady: bool = False, seed: int = 0, bucket_mb: float = 25.0, schedule: str = "pipelined"
) -> tuple[DistributedDataParallel, commopt.State | None]:
    """The model in DDP with the hook that spec names, and the handle where it is ours. steady: without its warm-up.
    schedule: of ours. bucket_mb: MiB of a bucket; PyTorch's PowerSGD has one in any case, since with two it deadlocks on gloo."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=1 << 20 if spec in POWERSGD else bucket_mb)
    handle = None
    if spec in POWERSGD:
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=POWERSGD[spec], start_powerSGD_iter=POWERSGD_STARTS)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif spec in CASTS:
        ddp.register_comm_hook(None, CASTS[spec])
    elif spec != "plain":
        compressor = commopt.parse(spec)
        handle = commopt.attach(ddp, compressor.at(STEADY) if steady else compressor, seed=seed, schedule=schedule)
    return ddp, handle


def bytes_per_step(spec: str, ddp: DistributedDataParallel, handle: commopt.State | None) -> float:
    """What a rank hands to the network in a step: ours by the handle's account since its last reset_stats, else what a
    ring all-reduce sends of that which the hook gives it."""
    if handle:
        stats = handle.stats()
        return stats["bytes_wire"] / stats["steps"]
    ring = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
    if spec not in POWERSGD:
        return ring * (2 if spec in CASTS else 4) * sum(p.numel() for p in ddp.parameters())
    return ring * 4 * sum(_powersgd_values(p.shape, POWERSGD[spec]) for p in ddp.parameters())


def _powersgd_values(shape, rank: int) -> int:
    """What PyTorch's PowerSGD reduces of a parameter: two factors, or all of it where they would not halve it."""
    total = shape.numel()
    if len(shape) < 2:
        return total
    factors = rank * (shape[0] + total // shape[0])
    return factors if 2 * factors < total else total
