"""The mean of tensors over all ranks, for training loops without DDP."""

import itertools
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import __version__
from ..collectives import prepare
from ..collectives.phases import Prepared
from ..compressors import STEADY, Compressor, parse
from ..plan import Parameter, Plan
from .agreement import agree, nodes
from .traffic import Traffic

_BUCKET = 25 << 20  # bytes of tensors that are averaged as one: while one bucket travels the next is encoded
_KEPT = 32  # kinds of calls whose plans are kept
_averagers: dict[dist.ProcessGroup, "_Averager"] = {}


@torch.no_grad()
def average(
    tensors: Tensor | list[Tensor], spec: str | Compressor = "int8", group: dist.ProcessGroup | None = None, *,
    residual: Tensor | list[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Replaces tensors by their mean over the ranks of the group, and returns them. A collective call: all ranks make it
    with the same shapes, dtypes and spec, or all get a RuntimeError that says what differs.

        loss.backward()
        commopt.average([p.grad for p in model.parameters()], "int8")

    tensors: one or a list, of any shape and layout in memory, on one device. float32, bfloat16 and float16 are compressed by
        `spec`, but those with fewer than 1024 elements travel exactly; 8-bit floats like float32, complex64 like pairs of
        it. float64, complex128 and sparse tensors are averaged exactly; integers too, and rounded to nearest, ties to even.
        All ranks get the same bits.
    residual: what this rank has not sent so far, float32, one for each of the tensors and shaped like it (a complex
        tensor's like torch.view_as_real of it); updated in place. Error feedback needs it: a loop keeps it from step to
        step. Without it what a message does not hold is lost.

            residual = [torch.zeros_like(p) for p in model.parameters()]
            for batch in batches:
                ...
                commopt.average([p.grad for p in model.parameters()], "topk:ratio=0.01", residual=residual)

    Warm-ups that a spec prescribes are left out. ValueError for what cannot be averaged, RuntimeError when a rank fails.
    """
    if not dist.is_initialized():
        raise RuntimeError("commopt needs a process group: call torch.distributed.init_process_group first")
    group = group or dist.group.WORLD
    if group not in _averagers:
        _forget(lambda held: held not in dist.distributed_c10d._world.pg_map)  # a group that was destroyed
        _averagers[group] = _Averager(group)
    try:
        _averagers[group](tensors, spec, residual)
    finally:
        _forget(lambda held: _averagers[held].traffic.alarm.error is not None)  # it has hung up; the next call dials anew
    return tensors


def _forget(gone) -> None:
    for group in [group for group in _averagers if gone(group)]:
        _averagers.pop(group).traffic.stop()


class _Averager:
    """What the calls with one group share: its traffic, and the plans of calls that were like this one."""

    def __init__(self, group: dist.ProcessGroup):
        self.traffic = Traffic(group, self._fail)
        self._nodes = nodes(self.traffic.control)
        self._step = 0
        self._numbers = itertools.count()
        self._prepared: dict[str, list[tuple[Prepared, list[int]]]] = {}  # with the places of its tensors; the latest call last

    def __call__(self, tensors: Any, spec: str | Compressor, residual: Any) -> None:
        wrong = None
        try:
            compressor = parse(spec).at(STEADY)
            given, kept = _checked(tensors, residual, compressor)
            facts = {"spec": str(compressor), "tensors": [f"{list(t.shape)} {_kind(t)}" for t in given],
                     "residual": "none" if kept is None else "given"}
        except (ValueError, TypeError) as error:  # raised when the others know of it: they would wait
            wrong, facts = error, {"arguments": f"refused: {error}"}
        try:
            self._agree({"commopt": __version__, **facts})
        finally:
            if wrong:
                raise wrong from None
        try:
            self._exchange(given, kept, compressor, str(facts))
        except Exception as error:
            self._fail(error, "in average")
            self.traffic.alarm.leave()
        self.traffic.alarm.raise_if_any(self._step)
        self._step += 1

    def _agree(self, facts: dict[str, Any]) -> None:
        """Eight bytes to each rank, and all of the facts where those differ."""
        mine = torch.tensor([zlib.crc32(str(facts).encode())], device="cpu")
        everyone = [torch.empty_like(mine) for _ in range(self.traffic.world)]
        try:
            dist.all_gather(everyone, mine, group=self.traffic.control)
        except RuntimeError as error:
            self._fail(ConnectionError(str(error)), "in average")
        self.traffic.alarm.raise_if_any(self._step)
        if any(int(other) != int(mine) for other in everyone):
            agree(self.traffic.control, facts)

    def _exchange(self, given: list[Tensor], kept: list[Tensor] | None, compressor: Compressor, like: str) -> None:
        works = [_work(t) for t in given]
        under_way = []
        for prepared, places in self._prepare(works, compressor, like):
            plan = prepared.plan
            plan.step = self._step
            x = works[places[0]] if works[places[0]].is_sparse else _joined([works[i] for i in places])
            held = _joined([kept[i] for i in places]) if kept is not None and plan.wants_residual else None
            under_way.append((self.traffic.exchange(prepared, x, held), x, held, places))
        self.traffic.close()
        for future, x, held, places in under_way:
            future.wait()
            if not x.is_sparse:
                _parted(x, [works[i] for i in places])
            if held is not None:
                _parted(held, [kept[i] for i in places])
        for work in works:
            if work.dtype == torch.int64:
                dist.all_reduce(work, group=self.traffic.group)
                _divide_rounding(work, self.traffic.world)
        for t, work in zip(given, works):
            if t is not work and t.data_ptr() != work.data_ptr():
                t.copy_(torch.view_as_complex(work) if t.is_complex() else work)

    def _prepare(self, works: list[Tensor], compressor: Compressor, like: str) -> list[tuple[Prepared, list[int]]]:
        """The buckets of a call, as they were in the last one like it."""
        made = self._prepared.pop(like, None)
        if made is None:
            while len(self._prepared) >= _KEPT:
                self._prepared.pop(next(iter(self._prepared)))
            self.traffic.free()
            made = [(prepare(self._plan(works, places, compressor)), places) for places in _buckets(works)]
        self._prepared[like] = made
        return made

    def _plan(self, works: list[Tensor], places: list[int], compressor: Compressor) -> Plan:
        first = works[places[0]]
        # Two dimensions, so that a flat vector is compressed: its length decides, not its shape.
        known = [Parameter(str(i), works[i].shape if works[i].dim() > 1 else torch.Size([1, works[i].numel()]), works[i].numel()) for i in places]
        spec = parse("none") if first.is_sparse else compressor
        return Plan(next(self._numbers), known, first.dtype, first.device, spec, {}, self.traffic.rank, self.traffic.world, nodes=self._nodes)

    def _fail(self, error: Exception, where: str) -> None:
        self.traffic.alarm.post(error, where, self._step)


def _checked(tensors: Any, residual: Any, compressor: Compressor) -> tuple[list[Tensor], list[Tensor] | None]:
    """Tensors and residuals as lists. ValueError for what cannot be averaged."""
    given = _listed(tensors)
    for i, t in enumerate(given):
        if not isinstance(t, Tensor):
            raise ValueError(f"tensors[{i}] must be a tensor, got {type(t).__name__}"
                             + (": leave out parameters without a gradient, on all ranks alike" if t is None else ""))
        sums = t.dtype.is_floating_point or t.dtype.is_complex
        if t.dtype == torch.bool or t.is_quantized or t.layout not in (torch.strided, torch.sparse_coo) or (t.is_sparse and not sums):
            raise ValueError(f"tensors[{i}] is {_kind(t)}, which has no mean of its own kind: convert it to floats, and sparse layouts to COO")
        if t.device != given[0].device or t.is_meta:
            raise ValueError(f"tensors[{i}] is on {t.device} and tensors[0] on {given[0].device}: average those of each device in a call of its own")
        if not t.is_sparse and torch._debug_has_internal_overlap(t) == 1:
            raise ValueError(f"tensors[{i}] is expanded: several of its elements are one in memory, and cannot hold means. Clone it")
    if residual is None:
        return given, None
    if compressor.slots > 1 or compressor.within_node.slots > 1 or compressor.between_nodes.slots > 1:
        raise ValueError(f"{compressor} keeps more than a residual: attach it to a DistributedDataParallel module")
    kept = _listed(residual)
    shapes = [t.shape if not t.is_complex() else torch.Size([*t.shape, 2]) for t in given]
    for i, shape in enumerate(shapes):
        fits = i < len(kept) and isinstance(kept[i], Tensor) and (kept[i].dtype, kept[i].shape, kept[i].device) == (torch.float32, shape, given[0].device)
        if not fits or len(kept) != len(shapes):
            have = f"{_kind(kept[i])} {list(kept[i].shape)}" if i < len(kept) and isinstance(kept[i], Tensor) else f"{len(kept)} entries"
            raise ValueError(f"residual must hold a float32 tensor for each of the {len(given)} tensors; that of tensors[{i}] must be {list(shape)} "
                             f"on {given[0].device}, got {have}")
    return given, kept


def _listed(one_or_many: Any) -> list:
    return list(one_or_many) if isinstance(one_or_many, (list, tuple)) else [one_or_many]


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype)[6:]}{'' if t.layout == torch.strided else ' ' + str(t.layout)[6:]} on {t.device.type}"


def _work(t: Tensor) -> Tensor:
    """The tensor as it is averaged: itself where that can be, else a contiguous copy in a dtype that has sums."""
    if t.is_sparse:
        return t
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    elif not t.dtype.is_floating_point:
        t = t.to(torch.int64)
    elif t.element_size() == 1:
        t = t.float()
    return t.resolve_neg().contiguous()


def _buckets(works: list[Tensor]) -> list[list[int]]:
    """The places of what is averaged as one: neighbours of the same dtype. Integers are none of it."""
    dense = [i for i, work in enumerate(works) if not work.is_sparse and work.dtype != torch.int64 and work.numel()]
    buckets = [[i] for i, work in enumerate(works) if work.is_sparse]
    for dtype in dict.fromkeys(works[i].dtype for i in dense):
        room = 0
        for i in (i for i in dense if works[i].dtype == dtype):
            if room < works[i].nbytes:
                buckets.append([])
                room = _BUCKET
            buckets[-1].append(i)
            room -= works[i].nbytes
    return buckets


def _joined(tensors: list[Tensor]) -> Tensor:
    """As one vector, the tensor itself where it is one."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _parted(vector: Tensor, tensors: list[Tensor]) -> None:
    """tensors <- the vector that joins them."""
    for t, part in zip(tensors, vector.split([t.numel() for t in tensors])):
        if t.data_ptr() != part.data_ptr():
            t.copy_(part.view(t.shape))


def _divide_rounding(total: Tensor, by: int) -> None:
    """total <- total / by to nearest, ties to even; int64."""
    quotient = total.div(by, rounding_mode="floor")
    twice = 2 * (total - quotient * by)
    total.copy_(quotient + ((twice > by) | ((twice == by) & (quotient % 2 == 1))))
