"""A spec with its tensors on one backend, as the bench of kernels runs it, and whether its bits are those of the reference."""

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..compressors import STEADY, Compressor, parse
from ..wire import Layout
from .gradients import layered


class What(NamedTuple):
    """What is done with a spec: encode, rising (the same from the first step on), decode or resum, of so many rows."""

    action: str
    rows: int = 1

    def __str__(self) -> str:
        return f"{self.action} {self.rows}" if self.action in ("decode", "resum") else self.action


class Tensors:
    """What a spec works on, the same for all that are compared: gradients, a residual, messages and their sum."""

    def __init__(self, spec: str, grads: list[Tensor], rows: int):
        self.compressor: Compressor = parse(spec).at(STEADY)
        self.grads, self.n, device = grads, grads[0].numel(), grads[0].device
        self.layout = Layout(self.compressor.fields(self.n))
        slots = self.compressor.slots
        self.residual = torch.zeros((slots, self.n) if slots > 1 else self.n, device=device)
        self.rows = torch.zeros(rows, self.layout.nbytes, dtype=torch.uint8, device=device)
        self.resent = torch.zeros(self.layout.nbytes, dtype=torch.uint8, device=device)
        self.out = torch.zeros(self.n, dtype=grads[0].dtype, device=device)
        self.total = torch.zeros(self.n, device=device)

    @property
    def kept(self) -> Tensor | None:
        return self.residual if self.compressor.ef else None

    def moved(self, what: What) -> int:
        """The bytes that must be read or written: see the docstring of bench/kernels.py."""
        gradient, message = self.out.nbytes, self.layout.nbytes
        if what.action == "resum":
            return (what.rows + 1) * message
        if what.action == "decode":
            return what.rows * message + gradient
        return gradient + message + (2 * self.residual.nbytes if self.compressor.ef else 0)


class Run:
    """A spec's encode, decode and resum over its tensors, with the ops of one backend wherever it has them."""

    def __init__(self, backend: str, tensors: Tensors):
        self.backend, self.tensors, self.grads = backend, tensors, tensors.grads
        before = os.environ.get("COMMOPT_BACKEND")
        os.environ["COMMOPT_BACKEND"] = backend
        try:
            self.owners = backends.owners(tensors.out.device.type)
            self.kernels = backends.select(tensors.out.device)
        finally:
            del os.environ["COMMOPT_BACKEND"]
            if before is not None:
                os.environ["COMMOPT_BACKEND"] = before
        self.used: set[str] = set()
        for op in backends.OPS:
            setattr(self.kernels, op, self._noted(op, getattr(self.kernels, op)))

    def _noted(self, op, function):
        def noting(*args):
            self.used.add(op)
            return function(*args)

        return noting

    def restart(self) -> None:
        """Forgets all earlier steps."""
        self.tensors.residual.zero_()
        for held in self.kernels._scratch.values():  # in place: a new tensor would cost its first touch
            held.zero_()

    def encode(self, turn: int, row: int = 0) -> None:
        t = self.tensors
        self.kernels.draw, self.kernels.shared_draw = (1, turn, row), (1, turn, 0)
        t.compressor.encode(self.kernels, self.grads[turn % len(self.grads)], t.kept, *t.layout.views(t.rows[row]))

    def decode(self, rows: int) -> None:
        """The mean of the first rows."""
        t = self.tensors
        t.compressor.decode_sum(self.kernels, t.out, 1 / rows, *t.layout.views(t.rows[:rows]))

    def resum(self, rows: int) -> None:
        """What the owner of a shard does in a two_shot: the sum of the rows, as a message."""
        t = self.tensors
        t.compressor.resum(self.kernels, t.total, None, t.layout.views(t.rows[:rows]), t.layout.views(t.resent))

    def __call__(self, what: What, turn: int) -> None:
        if what.action in ("decode", "resum"):
            getattr(self, what.action)(what.rows)
        else:
            self.encode(turn)


def verify(backend: str, spec: str, dtype: torch.dtype, device: str = "cpu", n: int = 200_003) -> dict[str, str]:
    """Op -> owner of the ops that the spec uses. RuntimeError unless three steps, a decode and, in a two_shot, a resum give
    the bits of the reference on the CPU."""
    run, results = _results(backend, spec, dtype, device, n)
    if not run.used:  # torch's own ops, which give other bits on another device
        return {}
    for name, want in _expected(spec, dtype, n).items():
        if said := _difference(want, results[name].cpu()):
            raise RuntimeError(f"{spec} on {backend}, {n} elements of {str(dtype)[6:]}: {name}{said}")
    return {op: run.owners[op] for op in sorted(run.used)}


@functools.lru_cache(maxsize=3)  # dtypes
def _expected(spec: str, dtype: torch.dtype, n: int) -> dict[str, Tensor]:
    """The same for all backends and instruction sets."""
    return _results("reference", spec, dtype, "cpu", n)[1]


def _results(backend: str, spec: str, dtype: torch.dtype, device: str, n: int) -> tuple[Run, dict[str, Tensor]]:
    run = Run(backend, Tensors(spec, [g.to(device) for g in layered(n, dtype, 3)], rows=2))
    t = run.tensors
    for turn in range(3):
        run.encode(turn, row=turn % 2)
    run.decode(2)
    if t.compressor.collective == "two_shot":
        run.resum(2)
    names = [name for name, _, _ in t.layout.fields]
    found = dict(zip(names, t.layout.views(t.rows))) | {"residual": t.residual, "out": t.out, "total": t.total}
    return run, found | {f"{name} of the resum": field for name, field in zip(names, t.layout.views(t.resent))}


def _difference(want: Tensor, got: Tensor) -> str:
    """Where two tensors first differ in their bits, or nothing."""
    a, b = (t.contiguous().view(-1).view(torch.uint8).view(t.numel(), t.element_size()) for t in (want, got))
    differ = (a != b).any(1).nonzero().flatten().tolist()
    if not differ:
        return ""
    bits = [bytes(reversed(t[differ[0]].tolist())).hex() for t in (a, b)]
    values = [t.reshape(-1)[differ[0]].item() for t in (want, got)]
    return (f"[{differ[0]}] should be {values[0]} (0x{bits[0]}) as in the reference, is {values[1]} (0x{bits[1]}); "
            f"{len(differ)} of {want.numel()} differ")
