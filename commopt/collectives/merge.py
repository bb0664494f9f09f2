"""Small exchanges travel together: what is due to a rank in one phase of all of them is one message."""

from collections.abc import Callable

import torch
from torch import Tensor

from .link import Fill, Link
from .phases import All, Pending, Phases, Prepared, advance, may_be_spoilt

WORTH = 1 << 16  # bytes to each peer that are worth a message of their own: what a link of 1 Gbit/s carries in 0.5 ms


class _Notes:
    """Stands for the link: has rows written and notes where they go and where others arrive. Nothing travels."""

    def __init__(self, link: Link):
        self.rank, self.world, self.others, self.written = link.rank, link.world, link.others, link.written
        self.out: list[Tensor] = []
        self.into: list[Tensor] = []

    def scatter(self, departing: Tensor, arriving: Tensor, sizes: list[int], fill: Fill, number: int, failed: Exception | None = None) -> Pending:
        self.out = [departing[r, :size] for r, size in enumerate(sizes)]
        self.into = [row[: sizes[self.rank]] for row in arriving]
        for r in self.others():
            failed = self.written(fill, r, departing[r], failed)
        return Pending(failed=self.written(fill, self.rank, arriving[self.rank], failed))

    def gather(self, rows: Tensor, sizes: list[int], fill: Fill, number: int, failed: Exception | None = None) -> Pending:
        own = rows[self.rank, : sizes[self.rank]]
        self.out = [own] * self.world
        self.into = [rows[r, :size] for r, size in enumerate(sizes)]
        return Pending(failed=self.written(fill, self.rank, own, failed))


class Batch:
    """Exchanges in the order in which all ranks add them. Each encodes its first message when it is added."""

    def __init__(self, link: Link, device: torch.device, number: int, buffers: dict[tuple[int, int], tuple[Tensor, Tensor]],
                 tell: Callable[[Exception], None]):
        """number: of the first one, whose tags serve all, and which tells what they have failed with. buffers: kept from step to step for
        batches that begin with it."""
        self._link, self.device, self._buffers = link, device, buffers
        self._running: list[tuple[Phases, _Notes]] = []
        self._dones: list[Callable[[Exception | None], None]] = []
        self._failed: Exception | None = None
        self.number, self.size, self.count, self.tell = number, 0, 0, tell  # count: of phases

    def add(self, prepared: Prepared, x: Tensor, residual: Tensor | None, done: Callable[[Exception | None], None]) -> None:
        """done: called when the batch has ended."""
        notes = _Notes(self._link)
        phases = prepared.begin(notes, x, residual)
        failed = phases.send(None).wait()
        self._failed = self._failed or failed
        self._running.append((phases, notes))
        self._dones.append(done)
        self.size += prepared.plan.size
        self.count = max(self.count, prepared.phases)

    def done(self, failure: Exception | None) -> None:
        for done in self._dones:
            done(failure)

    def phases(self) -> Phases:
        """The exchange of all that was added."""
        running, failed, failure, phase = self._running, self._failed, None, 0
        others = self._link.others()
        while running:
            leaving, coming = ([sum(rows[r].numel() for rows in way) if r in others else 0 for r in range(self._link.world)]
                               for way in ([notes.out for _, notes in running], [notes.into for _, notes in running]))
            width = sum(max(row.numel() for row in (*notes.out, *notes.into)) for _, notes in running)  # the same on all ranks
            departing, arriving = self._rows(phase, width)

            def fill(r: int) -> None:
                if r in others:
                    torch.cat([notes.out[r] for _, notes in running], out=departing[r, : leaving[r]])

            failed = yield self._link.scatter(departing, arriving, leaving, fill, self.number, failed, coming)
            for r in others:
                for (_, notes), some in zip(running, arriving[r, : coming[r]].split([notes.into[r].numel() for _, notes in running])):
                    notes.into[r].copy_(some)
                    if failed is None and some.device.type == "cpu" and may_be_spoilt(some):
                        failed = self._link.heard()
            begun, wrong = advance([phases for phases, _ in running], failed)
            failure, phase = failure or wrong, phase + 1
            running = [one for one, pending in zip(running, begun) if pending]
            failed = failed or All([pending for pending in begun if pending]).wait()
        if failure:
            raise failure

    def _rows(self, phase: int, nbytes: int) -> tuple[Tensor, Tensor]:
        held = self._buffers.get((self.number, phase))
        if held is None or held[0].shape[1] < nbytes:
            shape = (self._link.world, nbytes)
            held = self._buffers[self.number, phase] = tuple(torch.zeros(shape, dtype=torch.uint8, device=self.device) for _ in range(2))
        return held
