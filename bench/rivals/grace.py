"""GRACE, https://github.com/sands-lab/grace: compressor, memory and communicator from its `grace_from_params`, as its TRAINING.md names them.

    topkR  topk, residual and allgather: of each parameter the share R, values of 32 bits and indices of 32
    qsgd   qsgd, none and allgather: 127 levels, 8 bits a value and a norm for every 128, rounded at random, Alistarh et al. 2017

Its example has one blocking exchange for each parameter and field after backward, `grad.copy_(grc.step(grad, name))`. Here that is
done in a hook, when DDP has a bucket full. All-gathers grow with the ranks: each sends its message to all others.
"""

import importlib.util
import math

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..candidates import averaged_by

BUCKET = 128  # values that have a norm of their own: the helper's bucket_size


def missing() -> str | None:
    there = importlib.util.find_spec("grace_dl") and importlib.util.find_spec("grace_dl.dist")
    return None if there else "not installed (git clone https://github.com/sands-lab/grace.git && pip install -e grace)"


def wrap(name: str, model: nn.Module, bucket_mb: float) -> DistributedDataParallel:
    from grace_dl.dist.helper import grace_from_params

    method = {"compressor": "qsgd", "memory": "none"} if name == "qsgd" else {"compressor": "topk", "memory": "residual", "compress_ratio": _ratio(name)}
    grc = grace_from_params(method | {"communicator": "allgather", "world_size": dist.get_world_size()})
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)
    names = {id(p): name for name, p in ddp.named_parameters()}

    def average(parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for p, gradient in zip(parameters, gradients):
            gradient.copy_(grc.step(gradient, names[id(p)]))

    return averaged_by(average, ddp)


def rough(name: str) -> bool:
    return True


def bytes_per_step(name: str, ddp: DistributedDataParallel) -> float:
    return (dist.get_world_size() - 1) * sum(_message(name, p.numel()) for p in ddp.parameters())


def _ratio(name: str) -> float:
    return float(name.removeprefix("topk"))


def _message(name: str, n: int) -> int:
    """Bytes of one parameter of n values."""
    return n + 4 * math.ceil(n / BUCKET) if name == "qsgd" else 8 * max(1, int(n * _ratio(name)))
