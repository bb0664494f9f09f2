"""What training benches train, by name: a model, the data that it learns from, and sizes where the user names none.

    gpt        ByteGPT on stretches of the standard library's source
    lstm       ByteLSTM on the same
    mlp        a multilayer perceptron on waves of ten directions, see images.py
    resnet     ResNet with batch normalization on the same
    stack      linear layers on noise, in DDP's default buckets: few rows, so that a step is mostly communication
    recommender  embeddings of users and items and a perceptron on clicks, see clicks.py
    sleeping   emulated computation that costs no processor: layers of 20 ms forward and 30 ms backward, of 0.625 MiB each
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from . import clicks, images, text
from .models import ByteGPT, ByteLSTM, Perceptron, Recommender, ResNet, Sleeping, Stack, next_byte_loss
from .steps import Work

CONTEXT = 128  # bytes that a model of text sees at once


class Kind(NamedTuple):
    """model(width, layers); data(model's width, size of a rank's batch) -> (loss, draw) with loss(model, batch), draw(generator)."""

    model: Callable[[int, int], nn.Module]
    data: Callable[[int, int], tuple[Callable, Callable]]
    width: int
    layers: int
    batch: int
    bucket_mb: float = 1.0


def kind(name: str) -> Kind:
    """ValueError with the known names for an unknown one."""
    if name not in KINDS:
        raise ValueError(f"no model {name!r}; there are {', '.join(KINDS)}")
    return KINDS[name]


def work(name: str, width: int, layers: int, size: int) -> Work:
    """Batches of `size` per rank: other ones for each rank and number, the same in every run."""
    loss, draw = kind(name).data(width, size)
    return Work(partial(kind(name).model, width, layers), loss, lambda rank, number: draw(torch.Generator().manual_seed(1000 * number + rank)))


def parameters(name: str, width: int, layers: int) -> int:
    with torch.device("meta"):  # nothing is allocated
        return sum(p.numel() for p in kind(name).model(width, layers).parameters())


def _bytes(width: int, size: int):
    training, _ = text.standard_library()
    return next_byte_loss, lambda generator: text.batch(training, size, CONTEXT, generator)


def _images(width: int, size: int):
    return lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), lambda generator: images.batch(size, generator)


def _clicks(width: int, size: int):
    return (lambda model, batch: F.binary_cross_entropy_with_logits(model(*batch[:2]), batch[2])), lambda generator: clicks.batch(size, generator)


def _noise(width: int, size: int):
    return lambda model, x: model(x).square().mean(), lambda generator: torch.randn(size, width, generator=generator)


def _values(width: int, size: int):
    """Values that the layers are to turn into ones."""
    return lambda model, x: 0.5 * (model(x) - 1).square().sum(), lambda generator: 0.5 + torch.rand(320, width, generator=generator)


KINDS = {
    "gpt": Kind(partial(ByteGPT, context=CONTEXT), _bytes, 128, 5, 8),
    "lstm": Kind(ByteLSTM, _bytes, 256, 2, 8),
    "mlp": Kind(Perceptron, _images, 512, 4, 32),
    "resnet": Kind(ResNet, _images, 16, 3, 16),
    "recommender": Kind(partial(Recommender, users=clicks.USERS, items=clicks.ITEMS), _clicks, 32, 2, 256),
    "stack": Kind(Stack, _noise, 1280, 15, 8, bucket_mb=25.0),
    "sleeping": Kind(Sleeping, _values, 512, 8, 1, bucket_mb=0.6),
}
