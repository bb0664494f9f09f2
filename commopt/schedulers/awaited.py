"""Tensors that wait on first use for what is still under way.

An awaited tensor is the tensor itself, a parameter or a gradient: only its Python class is another one meanwhile, so that
every function of torch that meets it, in a list too, first has it arrive. What asks for its shape and the like need not
wait. Nothing in the model or the training loop is wrapped, and whatever looks early, at any place, gets the right values.

C++ that gets hold of a tensor without Python does not notice: autograd when it accumulates, TorchScript, compiled code,
CUDA graphs. Who makes a tensor awaited guards those; not arguments of torch.func.grad and vmap, nor an extension that is
given another module's parameter.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_NEEDS_NO_VALUES = {
    *(getattr(Tensor, name).__get__ for name in (
        "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_quantized", "is_sparse", "itemsize", "layout",
        "nbytes", "ndim", "output_nr", "requires_grad", "retains_grad", "shape")),
    *(getattr(Tensor, name).__set__ for name in ("grad", "requires_grad")),
    *(getattr(Tensor, name) for name in (
        "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point", "nelement", "numel", "size", "storage_offset",
        "stride", "register_hook", "register_post_accumulate_grad_hook")),
    torch.is_complex, torch.is_floating_point, torch.numel,
}


def _arrive_first(cls: type, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None) -> Any:
    kwargs = kwargs or {}
    if func in _NEEDS_NO_VALUES:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    for tensor in _awaited_in((args, tuple(kwargs.values()))):
        tensor._arrive()
    return func(*args, **kwargs)


class AwaitedParameter(nn.Parameter):
    __torch_function__ = classmethod(_arrive_first)

    # A parameter's copy and its pickle are made for its class before anything asks for its values.

    def __deepcopy__(self, memo: dict) -> nn.Parameter:
        self._arrive()
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: int) -> Any:
        self._arrive()
        return self.__reduce_ex__(protocol)


class AwaitedGradient(Tensor):
    __torch_function__ = classmethod(_arrive_first)


_AWAITED = {nn.Parameter: AwaitedParameter, Tensor: AwaitedGradient}
_PLAIN = {awaited: plain for plain, awaited in _AWAITED.items()}


def can_wait(tensor: Tensor) -> bool:
    """Whether it is of one of the two classes that have an awaited one."""
    return type(tensor) in _AWAITED


def await_(tensor: Tensor, arrive: Callable[[], None]) -> None:
    """From now on the first use of the tensor calls `arrive`, which calls `arrived` for it."""
    tensor._arrive = arrive
    tensor.__class__ = _AWAITED[type(tensor)]


def arrived(tensor: Tensor) -> None:
    """The tensor is an ordinary one again, if it was not."""
    if type(tensor) in _PLAIN:
        tensor.__class__ = _PLAIN[type(tensor)]
        del tensor._arrive


def _awaited_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _awaited_in(item)
    elif isinstance(value, dict):
        yield from _awaited_in(tuple(value.values()))
    elif type(value) in _PLAIN:
        yield value
