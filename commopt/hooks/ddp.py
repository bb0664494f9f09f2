"""The DDP communication hook, and how it gets there."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..compressors import Compressor
from ..schedulers import Schedule
from .state import State


# DDP compares the annotations with the classes themselves, so this module must not postpone their evaluation.
def hook(state: State, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """`ddp.register_comm_hook(commopt.State(ddp, "int8"), commopt.hook)`. Averages the bucket in place."""
    if isinstance(bucket, tuple):  # torch.compile with optimize_ddp="python_reducer" calls once per parameter
        return _hook_of_parameter(state, *bucket)
    return state.exchange(bucket.buffer(), bucket.parameters(), bucket.is_last())


def _hook_of_parameter(state: State, grad: torch.Tensor, parameter: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    flat = grad.contiguous().view(-1)
    future = state.exchange(flat, [parameter], last=True)
    state.land(future)  # here the result is expected in grad, and what is returned is ignored
    if flat.data_ptr() != grad.data_ptr():
        grad.copy_(flat.view(grad.shape))
    return future


def attach(
    obj: torch.nn.Module, spec: str | Compressor, *, schedule: str | Schedule = "pipelined", rules: dict[str, str | Compressor] | None = None,
    group: dist.ProcessGroup | None = None, start_step: int = 1, seed: int = 0,
) -> State:
    """Compresses the gradient exchange of `obj`, a DistributedDataParallel module, compiled or not. One line, after DDP has
    wrapped the model; the training loop stays as it is. All ranks call it with the same arguments (see `State`).

        model = DistributedDataParallel(model)
        handle = commopt.attach(model, "int8")
    """
    ddp = getattr(obj, "_orig_mod", obj)
    if not isinstance(ddp, DistributedDataParallel):
        raise ValueError(f"attach needs a DistributedDataParallel module, got {type(obj).__name__}: "
                         "wrap the model first, `model = DistributedDataParallel(model)`, then attach")
    if ddp.mixed_precision is not None:
        raise ValueError("DistributedDataParallel(mixed_precision=...) takes the place of the communication hook: use torch.autocast instead")
    if ddp._comm_hooks:
        raise ValueError(f"this model already has the communication hook {ddp._comm_hooks[0][0].__qualname__}, and DDP takes one: "
                         "call handle.set(spec) on the handle of the first attach, or wrap the model anew")
    state = State(ddp, spec, schedule=schedule, rules=rules, group=group, start_step=start_step, seed=seed)
    ddp.register_comm_hook(state, hook)
    return state
