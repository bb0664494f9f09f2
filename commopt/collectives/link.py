"""What carries rows of bytes between ranks, on a process group of its own. One class per kind of network.

Each call begins at once and returns a Pending; `wait` returns when the rows have arrived. `fill(r)` is called to write
the row for rank r, as late as the network allows, so that one row travels while the next is encoded. When it raises, or an
earlier phase failed, the row is sent all the same, as 0xff bytes: the others wait for it. Whoever gets such a row asks what
has happened; where none is looked at, on a device and in sums, they learn of the failure when backward ends. A peer that
is gone is a ConnectionError.
"""

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .phases import SPOILT, Pending

Fill = Callable[[int], None]
_HANG_UP = 2**31 - 1  # a tag that no exchange uses


def hang_up(group: dist.ProcessGroup) -> None:
    """Closes this rank's connections in a gloo group: whatever is under way with it, or begins later, fails on both sides
    at once instead of at the timeout. gloo closes a connection when a receive times out."""
    for r in range(group.size()):
        try:
            if r != group.rank():
                group.recv([torch.empty(1, dtype=torch.uint8, device="cpu")], r, _HANG_UP).wait(timedelta(milliseconds=1))
        except RuntimeError:
            pass


class Link:
    """Rows by point-to-point messages, for gloo. Receives are posted before sends: gloo's own all-to-all posts sends
    first and is half duplex about half of the time, and its reduce-scatter moves the bytes of a whole all-reduce.

    It calls the group itself: torch.distributed knows none any more after destroy_process_group, when an exchange may still
    be under way that other ranks wait for.

    on_failure(error): told of a failure before the row that shows it is sent. heard(): what another rank has told so.
    members: the ranks in the group that take part, this one among them; by default all.
    """

    def __init__(
        self, group: dist.ProcessGroup, on_failure: Callable[[Exception], None], heard: Callable[[], Exception | None] = lambda: None,
        members: tuple[int, ...] = (),
    ):
        self.group, self._on_failure, self.heard = group, on_failure, heard
        members = members or tuple(range(dist.get_world_size(group)))
        self.rank, self.world = members.index(dist.get_rank(group)), len(members)
        self._members, self._peers = members, [dist.get_global_rank(group, r) for r in members]  # by rank in the group, in the job
        self._parts: dict[tuple[int, ...], Link] = {}
        self._late: dist.ProcessGroup | None = None

    def among(self, members: tuple[int, ...]) -> "Link":
        """The link of some of its ranks, in ascending order, whose numbers there are their places in `members`. All of these
        call it."""
        if members == tuple(range(self.world)):
            return self
        if members not in self._parts:
            self._parts[members] = self._part(members)
        return self._parts[members]

    def _part(self, members: tuple[int, ...]) -> "Link":
        return type(self)(self.group, self._on_failure, self.heard, members)

    def open_late(self) -> None:
        """Makes ready for all_reduce(late=True), the first time by all ranks together."""
        if self._late is None:
            self._late = dist.new_group(self._peers, timeout=timeout_of(self.group), backend="gloo", use_local_synchronization=True)

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, late: bool = False) -> Pending:
        """late: not in an exchange's first phase. gloo tells all-reduces apart by their order only, which is the same on all
        ranks within first phases, and within second ones, but not among both: these have a group of their own."""
        return Pending([(self._late if late else self.group).allreduce([x], op)])

    def others(self) -> list[int]:
        """The other ranks, each beginning with its neighbour so that not all send to the same one first."""
        return [(self.rank + i) % self.world for i in range(1, self.world)]

    def written(self, fill: Fill, r: int, row: Tensor, failed: Exception | None) -> Exception | None:
        """Has the row written, or filled with 0xff after a failure, which is returned."""
        try:
            if failed is None:
                fill(r)
                return None
        except Exception as error:  # post why the row is not what the others expect before it is sent
            self._on_failure(error)
            failed = error
        row.fill_(SPOILT)
        return failed

    def _send(self, row: Tensor, r: int, tag: int, works: list) -> None:
        if row.numel():
            works.append(self.group.send([row], self._members[r], tag))

    def _receive(self, rows: Tensor, sizes: list[int], tag: int, works: list) -> None:
        works += [self.group.recv([rows[r, : sizes[r]]], self._members[r], tag) for r in self.others() if sizes[r]]

    def _pending(self, works: list, failed: Exception | None, rows: Tensor, sizes: list[int]) -> Pending:
        return Pending(works, failed, [rows[r, : sizes[r]] for r in self.others()], self.heard)

    def scatter(
        self, departing: Tensor, arriving: Tensor, sizes: list[int], fill: Fill, number: int,
        failed: Exception | None = None, coming: list[int] | None = None,
    ) -> Pending:
        """Row r of `departing` goes to rank r and arrives in row `self.rank` there. sizes[r] bytes are meant for rank r, by
        every rank unless `coming` says how many come from each. This rank's own row is written into `arriving` by fill.
        A phase of exchange `number`."""
        works, coming = [], coming or [sizes[self.rank]] * self.world
        try:
            self._receive(arriving, coming, 2 * number, works)
            for r in self.others():
                row = departing[r, : sizes[r]]
                failed = self.written(fill, r, row, failed)
                self._send(row, r, 2 * number, works)
            failed = self.written(fill, self.rank, arriving[self.rank], failed)
        except RuntimeError as error:  # a peer is gone
            failed = failed or ConnectionError(str(error))
        return self._pending(works, failed, arriving, coming)

    def gather(self, rows: Tensor, sizes: list[int], fill: Fill, number: int, failed: Exception | None = None) -> Pending:
        """Row r of every rank becomes what rank r writes there, sizes[r] bytes. A phase of exchange `number`."""
        works = []
        try:
            self._receive(rows, sizes, 2 * number + 1, works)
            own = rows[self.rank, : sizes[self.rank]]
            failed = self.written(fill, self.rank, own, failed)
            for r in self.others():
                self._send(own, r, 2 * number + 1, works)
        except RuntimeError as error:
            failed = failed or ConnectionError(str(error))
        return self._pending(works, failed, rows, sizes)


