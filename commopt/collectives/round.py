"""One round of means: values that each rank has, of which rank r averages row r and sends it to all."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..compressors import Compressor, all_finite
from ..wire import Layout


class Lane(NamedTuple):
    """The values of a round that travel alike: as messages of `way`, one for each row of values, float32 [world, shard].
    arriving: the fields of those messages, each [world, count], in the round's rows of bytes. came: those of each row by itself,
    [count]; sent: those of each row that departs; means: the same as a sum of one, [1, count]."""

    way: Compressor
    values: Tensor
    arriving: list[Tensor]
    sent: list[list[Tensor]]
    came: list[list[Tensor]]
    means: list[list[Tensor]]


class Round:
    """departing and arriving: uint8 [world, nbytes]. views: float32, the values of each field that it was made of."""

    def __init__(self, fields: list[tuple[str, Compressor, int]], world: int, device: torch.device):
        """fields: name, the way it travels, count."""
        self.kernels = backends.select(device)
        counts: dict[Compressor, int] = {}
        for _, way, count in sorted(fields, key=lambda field: str(field[1])):
            counts[way] = counts.get(way, 0) + count
        shards = {way: 8 * -(-count // (8 * world)) for way, count in counts.items()}
        rows = Layout([field for way, shard in shards.items() for field in way.fields(shard)])
        self.nbytes = rows.nbytes
        self.departing, self.arriving = (torch.zeros(world, rows.nbytes, dtype=torch.uint8, device=device) for _ in range(2))
        out, into = (iter(rows.views(all_rows)) for all_rows in (self.departing, self.arriving))
        self.lanes = []
        for way, shard in shards.items():
            departing, arriving = ([next(fields) for _ in way.fields(shard)] for fields in (out, into))
            sent, came = ([[field[r] for field in fields] for r in range(world)] for fields in (departing, arriving))
            means = [[field[r : r + 1] for field in departing] for r in range(world)]
            values = torch.zeros(world, shard, dtype=torch.float32, device=device)
            self.lanes.append(Lane(way, values, arriving, sent, came, means))
        free = {lane.way: lane.values.view(-1) for lane in self.lanes}
        self.views: list[Tensor] = []
        for _, way, count in fields:
            self.views.append(free[way][:count])
            free[way] = free[way][count:]
        self._padding = list(free.values())

    def encode(self, r: int, arrived: bool = False) -> None:
        """Row r of `departing` <- the message of row r of the values; of `arriving` as if it had come from another rank."""
        for lane in self.lanes:
            lane.way.encode(self.kernels, lane.values[r], None, *(lane.came if arrived else lane.sent)[r])

    def average(self, r: int, weight: float) -> None:
        """Row r of the values <- weight * the sum of all that has arrived."""
        for lane in self.lanes:
            lane.way.decode_sum(self.kernels, lane.values[r], weight, *lane.arriving)

    def decode(self) -> None:
        """Each row of the values <- its message in `departing`, the same on all ranks."""
        for lane in self.lanes:
            for row, mean in zip(lane.values, lane.means):
                lane.way.decode_sum(self.kernels, row, 1.0, *mean)
        for rest in self._padding:  # where a NaN in its block would stay for the next step
            rest.zero_()

    def finite(self) -> Tensor:
        """Whether no value is an infinity or a NaN; bool []."""
        return all_finite(*(lane.values for lane in self.lanes))
