from collections.abc import Callable

import torch
from torch import Tensor

from ..compressors import Compressor
from ..plan import Part, Plan, narrow


class Shards:
    """A bucket cut in stretches, of which rank r of some ranks, this one being `rank`, sums the r-th and sends it to all.

    spans: (start, stop) of each. messages: the message of each. sizes: their bytes. departing, arriving and sums: uint8
    [ranks, longest], what goes to each rank, what each has sent of this rank's shard, and each shard's sum. arrived: the fields of
    what has arrived. own_sum: those of this rank's sum. each_sum: of every rank's, as rows of which there is one.
    """

    def __init__(self, plan: Plan, spans: list[tuple[int, int]], rank: int, compressor: Callable[[Part], Compressor]):
        self.plan, self.spans, self.rank = plan, spans, rank
        self.start, self.stop = spans[rank]
        self.messages = [plan.message(start, stop, "share", compressor) for start, stop in spans]
        self.sum = plan.message(self.start, self.stop, "sum", compressor)
        self.sizes = [message.nbytes for message in self.messages]
        shape = (len(spans), max(self.sizes))
        self.departing, self.arriving, self.sums = (torch.zeros(shape, dtype=torch.uint8, device=plan.device) for _ in range(3))
        self._shares = [message.fields((self.arriving if r == rank else self.departing)[r]) for r, message in enumerate(self.messages)]
        self.each_sum = [message.fields(self.sums[r : r + 1]) for r, message in enumerate(self.messages)]
        self.arrived, self.own_sum = self.sum.fields(self.arriving), self.sum.fields(self.sums[rank])

    @property
    def sent(self) -> int:
        """Bytes that this rank sends: to each owner its share, and to the others its sum."""
        own = self.sizes[self.rank]
        return sum(self.sizes) - own + (len(self.sizes) - 1) * own

    @property
    def size(self) -> int:
        """Those of a rank on average."""
        return 2 * (len(self.sizes) - 1) * sum(self.sizes) // len(self.sizes)

    def encode(self, r: int, x: Tensor, residual: Tensor | None) -> None:
        """The message of rank r's shard, into the row that goes there; this rank's own as if it had arrived."""
        start, stop = self.spans[r]
        self.messages[r].encode(narrow(x, start, stop), narrow(residual, start, stop), self._shares[r], self.plan.draw, self.plan.loss_scale)

    def decode(self, x: Tensor) -> list[Tensor]:
        """x <- the mean of all ranks, from the sums. bools [], all of them true where it is finite."""
        for (start, stop), message, fields in zip(self.spans, self.messages, self.each_sum):
            message.decode_sum(narrow(x, start, stop), self.plan.weight, fields)
        return [one for message, fields in zip(self.messages, self.each_sum) for one in message.finite(fields)]
