"""A failure of one rank becomes the same error on all of them, raised at the end of a backward."""

import torch.distributed as dist

from ..collectives.link import hang_up


class Alarm:
    """store: shared by the ranks of one handle, and only by them. group: the gloo group that this rank leaves after a failure."""

    def __init__(self, store: dist.Store, group: dist.ProcessGroup):
        self.store, self.group, self.rank = store, group, dist.get_rank(group)
        self.error: Exception | None = None
        self.left = False  # whether this rank has hung up

    def raise_if_any(self, step: int) -> None:
        """Raises what this rank or another has failed with up to this step, after hanging up. Asks the store, a round trip on a
        network that may be busy."""
        if self.error is None:
            self._hear(step)
        self.raise_known()

    def raise_known(self) -> None:
        """The same with what is known here."""
        if self.error is not None:
            self.leave()
            raise self.error

    def post(self, error: Exception, where: str, step: int) -> None:
        """Records the first failure and posts it, so that all ranks raise the same."""
        text = f"commopt: rank {self.rank} failed {where}: {type(error).__name__}: {error}"
        try:
            text = self.store.compare_set("abort", "", f"{step} {text}").decode().split(" ", 1)[1]
        except Exception:  # the store died with its host; every rank then tells what it saw itself
            pass
        if self.error is None:
            self.error = RuntimeError(text)
            self.error.__cause__ = error
        if isinstance(error, ConnectionError):
            self.leave()

    def heard(self) -> Exception | None:
        """What another rank has failed with."""
        posted = self._posted()
        return RuntimeError(posted[1]) if posted else None

    def _hear(self, step: int) -> None:
        """Takes over the failure that another rank has posted, if one has."""
        posted = self._posted()
        if posted and posted[0] <= step:  # a rank that is ahead may have failed in a step that is still to come here
            self.error = RuntimeError(posted[1])

    def _posted(self) -> tuple[int, str] | None:
        """The step and the text of the first failure."""
        try:
            if self.store.check(["abort"]):
                step, text = self.store.get("abort").decode().split(" ", 1)
                return int(step), text
        except Exception:  # the store died with its host; the next exchange with it tells
            pass
        return None

    def leave(self) -> None:
        """Hangs up: ranks that wait for this one, now or in a later step, find out at once and not at the timeout. A rank
        that could not write or read a message goes on until its backward ends, for the others' sake, and leaves then."""
        if not self.left:
            self.left = True
            hang_up(self.group)
