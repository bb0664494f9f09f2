"""What can be learnt here without a download, by name: real text, images, clicks. Each has an optimizer as one would take it.

    gpt          ByteGPT on the standard library's source, AdamW; loss in nats per byte of held-out files
    lstm         ByteLSTM on the same
    resnet       ResNet with batch normalization on waves of ten directions (images.py), SGD with Nesterov's momentum; cross-entropy
                 of images that training does not see
    recommender  embeddings of 8192 users and 2048 items and a perceptron on clicks (clicks.py), AdamW; cross-entropy of clicks
                 that training does not see

The learning rate rises over the first tenth of the steps and falls to zero along a cosine: with a constant one, runs of a GPT that
differ by 1e-6 in their first parameters end some hundredths of a nat apart, and nothing could be told from a difference
between two specs; with this one they end within 0.0001.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from . import clicks, images, text, works

_PER_BYTE, _CROSS_ENTROPY = "nats per byte", "nats (cross-entropy)"
_TEXTS, _IMAGES, _CLICKS = 256, 1024, 16384  # held out, the same for all


class Task(NamedTuple):
    """optimizer(parameters, lr). lr: a good one of plain DDP. held_out(): a batch that training never sees. unit: of the loss."""

    optimizer: Callable[[Any, float], torch.optim.Optimizer]
    lr: float
    steps: int
    held_out: Callable[[], Any]
    unit: str


def _text() -> torch.Tensor:
    return text.batch(text.standard_library()[1], _TEXTS, works.CONTEXT, torch.Generator().manual_seed(0))


_adamw = torch.optim.AdamW
_nesterov = partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=5e-4)

TASKS = {
    "gpt": Task(_adamw, 2e-3, 400, _text, _PER_BYTE),
    "lstm": Task(_adamw, 4e-3, 300, _text, _PER_BYTE),
    "resnet": Task(_nesterov, 0.05, 200, lambda: images.batch(_IMAGES, torch.Generator().manual_seed(1 << 40)), _CROSS_ENTROPY),
    "recommender": Task(_adamw, 2e-2, 600, lambda: clicks.batch(_CLICKS, torch.Generator().manual_seed(1 << 40)), _CROSS_ENTROPY),
}


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, as a fraction of the highest."""
    return min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def judged(loss: Callable, model: nn.Module, held_out: Any) -> float:
    """The loss of what was held out, as the model does in use: batch normalization by what it has seen in training. Each rank
    takes its share, and all get the mean."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = held_out[rank::world] if isinstance(held_out, torch.Tensor) else [values[rank::world] for values in held_out]
    model.eval()
    with torch.no_grad():
        mean = loss(model, share) / world
    model.train()
    dist.all_reduce(mean)
    return mean.item()
