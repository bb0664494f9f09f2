"""Where each rank is, so that ranks that go different ways find out instead of waiting for each other.

A rank that calls what all should call, handle.set("int4") in an `if rank == 0:` say, waits for the others there, and they wait
for its messages in the next step. Nobody has failed, and all would hear of it when the group's timeout is over.
"""

import contextlib
import logging
import threading
import time
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..collectives.link import hang_up

log = logging.getLogger("commopt")
_TAG = 2**31 - 2  # of messages between ranks that meet; exchanges and `hang_up` have others
_SOON, _LATE = 1e-3, 0.1  # seconds before a rank that waits looks for the others, at first and at most
_LONG = 30.0  # seconds after which it says that it waits


class Whereabouts:
    """store: shared by the ranks of one handle, and only by them. group: theirs, gloo.

    All ranks come by the same places, in the same order. They tell so in the store, which costs no round trip (and a FileStore
    some 40 bytes of its file).
    """

    def __init__(self, store: dist.Store, group: dist.ProcessGroup):
        self._store, self._group = store, group
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)
        self._places = 0  # come by
        self._met = 0  # the last of them at which this rank has waited for all others

    def pass_by(self, place: str) -> None:
        """This rank is there and goes on, as all ranks do."""
        self._places += 1
        self._tell(place)

    def meet(self, place: str) -> None:
        """Returns when all ranks are there. RuntimeError: some have gone elsewhere. ConnectionError: one is gone, or has hung up.
        Whoever gets one of them posts it and hangs up, for the others' sake."""
        self._places += 1
        self._met = self._places
        self._tell(place)
        meeting = _Meeting(self._group, torch.tensor([self._places, zlib.crc32(place.encode())], device="cpu"))
        try:
            self._wait_for(meeting, place)
        except (KeyboardInterrupt, SystemExit):
            hang_up(self._group)
            meeting.over(1.0)
            raise
        if meeting.failed is not None:
            raise ConnectionError(f"{meeting.failed}, where all ranks were to come to: {place}")
        if not meeting.same:
            raise self._parted()

    def of_all(self) -> str:
        """The last place by which each rank came, a line for each place."""
        ranks: dict[str, list[str]] = {}
        for rank, (_, _, place) in self._told_by(range(self._world)).items():
            ranks.setdefault(place, []).append(str(rank))
        return "\n".join(f"  rank {','.join(some)}: {place}" for place, some in ranks.items())

    def _wait_for(self, meeting: "_Meeting", place: str) -> None:
        """Returns when the meeting is over. RuntimeError: somebody does not come."""
        began, pause, said = time.monotonic(), _SOON, False
        while not meeting.over(pause):
            if any(places >= self._places > met for places, met, _ in self._told_by(meeting.missing).values()):  # has been here, and not waited
                raise self._parted()
            pause = min(2 * pause, _LATE)
            if not said and time.monotonic() - began > _LONG:
                said = True
                log.warning("commopt: rank %d has waited for %d s at: %s. All ranks have to come there. They came by last:\n%s",
                            self._rank, _LONG, place, self.of_all())

    def _parted(self) -> RuntimeError:
        return RuntimeError(
            f"the ranks have gone different ways, and would wait for each other. They came by last:\n{self.of_all()}\nAll of them call set, pause, "
            "resume, exact, detach, state_dict, load_state_dict, and flush with schedule=delayed, between the same two steps, with the same arguments")

    def _tell(self, place: str) -> None:
        with contextlib.suppress(Exception):  # the next exchange with the store's host tells
            self._store.set(_key(self._rank), f"{self._places} {self._met} {place}")

    def _told_by(self, ranks: Sequence[int]) -> dict[int, tuple[int, int, str]]:
        """Of those that have told: how many places they have come by, at which of them they last waited for all, and the last one."""
        with contextlib.suppress(Exception):  # the store died with its host
            if not self._store.check(list(map(_key, ranks))):
                ranks = [rank for rank in ranks if self._store.check([_key(rank)])]
            told = (value.decode().split(" ", 2) for value in self._store.multi_get(list(map(_key, ranks))))
            return {rank: (int(places), int(met), place) for rank, (places, met, place) in zip(ranks, told)}
        return {}


def _key(rank: int) -> str:
    return f"at/{rank}"


class _Meeting:
    """Every rank sends what it has to rank 0, and goes on when that has all of them, and they are the same. Messages have a tag: a
    collective would be taken for one that others have begun in the same group. A thread waits, since gloo's messages cannot be
    looked at, and a wait that ends too soon costs the connection.

    mine: int64 [2], the same on all ranks that should meet here. missing: for whom it waits. failed: what went wrong.
    same: whether all came with the same.
    """

    def __init__(self, group: dist.ProcessGroup, mine: torch.Tensor):
        self._group, self._mine = group, mine
        self._others = list(range(1, group.size()))
        self.missing = self._others if group.rank() == 0 else [0]
        self.failed: Exception | None = None
        self.same = True
        self._thread = threading.Thread(target=self._wait, name="commopt-meeting", daemon=True)
        self._thread.start()

    def over(self, seconds: float) -> bool:
        """Waits so long. Whether the meeting is over."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _wait(self) -> None:
        try:
            self._receive() if self._group.rank() == 0 else self._report()
        except Exception as error:
            self.failed = error

    def _receive(self) -> None:
        """Rank 0's part."""
        came = torch.empty(len(self._others), 2, dtype=torch.int64, device="cpu")
        coming = [self._group.recv([row], r, _TAG) for row, r in zip(came, self._others)]
        for work in coming:
            work.wait()
            self.missing = self.missing[1:]
        self.same = bool(came.eq(self._mine).all())
        if self.same:
            for work in [self._group.send([self._mine], r, _TAG) for r in self._others]:
                work.wait()

    def _report(self) -> None:
        going = self._group.send([self._mine], 0, _TAG)
        self._group.recv([torch.empty_like(self._mine)], 0, _TAG).wait()
        going.wait()
