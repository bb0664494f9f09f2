"""Ops of a device, called with tensors on the CPU."""

from collections.abc import Callable

import torch
from torch import Tensor


def through(op: Callable, device: str) -> Callable:
    """op for tensors on the CPU: it gets copies of their storages on the device, which are copied back. What shares a storage still
    does, and what begins at an odd place in it too."""

    def call(*args):
        copies: dict[int, tuple[Tensor, Tensor]] = {}  # the address of a storage -> its bytes, here and there

        def there(arg):
            if not isinstance(arg, Tensor):
                return arg
            storage = arg.untyped_storage()
            if storage.data_ptr() not in copies:
                here = torch.empty(0, dtype=torch.uint8).set_(storage)
                copies[storage.data_ptr()] = here, here.to(device, copy=True)
            copy = copies[storage.data_ptr()][1]
            return torch.empty(0, dtype=arg.dtype, device=device).set_(copy.untyped_storage(), arg.storage_offset(), arg.shape, arg.stride())

        result = op(*map(there, args))
        for here, copy in copies.values():
            here.copy_(copy)
        return result

    return call
