"""Counts the backward passes of a step, also those that DDP takes no part in, under no_sync()."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class Passes:
    """begins(): called when the first gradient of a step is about to be accumulated. over(): when a pass is, before DDP
    has finished it. Neither is held."""

    def __init__(self, parameters: list[Tensor], begins: Callable[[], None], over: Callable[[], None]):
        self._begins, self._over = weakref.WeakMethod(begins), weakref.WeakMethod(over)
        self._nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in parameters]  # autograd makes one anew when nobody holds it
        self._hooks = [node.register_prehook(_accumulates(weakref.ref(self), i)) for i, node in enumerate(self._nodes)]
        self.reset()

    def reset(self) -> None:
        """A step is over."""
        self.count = 0
        self._tasks: set[int] = set()
        self._times = [0] * len(self._nodes)

    def check(self) -> None:
        """RuntimeError if what was counted are not passes: reentrant checkpoints have autograd run within autograd."""
        if self.count > max(self._times):
            raise RuntimeError(f'schedule="delayed" cannot tell how many backward passes a step has: autograd ran {self.count} times, and no parameter got '
                               f"more than {max(self._times)} gradients. Use checkpoints with use_reentrant=False, and losses that reach the same parameters")

    def accumulates(self, i: int) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            if not self._tasks and (begins := self._begins()) is not None:
                begins()
            self._tasks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(self._is_over)
        self._times[i] += 1

    def _is_over(self) -> None:
        self.count += 1
        if (over := self._over()) is not None:
            over()

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _accumulates(held: weakref.ref, i: int) -> Callable:
    def before_accumulating(gradients: tuple) -> None:
        if (passes := held()) is not None:
            passes.accumulates(i)

    return before_accumulating
