"""What a bench compares: ours by their specs, plain DDP, and the peers in rivals/, each as its documentation says to use it.

A peer is a file in rivals/ and a line in PEERS. The file has four functions, of which the last three take one of its names:

    missing() -> str | None                how to get it, where it is not installed
    wrap(name, model, bucket_mb) -> DDP    the model in DDP, with the peer's hook
    rough(name) -> bool                    whether a step's mean is further from the exact one than 2 % of its norm
    bytes_per_step(name, ddp) -> float     what a rank hands to the network in a step; of an all-reduce, `ring` of what it is given
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commopt
from commopt.compressors import STEADY

PEERS = {  # what is before the colon -> its file, and what is compared of it
    "torch": ("pytorch", ("fp16", "powersgd1", "powersgd2", "powersgd4", "powersgd8", "powersgd16", "fp16-powersgd4", "fp16-powersgd16")),
    "epfml": ("epfml_powersgd", ("powersgd4", "powersgd16")),
    "grace": ("grace", ("topk0.01", "qsgd")),
}
EXTERNAL = ("plain", *(f"{peer}:{name}" for peer, (_, names) in PEERS.items() for name in names))


def check(specs: list[str]) -> None:
    """ValueError for a spec that is neither ours nor one of EXTERNAL, and for a peer that is not installed."""
    for spec in specs:
        if spec not in EXTERNAL:
            commopt.parse(spec)
        if how := missing(spec):
            raise ValueError(f"{spec}: {how}")


def missing(spec: str) -> str | None:
    """How to get the peer, where it is not installed."""
    return _peer(spec).missing() if _peers(spec) else None


def rough(spec: str) -> bool:
    """Whether a peer's mean is far from the exact one in a single step, where the rest comes later or is noise."""
    return _peers(spec) and _peer(spec).rough(_name(spec))


def wrap(
    spec: str, model: nn.Module, *, steady: bool = False, seed: int = 0, bucket_mb: float = 25.0, schedule: str = "pipelined"
) -> tuple[DistributedDataParallel, commopt.State | None]:
    """The model in DDP with the hook that spec names, and the handle where it is ours. steady: without its warm-up.
    schedule: of ours. bucket_mb: MiB of a bucket; some peers need a single one in any case."""
    if _peers(spec):
        return _peer(spec).wrap(_name(spec), model, bucket_mb), None
    ddp, handle = DistributedDataParallel(model, bucket_cap_mb=bucket_mb), None
    if spec != "plain":
        compressor = commopt.parse(spec)
        handle = commopt.attach(ddp, compressor.at(STEADY) if steady else compressor, seed=seed, schedule=schedule)
    return ddp, handle


def bytes_per_step(spec: str, ddp: DistributedDataParallel, handle: commopt.State | None) -> float:
    """What a rank hands to the network in a step: ours by the handle's account since its last reset_stats, of others what
    their hook sends, and of plain DDP what a ring all-reduce does."""
    if handle:
        stats = handle.stats()
        return stats["bytes_wire"] / stats["steps"]
    return _peer(spec).bytes_per_step(_name(spec), ddp) if _peers(spec) else ring(4 * sum(p.numel() for p in ddp.parameters()))


def averaged_by(average: Callable[[list[Tensor], list[Tensor]], None], ddp: DistributedDataParallel) -> DistributedDataParallel:
    """The module with a hook that blocks: average(parameters, gradients) replaces the gradients of a bucket by their mean."""

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        average(bucket.parameters(), bucket.gradients())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    ddp.register_comm_hook(None, hook)
    return ddp


def ring(nbytes: float) -> float:
    """What a rank sends in a ring all-reduce of so many bytes."""
    return 2 * (dist.get_world_size() - 1) / dist.get_world_size() * nbytes


def _peers(spec: str) -> bool:
    return spec != "plain" and spec in EXTERNAL


def _name(spec: str) -> str:
    return spec.partition(":")[2]


def _peer(spec: str) -> ModuleType:
    """Its file, which is imported where it is used: it may need what the others do not."""
    return importlib.import_module(f".rivals.{PEERS[spec.partition(':')[0]][0]}", __package__)
