"""What carries the messages of one handle: process groups, links and threads of its own."""

import contextlib
import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ..collectives.link import Link, link_for, timeout_of
from ..collectives.merge import WORTH, Batch
from ..collectives.phases import Prepared
from ..collectives.run import Exchange, Runner, future_of
from .alarm import Alarm

_numbers = itertools.count()


class Traffic:
    """group: the ranks, by default all. failed(error, where): told of what goes wrong, on any thread; it posts to `alarm`.
    runner: what runs the exchanges on a device.

    Making one is a collective call. Exchanges are begun in the same order on all ranks.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, failed: Callable[[Exception, str], None], runner: Callable[[torch.device], Runner] = Runner
    ):
        group = group or dist.group.WORLD
        self._failed, self._runner = failed, runner
        self.ranks, backend = dist.get_process_group_ranks(group), dist.get_backend(group)
        timeout = timeout_of(group)
        # All ranks of the job can make a group together; of a part of them only its members come here.
        part = len(self.ranks) < dist.get_world_size()
        make = lambda kind: dist.new_group(self.ranks, timeout=timeout, backend=kind, use_local_synchronization=part)
        self.group = make(backend)  # a group shared with another thread gives silently wrong sums
        self.control = self.group if backend == "gloo" else make("gloo")
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        number = [next(_numbers)]  # rank 0's: another rank may have made more of these than it
        dist.broadcast_object_list(number, self.ranks[0], self.control)
        store = dist.PrefixStore(f"commopt/{self.ranks[0]}/{number[0]}", dist.distributed_c10d._get_default_store())
        self.alarm = Alarm(store, self.control)
        self._links: dict[torch.device, tuple[Link, Runner]] = {}
        self._batch: Batch | None = None  # small exchanges that wait for company
        self._merged: dict = {}  # buffers of batches
        self.travels_as: dict[int, int] = {}  # the number of a plan's exchange -> that of the one in which its messages travel

    def exchange(self, prepared: Prepared, x: Tensor, residual: Tensor | None, ended: Callable[[], None] = lambda: None) -> Future:
        """Begins to average x in place. A small exchange waits for the next or for close_batch. ended(): called when the future
        is done, on the thread or stream that has done it."""
        plan, (link, runner), future = prepared.plan, self._on(x.device), future_of(x)

        def tell(failure: Exception) -> None:
            first, last = plan.parameters[0].name, plan.parameters[-1].name
            self._failed(failure, f"in the exchange of bucket {plan.number} ({first} to {last}) among ranks {self.ranks}")

        def done(failure: Exception | None) -> None:
            try:
                if failure is not None:
                    tell(failure)
            finally:
                future.set_result(x)
                ended()

        worth = WORTH * (self.world - 1)
        if not prepared.merges or plan.size >= worth:
            self.close_batch()  # in the order in which they were begun, which is the same on all ranks
            self.travels_as[plan.exchange] = plan.exchange
            runner.exchange(Exchange(plan.exchange, prepared.phases, prepared.begin(link, x, residual), done, plan.size / prepared.phases, tell))
            return future
        if self._batch is not None and self._batch.device != x.device:
            self.close_batch()
        if self._batch is None:
            self._batch = Batch(link, x.device, plan.exchange, self._merged, tell)
        self.travels_as[plan.exchange] = self._batch.number
        with runner.stream.beside():
            self._batch.add(prepared, x, residual, done)
        if self._batch.size >= worth:
            self.close_batch()
        return future

    def close_batch(self) -> None:
        """Sends the small exchanges that wait."""
        batch, self._batch = self._batch, None
        if batch is not None:
            self._on(batch.device)[1].exchange(Exchange(batch.number, batch.count, batch.phases(), batch.done, batch.size / batch.count, batch.tell))

    def drop_batch(self) -> None:
        """Forgets what waits and will not be sent."""
        self._batch = None

    def close(self) -> None:
        """Nothing more follows in this step."""
        self.close_batch()
        for runner in self.runners:
            runner.close()

    def finish(self) -> None:
        """Returns when nothing is under way that a planned order holds back."""
        self.close()
        for runner in self.runners:
            runner.finish()

    def free(self) -> None:
        """Frees the buffers of batches, which are made anew."""
        self._merged, self.travels_as = {}, {}

    def beside(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Where exchanges run on that device, after what is under way."""
        return self._on(device)[1].stream.beside()

    @property
    def runners(self) -> list[Runner]:
        return [runner for _, runner in self._links.values()]

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces them by their exact mean, the same bits on all ranks, when nothing else is under way. A collective call."""
        for kind in dict.fromkeys((t.device, t.dtype) for t in tensors):
            some = [t for t in tensors if (t.device, t.dtype) == kind]
            flat = torch.cat([t.reshape(-1) for t in some]).to(torch.promote_types(kind[1], torch.float32))
            dist.all_reduce(flat, group=self.control if kind[0].type == "cpu" else self.group)
            for t, mean in zip(some, flat.div_(self.world).split([t.numel() for t in some])):
                t.copy_(mean.view(t.shape))

    def _on(self, device: torch.device) -> tuple[Link, Runner]:
        if device not in self._links:
            group = self.control if device.type == "cpu" else self.group  # a default group may serve both, by name of neither
            self._links[device] = link_for(device, group, lambda error: self._failed(error, "writing a message"), self.alarm.heard), self._runner(device)
        return self._links[device]

    def clocks(self) -> dict[str, float]:
        """Seconds of encode, comm and decode since reset_clocks."""
        return {name: sum(runner.clock.seconds[name] for runner in self.runners) for name in ("encode", "comm", "decode")}

    def reset_clocks(self) -> None:
        for runner in self.runners:
            runner.clock.reset()

    def stop(self) -> None:
        for runner in self.runners:
            runner.stop()
