"""Parameters and their optimizer's state as they are, to be put back."""

import copy

import torch
from torch import Tensor
from torch.optim import Optimizer


class Snapshot:
    @torch.no_grad()
    def __init__(self, optimizer: Optimizer, parameters: list[Tensor]):
        self._optimizer, self._parameters = optimizer, parameters
        self._values = [p.detach().clone() for p in parameters]
        self._state = [_copy(optimizer.state[p]) if p in optimizer.state else None for p in parameters]

    @torch.no_grad()
    def put_back(self) -> None:
        """In place, as far as there is a place."""
        torch._foreach_copy_(self._parameters, self._values)
        for p, before in zip(self._parameters, self._state):
            if before is None:
                self._optimizer.state.pop(p, None)
                continue
            now = self._optimizer.state[p]
            for key in now.keys() - before.keys():
                del now[key]
            for key, value in before.items():
                there = now.get(key)
                if isinstance(value, Tensor) and isinstance(there, Tensor) and (there.shape, there.dtype) == (value.shape, value.dtype):
                    there.copy_(value)
                else:
                    now[key] = value


def _copy(state: dict) -> dict:
    return {key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value) for key, value in state.items()}
