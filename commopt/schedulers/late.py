"""Exchanges that go on while the model computes on, of buckets with buffers of their own."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.futures import Future
from torch.optim import Optimizer


@dataclass
class Handle:
    """What late gradients need of the handle. begin(x, parameters, last): begins to average x in place; never raises. waiting():
    entered for as long as computation waits. ended(): raises what an exchange has failed with. agree(facts): raises
    the same on all ranks where they differ. scaled(optimizer): whether a GradScaler steps it. average(tensors): by their exact mean."""

    begin: Callable[[Tensor, list[Tensor], bool], Future]
    waiting: Callable[[], contextlib.AbstractContextManager]
    ended: Callable[[], None]
    agree: Callable[[dict], None]
    scaled: Callable[[Optimizer], bool]
    average: Callable[[list[Tensor]], None]


def laid_out(x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The parameters' gradients in the flat bucket x, laid out as DDP does it."""
    flats = x.split([p.numel() for p in parameters])
    dense = [torch.empty_like(p, device="meta").stride() == p.stride() for p in parameters]  # else DDP packs it
    return [f.as_strided(p.shape, p.stride()) if d else f.view(p.shape) for f, p, d in zip(flats, parameters, dense)]


class Bucket:
    """Two flat gradients of its parameters, with views: zeros, or what earlier buckets had of them."""

    def __init__(self, x: Tensor, parameters: list[Tensor]):
        self.parameters = parameters
        self.flats = torch.zeros_like(x), torch.zeros_like(x)
        self.views = tuple(dict(zip(parameters, laid_out(flat, parameters))) for flat in self.flats)


class Buckets:
    """The buckets of one model as DDP last had them, and the exchanges of them that are under way: one each."""

    def __init__(self, handle: Handle):
        self._handle = handle
        self._buckets: dict[tuple[int, ...], Bucket] = {}  # by the ids of their parameters, in DDP's order
        self._futures: dict[Tensor, Future] = {}

    def __iter__(self):
        return iter(list(self._buckets.values()))

    def of(self, x: Tensor, parameters: list[Tensor]) -> Bucket:
        key = tuple(map(id, parameters))
        if key not in self._buckets:
            self.land(parameters)
            bucket = Bucket(x, list(parameters))
            for other in self:
                for new, old in zip(bucket.views, other.views):
                    for p in new.keys() & old.keys():
                        new[p].copy_(old[p])
            self._buckets = {k: b for k, b in self._buckets.items() if set(k).isdisjoint(key)} | {key: bucket}
        return self._buckets[key]

    def begin(self, bucket: Bucket, which: int, last: bool) -> None:
        """Begins to average one of its gradients in place. Nothing else of the bucket may be under way."""
        future = self._handle.begin(bucket.flats[which], bucket.parameters, last)
        self._futures.update(dict.fromkeys(bucket.parameters, future))

    def land(self, parameters: list[Tensor] | None = None) -> None:
        """Returns when nothing of the parameters, or of any, is under way."""
        parameters = list(self._futures) if parameters is None else parameters
        futures = dict.fromkeys(self._futures.pop(p) for p in parameters if p in self._futures)
        if futures:
            with self._handle.waiting():
                for future in futures:
                    future.wait()

    def views(self, which: int) -> dict[Tensor, Tensor]:
        """Parameter -> its part of that gradient."""
        return {p: view for bucket in self for p, view in bucket.views[which].items()}


def refuse(x: Tensor, joined: bool) -> None:
    """RuntimeError for what delayed gradients cannot be made of."""
    if x.is_sparse:
        raise RuntimeError('schedule="delayed" takes no sparse gradients: use sparse=False, or schedule="decoupled"')
    if joined:
        raise RuntimeError('schedule="delayed" does not go with join(), where a rank that has no more data leaves others alone: use schedule="decoupled"')