class DeviceLink(Link):
    """Rows by collectives behind the current stream, for NCCL: whoever waits for one has the stream wait that is then the current
    one, and nothing waits on the host. Rows go whole: all ranks give them the same length."""

    def _part(self, members):
        ranks, backend = [self._peers[r] for r in members], dist.get_backend(self.group)
        group = dist.new_group(ranks, timeout=timeout_of(self.group), backend=backend, use_local_synchronization=True)
        return type(self)(group, self._on_failure, self.heard)

    def open_late(self) -> None:
        """The stream orders all of them."""

    def all_reduce(self, x, op=dist.ReduceOp.SUM, late=False):
        return Pending([dist.all_reduce(x, op, self.group, async_op=True)])

    def scatter(self, departing, arriving, sizes, fill, number, failed=None, coming=None):
        for r in self.others():
            failed = self.written(fill, r, departing[r], failed)
        failed = self.written(fill, self.rank, arriving[self.rank], failed)
        departing[self.rank].copy_(arriving[self.rank])
        return Pending([dist.all_to_all_single(arriving, departing, group=self.group, async_op=True)], failed)

    def gather(self, rows, sizes, fill, number, failed=None):
        failed = self.written(fill, self.rank, rows[self.rank], failed)
        return Pending([dist.all_gather_into_tensor(rows.view(-1), rows[self.rank], group=self.group, async_op=True)], failed)


class StagedLink(Link):
    """Rows of a device over a network that reads only host memory: CUDA tensors on gloo. Each row is copied, and waited for."""

    def open_late(self) -> None:
        """Each waits for the one before it."""

    def all_reduce(self, x, op=dist.ReduceOp.SUM, late=False):
        host = x.cpu()
        failed = super().all_reduce(host, op).wait()
        x.copy_(host)
        return Pending(failed=failed)

    def scatter(self, departing, arriving, sizes, fill, number, failed=None, coming=None):
        out, into = departing.cpu(), arriving.cpu()

        def fill_and_copy(r: int) -> None:
            fill(r)
            (into if r == self.rank else out)[r].copy_((arriving if r == self.rank else departing)[r])

        failed = super().scatter(out, into, sizes, fill_and_copy, number, failed, coming).wait()
        arriving.copy_(into)
        return Pending(failed=failed)

    def gather(self, rows, sizes, fill, number, failed=None):
        host = rows.cpu()

        def fill_and_copy(r: int) -> None:
            fill(r)
            host[r].copy_(rows[r])

        failed = super().gather(host, sizes, fill_and_copy, number, failed).wait()
        rows.copy_(host)
        return Pending(failed=failed)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    device = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    return group._get_backend(torch.device(device)).options._timeout


def link_for(device: torch.device, group: dist.ProcessGroup, on_failure: Callable[[Exception], None], heard: Callable[[], Exception | None]) -> Link:
    if device.type == "cpu":
        kind = Link
    else:
        kind = StagedLink if dist.get_backend(group) == "gloo" else DeviceLink
    return kind(group, on_failure, heard)
